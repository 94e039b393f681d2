"""Rematerialization and scan over stacked layers do not change outputs and gradients."""

import functools

import jax
import numpy as np
import pytest
from small_models import BERT, GPT1, GPT2, TRANSFORMER, build, random_tokens

from transformer_jax import tree
from transformer_jax.models import build_model, init_params

TOKENS = random_tokens(2, 7)
MASK = np.arange(7) < np.array([[7], [4]])
CONFIGS = {"gpt1": GPT1, "gpt2": GPT2, "bert": BERT, "transformer": TRANSFORMER}


def loss(config, params, rng=None):
    """A scalar that depends on every parameter but those of BERT's next-sentence head."""
    model = build_model(config)
    has_decoder_tokens = config is TRANSFORMER or config.positions == "sinusoidal"
    decoder_tokens = (TOKENS[:, ::-1],) if has_decoder_tokens else ()
    out = model.apply({"params": params}, TOKENS, *decoder_tokens, padding_mask=MASK,
                      deterministic=rng is None, rngs=rng if rng is None else {"dropout": rng})
    logits = out.logits if hasattr(out, "logits") else out.mlm_logits
    return (jax.nn.log_softmax(logits) ** 2 * MASK[..., None]).sum()


def value_and_gradient(config, params, rng=None):
    return jax.device_get(jax.jit(
        jax.value_and_grad(functools.partial(loss, config)))(params, rng))


@functools.cache
def expected(name):
    return value_and_gradient(CONFIGS[name], build(CONFIGS[name])[1])


def assert_same(actual, expected):
    expected = tree.flatten_paths(expected)
    scale = max(np.abs(leaf).max() for leaf in expected.values())
    for path, leaf in expected.items():
        np.testing.assert_allclose(tree.flatten_paths(actual)[path], leaf, rtol=1e-4,
                                   atol=1e-6 * scale, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat(name, remat):
    config = CONFIGS[name].replace(remat=remat)
    value, gradient = value_and_gradient(config, build(CONFIGS[name])[1])
    np.testing.assert_allclose(value, expected(name)[0], rtol=1e-6)
    assert_same(gradient, expected(name)[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("remat", ["none", "full"])
def test_scan_over_stacked_layers(name, remat):
    params = tree.stack_layers(build(CONFIGS[name])[1])
    value, gradient = value_and_gradient(CONFIGS[name].replace(remat=remat), params)
    np.testing.assert_allclose(value, expected(name)[0], rtol=1e-6)
    assert_same(tree.unstack_layers(gradient), expected(name)[1])


@pytest.mark.slow
def test_each_scanned_layer_has_its_own_dropout_mask():
    config = GPT2.replace(dropout_rate=0.5, attention_dropout_rate=0.0)
    params = tree.stack_layers(build(config)[1])
    a, b, c = (loss(config, params, jax.random.key(seed)) for seed in (0, 0, 1))
    assert a == b != c
    # Two layers with equal parameters have different gradients, because of dropout.
    equal = jax.tree.map(lambda x: np.stack([x[0], x[0]]), params["decoder"]["layers"])
    params["decoder"]["layers"] = equal
    grads = jax.grad(functools.partial(loss, config))(params, jax.random.key(0))
    first, second = np.asarray(grads["decoder"]["layers"]["mlp"]["wo"]["bias"])
    assert np.abs(first - second).max() > 0.01 * np.abs(first).max()


def test_stacked_layers_take_no_cache():
    model, params = build(GPT2)
    cache = model.init_cache(GPT2, 2, 8)
    with pytest.raises(ValueError, match="the parameters of the layers are stacked"):
        model.apply({"params": tree.stack_layers(params)}, TOKENS, cache=cache,
                    positions=np.zeros_like(TOKENS), method="decode")


def costs(**options):
    """FLOPs of a scanned layer and temporary bytes of a gradient; nothing is allocated.

    The layers are scanned, because XLA on CPU does not rematerialize in unrolled layers.
    """
    config = GPT2.replace(num_layers=6, d_model=48, num_heads=1, mlp_dim=192, max_length=64,
                          **options)
    tokens = jax.ShapeDtypeStruct((8, 64), np.int32)
    model = build_model(config)
    params = jax.eval_shape(lambda: tree.stack_layers(init_params(model, jax.random.key(0))))

    def loss(params, tokens):
        return model.apply({"params": params}, tokens, method="decode").hidden.sum()

    compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    return (compiled.cost_analysis()["flops"],
            compiled.memory_analysis().temp_size_in_bytes)


@pytest.mark.slow
def test_remat_saves_memory_at_the_cost_of_flops():
    (flops, memory), (dots_flops, dots_memory), (full_flops, full_memory) = (
        costs(remat=remat) for remat in ("none", "dots", "full"))
    assert full_memory < dots_memory < memory
    assert flops <= dots_flops < full_flops
    assert full_flops / flops < 1.4
