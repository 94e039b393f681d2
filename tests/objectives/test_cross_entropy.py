"""Losses, weighted sums and means, compared with values computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from transformer_jax.objectives import cross_entropy

# Probabilities 1/4 and 3/4; and 1/2 and 1/2.
LOGITS = jnp.log(jnp.asarray([[1.0, 3.0], [5.0, 5.0]]))


def test_cross_entropy_in_nats():
    values = cross_entropy.cross_entropy(LOGITS, np.array([0, 1]))
    np.testing.assert_allclose(values, [np.log(4), np.log(2)], rtol=1e-6)


def test_cross_entropy_of_extreme_logits_is_finite():
    def total(logits):
        return cross_entropy.cross_entropy(logits, jnp.asarray([0, 1])).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray([[1e4, -1e4], [1e4, -1e4]]))
    assert value == 2e4
    assert gradient.tolist() == [[0, 0], [1, -1]]


def test_cross_entropy_of_bfloat16_is_float32():
    values = cross_entropy.cross_entropy(jnp.zeros((1, 1000), jnp.bfloat16), np.array([3]))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, np.log(1000), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_derivatives_equal_those_of_the_formula(smoothing):
    logits, tangent = jax.random.normal(jax.random.key(0), (2, 2, 3, 11))
    targets = jnp.asarray([[0, 10, 4], [7, 7, 1]])

    def loss(logits):
        return (cross_entropy.cross_entropy(logits, targets, smoothing) ** 2).sum()

    def formula(logits):
        expected = optax.smooth_labels(jax.nn.one_hot(targets, 11), smoothing)
        return ((expected * -jax.nn.log_softmax(logits)).sum(-1) ** 2).sum()

    for derivative in (
        jax.grad,  # reverse mode, forward mode, and second derivatives by both
        lambda fn: lambda x: jax.jvp(fn, (x,), (tangent,)),
        lambda fn: lambda x: jax.jvp(jax.grad(fn), (x,), (tangent,)),
        lambda fn: jax.grad(lambda x: (jax.grad(fn)(x) * tangent).sum()),
    ):
        found, wanted = derivative(loss)(logits), derivative(formula)(logits)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
                     found, wanted)


@pytest.mark.slow
def test_top1_correct():
    # The second row is a tie, which the lowest id wins.
    assert cross_entropy.top1_correct(LOGITS, np.array([1, 1])).tolist() == [1, 0]
    assert cross_entropy.top1_correct(LOGITS, np.array([0, 0])).tolist() == [0, 1]
    ties = jnp.zeros((3, 2, 5))
    assert cross_entropy.top1_correct(ties, np.array([[0, 1], [4, 0], [2, 3]])).tolist() == [
        [1, 0], [0, 1], [0, 0]]
    assert cross_entropy.top1_correct(jnp.full((1, 4), jnp.nan), np.array([0])) == 0
    logits = jnp.round(jax.random.normal(jax.random.key(1), (500, 7)))
    targets = np.random.default_rng(0).integers(0, 7, 500)
    np.testing.assert_array_equal(
        cross_entropy.top1_correct(logits, targets), logits.argmax(-1) == targets)


def test_weighted_sum():
    total, weight = cross_entropy.weighted_sum(
        jnp.asarray([2.0, 3.0, 50.0]), jnp.asarray([1, 2, 0]))
    assert (float(total), float(weight)) == (8, 3)
    assert weight.dtype == jnp.float32


def test_mean_loss_adds_the_means_of_the_terms():
    assert cross_entropy.mean_loss(jnp.float32(6), jnp.float32(4)) == 1.5
    terms = {"mlm": jnp.float32(6), "nsp": jnp.float32(1)}
    assert cross_entropy.mean_loss(terms, {"mlm": jnp.float32(4), "nsp": jnp.float32(2)}) == 2.0


def test_a_term_of_weight_0_contributes_nothing_to_loss_and_gradient():
    def loss(x):
        weights = {"a": jnp.float32(2), "b": jnp.float32(0)}
        return cross_entropy.mean_loss({"a": 3 * x, "b": 0 * x}, weights)

    value, gradient = jax.value_and_grad(loss)(jnp.float32(4))
    assert (value, gradient) == (6, 1.5)


def test_dropout_kwargs():
    key = jax.random.key(0)
    assert cross_entropy.dropout_kwargs(None) == {"deterministic": True, "rngs": None}
    assert cross_entropy.dropout_kwargs(key) == {"deterministic": False, "rngs": {"dropout": key}}
