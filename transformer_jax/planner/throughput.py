"""Benchmarks of the local devices: rate of matrix products and memory bandwidth."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp


def matmul_benchmark(
    dtype="float32", size: int | None = None
) -> tuple[Callable[[], object], float]:
    """Benchmark of a product of two square matrices on the first device.

    Its rate is the peak rate in the definition of model FLOPs utilization (MFU). The matrices
    contain random numbers, because GPUs multiply matrices of ones faster.

    Args:
        dtype: dtype of the matrices.
        size: number of rows and columns of a matrix; if None, 2048 on a CPU and 8192 elsewhere.

    Returns:
        (function that computes the product once and waits for the result, number of FLOPs).
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x, fn = jax.random.normal(jax.random.key(0), (size, size), dtype), jax.jit(lambda x: x @ x)
    return lambda: fn(x).block_until_ready(), 2 * size**3


def memory_read_benchmark(megabytes: int | None = None) -> tuple[Callable[[], object], float]:
    """Benchmark of the sum of an array in the memory of the first device.

    Args:
        megabytes: size of the array in MiB; if None, 512 on a CPU and 4096 elsewhere.

    Returns:
        (function that computes the sum once and waits for the result, number of bytes read).
    """
    megabytes = megabytes or (512 if jax.default_backend() == "cpu" else 4096)
    x, fn = jnp.ones((megabytes * 2**18,), jnp.float32), jax.jit(jnp.sum)
    return lambda: fn(x).block_until_ready(), x.nbytes


def measure_throughput(work: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """Measures the throughput of a function: `amount` per second in its fastest call.

    Args:
        work: the function. It is called once to compile it, then repeatedly.
        amount: amount of work in one call, such as FLOPs or bytes.
        seconds: time after which no further call is started.
    """
    work()
    shortest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        start = time.perf_counter()
        work()
        shortest = min(shortest, time.perf_counter() - start)
    return amount / shortest


def matmul_flops_per_second(
    dtype="float32", size: int | None = None, seconds: float = 0.5
) -> float:
    """Measures the FLOPs per second of `matmul_benchmark` for about `seconds` seconds.

    Example:

        >>> matmul_flops_per_second(size=64, seconds=0.01) > 1e6
        True
    """
    return measure_throughput(*matmul_benchmark(dtype, size), seconds)


def memory_bandwidth(megabytes: int | None = None, seconds: float = 0.5) -> float:
    """Measures the bytes per second of `memory_read_benchmark` for about `seconds` seconds."""
    return measure_throughput(*memory_read_benchmark(megabytes), seconds)
