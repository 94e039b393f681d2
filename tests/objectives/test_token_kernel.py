"""The kernel of a chunk's logits says what plain JAX does, on a GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.objectives import chunked_cross_entropy, fused_cross_entropy
from transformer_jax.objectives.cross_entropy import (
    cross_entropy,
    smoothed_cross_entropy,
    top1_correct,
)

GPU = jax.default_backend() == "gpu"


def score(monkeypatch, V, W, block, *args, smoothing=0.0, dtype=jnp.float32):
    monkeypatch.setattr(fused_cross_entropy, "BLOCK", block)
    return jax.jit(lambda *args: fused_cross_entropy.fused_softmax_cross_entropy(
        *args, num_classes=V, smoothing=smoothing, dtype=dtype, interpret=not GPU))(*args)


def plain(logits, bias, targets, weights, V, smoothing):
    """The four by definition."""
    def total(logits):
        x = logits[:, :V] if bias is None else logits[:, :V] + bias
        loss = smoothed_cross_entropy(x, targets, smoothing)
        return (loss * weights).sum(), (loss, cross_entropy(x, targets), top1_correct(x, targets))

    gradient, found = jax.grad(total, has_aux=True)(logits)
    return (*found, gradient)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("V", "W", "block"), [(37, 37, 64), (300, 384, 128), (128, 128, 128)])
def test_sums_and_gradient(monkeypatch, V, W, block, has_bias, smoothing):
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(9, W)) * 20, jnp.float32)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if has_bias else None
    targets = jnp.asarray(rng.integers(0, V, 9), jnp.int32).at[0].set(logits[0, :V].argmax())
    weights = jnp.asarray(rng.random(9), jnp.float32).at[1].set(0)
    found = score(monkeypatch, V, W, block, logits, bias, targets, weights, smoothing=smoothing)
    expected = plain(logits, bias, targets, weights, V, smoothing)
    assert found.correct[0] == 1 and not found.gradient[1].any()
    for a, b in zip(found, expected):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_of_equal_scores_the_first_counts(monkeypatch):
    logits = jnp.zeros((2, 128), jnp.float32).at[:, 70:].set(1.0)
    found = score(monkeypatch, 100, 128, 64, logits, None, jnp.array([70, 71]), jnp.ones(2))
    assert found.correct.tolist() == [1, 0]


def test_the_gradient_of_16_bits(monkeypatch):
    logits = jax.random.normal(jax.random.key(0), (4, 128))
    args = (logits, None, jnp.arange(4), jnp.ones(4))
    found = score(monkeypatch, 100, 128, 64, *args, dtype=jnp.bfloat16).gradient
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        found.astype(float), plain(*args, 100, 0.0)[-1], atol=4e-3)


def test_projection_with_the_kernel_is_projection_without(monkeypatch):
    """Padded rows of the table, a bias, smoothing, and tokens that do not fill a chunk."""
    from test_projection import assert_same, gradients, inputs

    args = inputs()

    def run(uses_kernel):
        monkeypatch.setattr(chunked_cross_entropy, "_kernel_runs", lambda: uses_kernel)
        return gradients(lambda *args: chunked_cross_entropy.chunked_cross_entropy(*args, smoothing=0.1, chunk=5), *args)

    expected = run(False)
    if not GPU:
        whole = fused_cross_entropy.fused_softmax_cross_entropy
        monkeypatch.setattr(fused_cross_entropy, "score",
                            lambda *args, **options: whole(*args, **options, interpret=True))
    assert_same(run(True), expected)
