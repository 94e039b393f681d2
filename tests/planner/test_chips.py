"""Benchmarks of the local device give rates that a machine can have."""

from transformer_jax.planner import chips


def test_rates_are_plausible():
    assert 1e8 < chips.matmul_flops_per_second(size=256, seconds=0.05) < 1e16
    assert 1e8 < chips.memory_bandwidth(megabytes=16, seconds=0.05) < 1e14
