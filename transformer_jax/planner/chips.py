"""Devices to plan for: slices of TPUs that need not exist, and what is here."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from transformer_jax.planner import throughput
from transformer_jax.train import profiling


class Chip(NamedTuple):
    """What one device can do, from its maker's data sheet."""

    flops: float  # a second, in products of bfloat16
    memory: int  # bytes
    bandwidth: float  # of the memory, bytes a second
    network: float  # bytes a second that a ring along one axis of the slice moves, both ways


# cloud.google.com/tpu/docs, system architecture of each; network: two links of an axis (Austin et
# al. 2025, "How to Scale Your Model", chapter 2).
CHIPS = {
    "v4": Chip(275e12, 32 * 2**30, 1228e9, 9e10),
    "v5e": Chip(197e12, 16 * 2**30, 819e9, 9e10),
    "v5p": Chip(459e12, 95 * 2**30, 2765e9, 1.8e11),
    "v6e": Chip(918e12, 32 * 2**30, 1640e9, 1.8e11),
}


LOCAL = "here"


def chip_of(topology: str, dtype: str) -> Chip:
    """What a device of `devices_of` can do. Those that are here are measured, products in `dtype`;
    what they send each other goes through their memory."""
    if topology != LOCAL:
        return CHIPS[topology.partition(":")[0]]
    reads = throughput.memory_bandwidth()
    return Chip(throughput.matmul_flops_per_second(dtype), profiling.memory_limit(), reads, reads)


def devices_of(topology: str) -> Sequence[Any]:
    """The devices of a TPU slice that need not exist, such as "v5e:16x16", or those that are here.

    Raises:
      ValueError: there is no such slice, or the compiler is missing.
    """
    from jax.experimental import topologies

    if topology == LOCAL:
        return jax.devices()
    if topology.partition(":")[0] not in CHIPS:
        raise ValueError(f"topology {topology!r} is of no known chip; give one of "
                         f"{', '.join(CHIPS)} and its shape, such as v5e:16x16, or {LOCAL!r}")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # of many types
        raise ValueError(
            f"topology {topology!r} cannot be described: {str(error).splitlines()[0]}; it needs "
            "the TPU compiler (pip install 'transformer_jax[tpu]'), JAX_PLATFORMS=cpu and "
            "TPU_SKIP_MDS_QUERY=1 where there is no TPU, and a shape that slices have"
        ) from error
