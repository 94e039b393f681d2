"""Sums, weights and their quotient on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.objectives import losses

# Probabilities 1/4 and 3/4; and 1/2 and 1/2.
LOGITS = jnp.log(jnp.asarray([[1.0, 3.0], [5.0, 5.0]]))


def test_cross_entropy_in_nats():
    values = losses.cross_entropy(LOGITS, np.array([0, 1]))
    np.testing.assert_allclose(values, [np.log(4), np.log(2)], rtol=1e-6)


def test_cross_entropy_of_extreme_logits_is_finite():
    def total(logits):
        return losses.cross_entropy(logits, jnp.asarray([0, 1])).sum()

    value, gradient = jax.value_and_grad(total)(jnp.asarray([[1e4, -1e4], [1e4, -1e4]]))
    assert value == 2e4
    assert gradient.tolist() == [[0, 0], [1, -1]]


def test_cross_entropy_of_bfloat16_is_float32():
    values = losses.cross_entropy(jnp.zeros((1, 1000), jnp.bfloat16), np.array([3]))
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, np.log(1000), rtol=1e-6)


def test_correct():
    assert losses.correct(LOGITS, np.array([1, 1])).tolist() == [1, 0]  # of equals, the first


def test_weighted():
    total, weight = losses.weighted(jnp.asarray([2.0, 3.0, 50.0]), jnp.asarray([1, 2, 0]))
    assert (float(total), float(weight)) == (8, 3)
    assert weight.dtype == jnp.float32


def test_mean_divides_each_term_once_and_adds():
    assert losses.mean(jnp.float32(6), jnp.float32(4)) == 1.5
    terms = {"mlm": jnp.float32(6), "nsp": jnp.float32(1)}
    assert losses.mean(terms, {"mlm": jnp.float32(4), "nsp": jnp.float32(2)}) == 2.0


def test_a_term_without_weight_counts_nothing_even_in_the_gradient():
    def loss(x):
        return losses.mean({"a": 3 * x, "b": 0 * x}, {"a": jnp.float32(2), "b": jnp.float32(0)})

    value, gradient = jax.value_and_grad(loss)(jnp.float32(4))
    assert (value, gradient) == (6, 1.5)


def test_dropout_options():
    key = jax.random.key(0)
    assert losses.dropout(None) == {"deterministic": True, "rngs": None}
    assert losses.dropout(key) == {"deterministic": False, "rngs": {"dropout": key}}
