"""What is measured of this machine is what happened, within what a machine can be."""

import jax
import jax.numpy as jnp

from transformer_jax.planner import throughput
from transformer_jax.train import profiling


def test_compilations_are_counted_and_repetitions_are_not():
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


def test_rates_are_those_of_a_machine():
    assert 1e8 < throughput.matmul_flops_per_second(size=256, seconds=0.05) < 1e16
    assert 1e8 < throughput.memory_bandwidth(megabytes=16, seconds=0.05) < 1e14


def test_memory():
    before = profiling.peak_memory()
    x = jax.device_put(jnp.ones((64, 2**20), jnp.float32))
    x.block_until_ready()
    assert profiling.peak_memory() >= max(before, x.nbytes)
