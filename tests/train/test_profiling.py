"""Counts of compilations, and peak memory."""

import jax
import jax.numpy as jnp

from transformer_jax.train import profiling


def test_compilations_are_counted_and_repeated_calls_are_not():
    with profiling.CompilationCounter() as compilations:
        f = jax.jit(lambda x: x * 3 + 1)
        f(jnp.ones(3)).block_until_ready()
        first = compilations.count
        f(jnp.ones(3)).block_until_ready()
        assert compilations.count == first >= 1 and compilations.seconds > 0
        f(jnp.ones(4)).block_until_ready()
        assert compilations.count > first
        last = compilations.count
    jax.jit(lambda x: x * 5)(jnp.ones(7)).block_until_ready()
    assert compilations.count == last


def test_peak_memory_is_at_least_the_size_of_the_arrays():
    before = profiling.peak_memory()
    x = jax.device_put(jnp.ones((64, 2**20), jnp.float32))
    x.block_until_ready()
    assert profiling.peak_memory() >= max(before, x.nbytes)
