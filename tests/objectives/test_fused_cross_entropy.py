"""The fused Pallas kernel equals the formulas, on a GPU or in Pallas's interpreter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.nn import backends
from transformer_jax.nn.backends import gpu
from transformer_jax.objectives.cross_entropy import (
    chunked_cross_entropy,
    cross_entropy,
    top1_correct,
)

ON_GPU = jax.default_backend() == "gpu"


def fused(monkeypatch, V, block_size, *args, label_smoothing=0.0, dtype=jnp.float32):
    monkeypatch.setattr(gpu, "CROSS_ENTROPY_BLOCK_SIZE", block_size)
    return jax.jit(functools.partial(
        gpu.softmax_cross_entropy_and_grad, num_classes=V, label_smoothing=label_smoothing,
        dtype=dtype, interpret=not ON_GPU))(*args)


def reference(logits, bias, targets, weights, V, label_smoothing):
    """The four results by definition."""
    def total(logits):
        x = logits[:, :V] if bias is None else logits[:, :V] + bias
        loss = cross_entropy(x, targets, label_smoothing)
        return (loss * weights).sum(), (loss, cross_entropy(x, targets), top1_correct(x, targets))

    logits_grad, values = jax.grad(total, has_aux=True)(logits)
    return (*values, logits_grad)


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("V", "W", "block_size"), [(37, 37, 64), (300, 384, 128), (128, 128, 128)])
def test_values_and_gradient(monkeypatch, V, W, block_size, has_bias, label_smoothing):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(9, W)) * 20, jnp.float32)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if has_bias else None
    targets = jnp.asarray(rng.integers(0, V, 9), jnp.int32).at[0].set(logits[0, :V].argmax())
    weights = jnp.asarray(rng.random(9), jnp.float32).at[1].set(0)
    actual = fused(monkeypatch, V, block_size, logits, bias, targets, weights,
                   label_smoothing=label_smoothing)
    expected = reference(logits, bias, targets, weights, V, label_smoothing)
    assert actual.correct[0] == 1 and not actual.logits_grad[1].any()
    for a, b in zip(actual, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_the_lowest_id_of_tied_logits_is_the_prediction(monkeypatch):
    logits = jnp.zeros((2, 128), jnp.float32).at[:, 70:].set(1.0)
    out = fused(monkeypatch, 100, 64, logits, None, jnp.array([70, 71]), jnp.ones(2))
    assert out.correct.tolist() == [1, 0]


def test_bfloat16_gradient(monkeypatch):
    logits = jax.random.normal(jax.random.key(0), (4, 128))
    args = (logits, None, jnp.arange(4), jnp.ones(4))
    logits_grad = fused(monkeypatch, 100, 64, *args, dtype=jnp.bfloat16).logits_grad
    assert logits_grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        logits_grad.astype(float), reference(*args, 100, 0.0)[-1], atol=4e-3)


def test_chunked_cross_entropy_with_and_without_the_fused_kernel(monkeypatch):
    """With padded rows of the embedding, a bias, label smoothing, and a chunk that is not full."""
    from test_chunked_cross_entropy import assert_close, inputs, values_and_grads

    def run(use_fused_kernel):
        kernel = functools.partial(gpu.softmax_cross_entropy_and_grad, interpret=not ON_GPU)
        variant = backends.Variant(kernel, lambda *args, **kwargs: use_fused_kernel)
        monkeypatch.setitem(backends.VARIANTS, "softmax_cross_entropy_and_grad", (variant,))
        return values_and_grads(functools.partial(
            chunked_cross_entropy, label_smoothing=0.1, tokens_per_chunk=5),
            *inputs())

    expected = run(False)
    assert_close(run(True), expected)
