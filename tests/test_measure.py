"""What is measured of this machine is what happened, within what a machine can be."""

import jax
import jax.numpy as jnp

from transformer_jax import measure


def test_compilations_are_counted_and_repetitions_are_not():
    with measure.Compilations() as compilations:
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


def test_rates_are_those_of_a_machine():
    assert 1e8 < measure.matmul_rate(size=256, seconds=0.05) < 1e16
    assert 1e8 < measure.read_rate(megabytes=16, seconds=0.05) < 1e14


def test_memory():
    before = measure.peak_memory()
    x = jax.device_put(jnp.ones((64, 2**20), jnp.float32))
    x.block_until_ready()
    assert measure.peak_memory() >= max(before, x.nbytes)
