"""Target devices: TPU slices described by their topology, and the local devices, whose rate of
matrix products and memory bandwidth are measured.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from transformer_jax.errors import did_you_mean
from transformer_jax.train import step


class Chip(NamedTuple):
    """Peak rates and memory of one device.

    Attributes:
        flops_per_second: peak rate of matrix products; in bfloat16 for the TPUs of `CHIPS`.
        memory_bytes: capacity of the device memory (HBM).
        memory_bandwidth: bytes per second between the memory and the compute units.
        interconnect_bandwidth: bytes per second that a device sends in a ring collective along one
            axis of the slice, in both directions together.
    """

    flops_per_second: float
    memory_bytes: int
    memory_bandwidth: float
    interconnect_bandwidth: float


# Rates and memory: cloud.google.com/tpu/docs, the page "system architecture" of each chip.
# Interconnect: two links per axis (Austin et al. 2025, "How to Scale Your Model", chapter 2).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 9e10),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 9e10),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1.8e11),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 1.8e11),
}

LOCAL = "local"
"""Name of the topology that consists of the devices of this process."""


def get_chip(topology: str, dtype: str) -> Chip:
    """Peak rates and memory of one device of a topology: a TPU slice such as "v5e:16x16", or
    "local".

    Rates of TPU slices come from the table `CHIPS`. Rates of the local devices are measured, with
    matrix products of `dtype`; their interconnect bandwidth is assumed to equal their memory
    bandwidth, because collectives between them copy data through memory.

    Raises:
        ValueError: the chip is not in `CHIPS`.

    Example:

        >>> get_chip("v5e:16x16", "bfloat16").memory_bytes // 2**30
        16
    """
    if topology != LOCAL:
        return CHIPS[_chip_name(topology)]
    bandwidth = memory_bandwidth()
    return Chip(matmul_flops_per_second(dtype), step.memory_limit(), bandwidth,
                bandwidth)


def _chip_name(topology: str) -> str:
    """Returns the key of `CHIPS` of a TPU slice."""
    name = topology.partition(":")[0]
    if name not in CHIPS:
        raise ValueError(f"topology {topology!r} has an unknown chip; give a chip and the shape of "
                         f"a slice, such as v5e:16x16, or {LOCAL!r} for the devices of this "
                         f"machine; {did_you_mean(name, [*CHIPS, LOCAL])}")
    return name


def get_devices(topology: str) -> Sequence[Any]:
    """Devices of a topology, as compilation targets; those of a TPU slice are available without a
    TPU.

    Raises:
        ValueError: the chip is unknown, the slice does not exist, or the TPU compiler is not
            installed.
    """
    from jax.experimental import topologies

    if topology == LOCAL:
        return jax.devices()
    _chip_name(topology)  # raises ValueError if it is unknown
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the TPU compiler raises exceptions of many types
        raise ValueError(
            f"cannot describe the topology {topology!r}: {str(error).splitlines()[0]}; check that "
            "slices have this shape, that the TPU compiler is installed (pip install "
            "'transformer_jax[tpu]') and, on a machine without TPU, that JAX_PLATFORMS=cpu and "
            "TPU_SKIP_MDS_QUERY=1 are set"
        ) from error


# Measurements of the local devices ----------------------------------------------------------------


def matmul_benchmark(
    dtype="float32", size: int | None = None
) -> tuple[Callable[[], object], float]:
    """Returns (function that multiplies two square matrices on the first device, number of FLOPs).

    Its rate is the peak rate in the definition of model FLOPs utilization (MFU). The matrices
    contain random numbers, because GPUs multiply matrices of ones faster.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x, fn = jax.random.normal(jax.random.key(0), (size, size), dtype), jax.jit(lambda x: x @ x)
    return lambda: fn(x).block_until_ready(), 2 * size**3


def memory_read_benchmark(megabytes: int | None = None) -> tuple[Callable[[], object], float]:
    """Returns (function that sums an array in the memory of the first device, number of bytes
    read).
    """
    megabytes = megabytes or (512 if jax.default_backend() == "cpu" else 4096)
    x, fn = jnp.ones((megabytes * 2**18,), jnp.float32), jax.jit(jnp.sum)
    return lambda: fn(x).block_until_ready(), x.nbytes


def measure_throughput(work: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """Measures `amount` of work per second in the fastest call of a function, within about
    `seconds`.
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
    """Measures the FLOPs per second of `matmul_benchmark`.

    Example:

        >>> matmul_flops_per_second(size=64, seconds=0.01) > 1e6
        True
    """
    return measure_throughput(*matmul_benchmark(dtype, size), seconds)


def memory_bandwidth(megabytes: int | None = None, seconds: float = 0.5) -> float:
    """Measures the bytes per second of `memory_read_benchmark`."""
    return measure_throughput(*memory_read_benchmark(megabytes), seconds)
