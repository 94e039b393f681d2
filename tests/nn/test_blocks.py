"""Blocks equal a NumPy implementation of both residual forms."""

import functools

import jax
import numpy as np
import pytest

from transformer_jax.models import GPTConfig
from transformer_jax.nn import backends
from transformer_jax.nn.attention import Mask
from transformer_jax.nn.blocks import Stack

SIZES = {"vocab_size": 9, "max_length": 8, "num_layers": 2, "d_model": 6, "num_heads": 2,
         "mlp_dim": 10, "init_std": 0.5, "activation": "relu"}


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def attention(p, x, source, mask):
    q, k, v = (np.einsum("td,dnh->nth", y, p[n]["kernel"]) + p[n]["bias"][:, None]
               for n, y in (("query", x), ("key", source), ("value", source)))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("nth,nhd->td", weights @ v, p["out"]["kernel"]) + p["out"]["bias"]


def self_attention(p, x):
    return attention(p, x, x, np.tri(len(x), dtype=bool))


def mlp(p, x):
    hidden = np.maximum(x @ p["wi"]["kernel"] + p["wi"]["bias"], 0)
    return hidden @ p["wo"]["kernel"] + p["wo"]["bias"]


def pre_norm(p, x):
    x = x + self_attention(p["self_attention"], norm(p["attention_norm"], x))
    return x + mlp(p["mlp"], norm(p["mlp_norm"], x))


def no_residual(p, x):
    x = self_attention(p["self_attention"], norm(p["attention_norm"], x))
    return mlp(p["mlp"], norm(p["mlp_norm"], x))


def post_norm(p, x):
    x = norm(p["attention_norm"], x + self_attention(p["self_attention"], x))
    return norm(p["mlp_norm"], x + mlp(p["mlp"], x))


@pytest.mark.parametrize(("norm_first", "block"), [
    (True, pre_norm), (False, post_norm), (True, no_residual)])
def test_stack_equals_the_formula(norm_first, block):
    config = GPTConfig(**SIZES, norm_first=norm_first, residual=block is not no_residual)
    stack = Stack(config.stack)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 6)).astype(np.float32)
    mask = Mask(causal=True)
    shapes = jax.eval_shape(stack.init, jax.random.key(0), x, mask)["params"]
    # Biases and scales are random too, so that a missing one changes the output.
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    expected = x[0].astype(np.float64)
    for i in range(2):
        expected = block(params[f"layer_{i}"], expected)
    if norm_first:
        expected = norm(params["final_norm"], expected)
    assert ("final_norm" in params) == norm_first

    out = jax.jit(stack.apply)({"params": params}, x, mask)
    np.testing.assert_allclose(out.hidden[0], expected, rtol=1e-4, atol=1e-5)
    assert out.cache is None and out.attention == ()
    apply = jax.jit(functools.partial(stack.apply, output_attentions=True))
    out = apply({"params": params}, x, mask)
    assert [w.shape for w in out.attention] == [(1, 2, 5, 5)] * 2
    np.testing.assert_allclose(out.attention[1].sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize("norm_first", [True, False])
def test_cross_attention_takes_keys_and_values_from_the_encoder_output(norm_first):
    config = GPTConfig(**SIZES, norm_first=norm_first).stack._replace(
        num_layers=1, cross_attention=True)
    stack = Stack(config)
    rng = np.random.default_rng(0)
    x, encoder_output = (rng.normal(size=(1, n, 6)).astype(np.float32) for n in (5, 4))
    mask, padding_mask = Mask(causal=True), np.array([True, False, True, True])
    options = {"encoder_output": encoder_output,
               "cross_attention_mask": Mask(dense_mask=padding_mask)}
    shapes = jax.eval_shape(functools.partial(stack.init, **options), jax.random.key(0), x, mask)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes["params"])
    p = params["layer_0"]

    def residual(name, sublayer, x):
        if norm_first:
            return x + sublayer(norm(p[f"{name}_norm"], x))
        return norm(p[f"{name}_norm"], x + sublayer(x))

    expected = residual("attention", lambda y: self_attention(p["self_attention"], y),
                        x[0].astype(np.float64))
    expected = residual("cross_attention", lambda y: attention(
        p["cross_attention"], y, encoder_output[0], padding_mask), expected)
    expected = residual("mlp", lambda y: mlp(p["mlp"], y), expected)
    if norm_first:
        expected = norm(params["final_norm"], expected)
    out = stack.apply({"params": params}, x, mask, **options, output_attentions=True)
    np.testing.assert_allclose(out.hidden[0], expected, rtol=1e-4, atol=1e-5)
    # The returned keys and values can replace the encoder output.
    cached = stack.apply(
        {"params": params}, x, mask,
        **options | {"encoder_output": out.cross_attention_cache}, output_attentions=True)
    np.testing.assert_array_equal(cached.hidden, out.hidden)
    assert out.cross_attention[0].shape == (1, 2, 5, 4)
    # Without a mask, queries attend to all of the encoder output.
    unmasked = stack.apply({"params": params}, x, mask, encoder_output=encoder_output,
                           output_attentions=True)
    assert (np.asarray(unmasked.cross_attention[0]) > 0).all()
    assert not np.asarray(out.cross_attention[0])[..., 1].any()


@pytest.mark.slow
@pytest.mark.parametrize("norm_first", [True, False])
def test_cotangent_of_the_residual_stream_is_computed_once(norm_first):
    """The FLOPs of the compiled gradient are linear in the number of layers, not quadratic."""

    def flops(num_layers):
        c = GPTConfig(**SIZES | {"num_layers": num_layers, "d_model": 128, "mlp_dim": 256},
                      norm_first=norm_first)
        stack = Stack(c.stack)
        x, mask = np.ones((4, 32, 128), np.float32), Mask(causal=True)
        params = jax.eval_shape(stack.init, jax.random.key(0), x, mask)
        gradient = jax.jit(jax.grad(lambda x, p: stack.apply(p, x, mask).hidden.sum()))
        with backends.use("auto"):
            return gradient.lower(x, params).compile().cost_analysis()["flops"]

    two, six, ten = flops(2), flops(6), flops(10)
    assert ten - six == pytest.approx(six - two, rel=0.02)
