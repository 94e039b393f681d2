"""Benchmarks of the local devices: matrix products and memory bandwidth."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def matmul_benchmark(dtype="float32", size: int | None = None) -> tuple[Callable[[], object], float]:
    """A product of two square matrices on the first device, and its FLOPs: its rate is the peak
    that a model's is compared with. Random numbers: a GPU multiplies ones faster.

    Args:
        size: of a side; 2048 on a CPU and 8192 elsewhere if None.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x, fn = jax.random.normal(jax.random.key(0), (size, size), dtype), jax.jit(lambda x: x @ x)
    return lambda: fn(x).block_until_ready(), 2 * size**3


def memory_read_benchmark(megabytes: int | None = None) -> tuple[Callable[[], object], float]:
    """A sum that reads the memory of the first device, and its bytes: `megabytes`, 512 on a CPU and
    4096 elsewhere if None."""
    megabytes = megabytes or (512 if jax.default_backend() == "cpu" else 4096)
    x, fn = jnp.ones((megabytes * 2**18,), jnp.float32), jax.jit(jnp.sum)
    return lambda: fn(x).block_until_ready(), x.nbytes


def measure_throughput(work: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """`amount` a second, of the fastest of as many calls of `work` as fit into `seconds`."""
    work()
    least, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return amount / least


def matmul_flops_per_second(dtype="float32", size: int | None = None, seconds: float = 0.5) -> float:
    """FLOPs a second of `matmul_work`."""
    return measure_throughput(*matmul_benchmark(dtype, size), seconds)


def memory_bandwidth(megabytes: int | None = None, seconds: float = 0.5) -> float:
    """Bytes a second of `read_work`."""
    return measure_throughput(*memory_read_benchmark(megabytes), seconds)
