"""Attention masks, blocks, positions and activations as arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BERT, GPT2, TRANSFORMER, build, forward, random_tokens

from transformer_jax.models import GPT, config_to_dict
from transformer_jax.nn import Attention, Block
from transformer_jax.pretrained.forward import forward as named_forward

TOKENS, T = random_tokens(2, 6), 6
GPT_1 = GPT2.replace(num_layers=1)
PREFIX_MASK = np.tri(T, dtype=bool) | (np.arange(T) < 3)


def changed_positions(change: int, **options) -> list[int]:
    """Positions whose hidden states depend on the token at `change`."""
    tokens = TOKENS.copy()
    tokens[:, change] = tokens[:, change] % 60 + 1
    a, b = (np.asarray(forward(GPT_1, x, **options).hidden) for x in (TOKENS, tokens))
    return np.flatnonzero(np.abs(a - b).max((0, 2)) > 1e-6).tolist()


def test_a_prefix_language_model():
    assert changed_positions(2) == [2, 3, 4, 5]
    assert changed_positions(2, attention_mask=PREFIX_MASK) == [0, 1, 2, 3, 4, 5]
    assert changed_positions(4, attention_mask=PREFIX_MASK) == [4, 5]


def test_a_mask_that_equals_the_symbolic_one():
    expected = forward(GPT_1, TOKENS).logits
    causal = np.tri(T, dtype=bool)
    for mask in (causal, np.broadcast_to(causal, (2, 3, T, T))):
        np.testing.assert_allclose(forward(GPT_1, TOKENS, attention_mask=mask).logits, expected,
                                   atol=1e-5)
    padding_mask = np.arange(T) < np.array([[T], [4]])
    everything = np.ones((T, 1), bool)
    for config in (BERT, TRANSFORMER):
        a, b = (forward(config, TOKENS, padding_mask=padding_mask, **options).hidden
                for options in ({}, {"attention_mask": everything}))
        np.testing.assert_allclose(a, b, atol=1e-5)
    a, b = (forward(TRANSFORMER, TOKENS, decoder_attention_mask=mask).hidden
            for mask in (causal, everything))
    np.testing.assert_allclose(a, forward(TRANSFORMER, TOKENS).hidden, atol=1e-5)
    assert np.abs(a - b).max() > 1e-3


def test_a_mask_of_the_slots_of_a_cache():
    """Prefill with a prefix mask equals the pass without a cache."""
    model, params = build(GPT_1)
    cache = GPT.init_cache(GPT_1, 2, 8)
    mask = np.pad(PREFIX_MASK, ((0, 0), (0, 2)))
    out = model.apply({"params": params}, TOKENS, cache=cache, attention_mask=mask)
    expected = forward(GPT_1, TOKENS, attention_mask=PREFIX_MASK)
    np.testing.assert_allclose(out.logits, expected.logits, atol=1e-5)


@pytest.mark.parametrize("config", [GPT_1, BERT, TRANSFORMER], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize(("mask", "message"), [
    (np.ones((T, T), np.int32), "attention_mask has dtype int32; it must be bool"),
    (np.ones((2, T), bool), r"has shape \(2, 6\); it must broadcast to .*\[2, heads, 6, 6\]"),
    (np.ones((1, 2, 1, T, T), bool), "it must broadcast to"),
], ids=["dtype", "shape", "axes"])
def test_invalid_masks(config, mask, message):
    model, params = build(config)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: model.apply({"params": params}, TOKENS, attention_mask=jnp.asarray(mask)))


class RotaryAttention(Attention):
    def encode_positions(self, x_BTNH, positions_BT):
        first, second = jnp.split(x_BTNH, 2, axis=-1)
        angles = positions_BT[..., None, None] * jnp.linspace(1, 0.1, first.shape[-1])
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


class RotaryBlock(Block):
    attention: type = RotaryAttention


def no_positions(max_length, features, **options):
    return lambda positions: 0.0


ROTARY = GPT_1.replace(block=RotaryBlock, positions=no_positions)


def test_rotary_positions():
    """Outputs depend on the distances of tokens only, and cached decoding gives the same ones."""
    assert "position_embed" not in build(ROTARY)[1]
    logits, shifted = (np.asarray(forward(ROTARY, TOKENS, positions=positions).logits)
                       for positions in (None, np.arange(T)[None].repeat(2, 0) + 5))
    np.testing.assert_allclose(logits, shifted, atol=1e-4)
    reordered = forward(ROTARY, TOKENS, positions=np.arange(T)[None].repeat(2, 0) * 2)
    assert np.abs(logits - reordered.logits).max() > 1e-3
    model, params = build(ROTARY)
    cache = GPT.init_cache(ROTARY, 2, T)
    for t in range(T):
        out = model.apply({"params": params}, TOKENS[:, t : t + 1], cache=cache,
                          positions=np.full((2, 1), t))
        cache = out.cache
        np.testing.assert_allclose(out.logits[:, 0], logits[:, t], atol=1e-4)


@pytest.mark.slow
def test_a_block_with_remat_and_stacked_layers():
    from transformer_jax.tree import stack_layers
    expected = forward(ROTARY, TOKENS).logits
    model, params = build(ROTARY.replace(remat="full"))
    for p in (params, stack_layers(params)):
        np.testing.assert_allclose(model.apply({"params": p}, TOKENS).logits, expected, atol=1e-4)
    with pytest.raises(ValueError, match=r"output_attentions is True, .*unstack_layers"):
        model.apply({"params": stack_layers(params)}, TOKENS, output_attentions=True)


def test_activation_functions():
    relu, function = (forward(GPT_1.replace(activation=activation), TOKENS).logits
                      for activation in ("relu", jax.nn.relu))
    np.testing.assert_array_equal(relu, function)


def test_configs_with_functions_are_not_saved():
    with pytest.raises(ValueError, match=r"activation is <.*; configs with functions or classes"):
        config_to_dict(GPT_1.replace(activation=jnp.tanh))
    assert "block" not in config_to_dict(GPT_1)


@pytest.mark.parametrize(("config", "names"), [
    (GPT_1, ["attentions"]), (BERT, ["attentions"]),
    (TRANSFORMER, ["encoder_attentions", "decoder_attentions", "cross_attentions"])])
def test_attentions_of_forward(config, names):
    model, params = build(config)
    call = jax.eval_shape(lambda: named_forward(model, params, input_ids=jnp.asarray(TOKENS)))
    assert not set(names) & call.keys()
    out = jax.eval_shape(lambda: named_forward(
        model, params, input_ids=jnp.asarray(TOKENS), output_attentions=True))
    for name in names:
        assert [x.shape for x in out[name]] == [(2, 3, T, T)] * config.num_layers
