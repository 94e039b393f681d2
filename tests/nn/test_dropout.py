"""Dropout masks have the given rate, are independent, and do not depend on the sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax import sharding
from transformer_jax.nn.dropout import Dropout, dropout, keep_mask

SHAPE = (64, 32, 128)
N = float(np.prod(SHAPE))


def sample_mask(seed: int, rate: float = 0.5, shape=SHAPE) -> np.ndarray:
    return np.asarray(keep_mask(jax.random.key(seed), shape, rate))


@pytest.mark.parametrize("rate", [0.001, 0.1, 0.5, 0.9])
def test_rate(rate):
    """The rate is within five standard deviations, overall and for every index of each axis."""
    kept = sample_mask(0, rate)
    for axes in [(0, 1, 2), (0, 1), (0, 2), (1, 2)]:
        count = N / np.prod([SHAPE[a] for a in range(3) if a not in axes])
        assert np.abs(kept.mean(axes) - (1 - rate)).max() < 5 * np.sqrt(rate * (1 - rate) / count)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a - a.mean()) * (b - b.mean())) / (a.std() * b.std()))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 16])
def test_neighboring_elements_are_independent(axis, lag):
    kept = sample_mask(3).astype(float)
    a, b = (np.take(kept, range(*s), axis) for s in (
        (0, SHAPE[axis] - lag), (lag, SHAPE[axis])))
    assert abs(correlation(a, b)) < 5 / np.sqrt(a.size)


def test_masks_of_related_keys_are_independent():
    """The keys of steps and layers are derived from one another by `fold_in`."""
    key = jax.random.key(0)
    masks = [np.asarray(keep_mask(jax.random.fold_in(key, i), SHAPE, 0.5)).astype(float)
             for i in range(6)]
    for i in range(6):
        for j in range(i):
            assert abs(correlation(masks[i], masks[j])) < 5 / np.sqrt(N)


def test_patterns_of_eight_elements_are_uniform():
    """Chi-squared statistic of the 256 patterns; the probability of 330 is 0.001."""
    patterns = np.packbits(sample_mask(5).reshape(-1, 8), axis=1)[:, 0]
    counts = np.bincount(patterns, minlength=256)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 330


def test_masks_are_the_same_under_jit_and_on_a_mesh():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    x = jnp.ones(SHAPE)
    sharded = jax.device_put(x, NamedSharding(mesh, P("data", None, "fsdp")))
    run = jax.jit(lambda x, key: dropout(x, 0.3, key))
    expected = dropout(x, 0.3, jax.random.key(1))
    np.testing.assert_array_equal(run(x, jax.random.key(1)), expected)
    np.testing.assert_array_equal(run(sharded, jax.random.key(1)), expected)


def test_values_and_gradients():
    x = jnp.arange(1.0, 1001.0)
    y, vjp = jax.vjp(lambda x: dropout(x, 0.25, jax.random.key(0)), x)
    kept = np.asarray(keep_mask(jax.random.key(0), x.shape, 0.25))
    np.testing.assert_allclose(y, np.where(kept, x / 0.75, 0), rtol=1e-6)
    np.testing.assert_allclose(vjp(jnp.ones_like(x))[0], kept / 0.75, rtol=1e-6)


def test_module():
    x = jnp.ones((4, 4))
    module, key = Dropout(0.5), {"dropout": jax.random.key(0)}
    assert module.apply({}, x, deterministic=True) is x
    assert Dropout(0.0).apply({}, x, deterministic=False) is x
    assert set(np.unique(module.apply({}, x, deterministic=False, rngs=key))) == {0.0, 2.0}
