"""Inputs of a plan: a model, and the mesh and batch size of its training step."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from transformer_jax import sharding
from transformer_jax.models.config import Config


class PlanConfig(NamedTuple):
    """Model, mesh and batch size of a training step to plan.

    Attributes:
        model: the model's config.
        mesh: mesh axis -> size; see `sharding.make_mesh`.
        batch_size: number of sequences in the global batch.
        length: tokens in a sequence; for encoder-decoders, in the source and in the target.
        accumulate: number of microbatches into which the batch is split.

    Example:
        >>> from transformer_jax.models import presets
        >>> print(PlanConfig(presets.get("gpt2"), {"data": 2, "fsdp": 4}, 32, 1024))
        data 2 x fsdp 4, batch size 32, remat none
    """

    model: Config
    mesh: dict[str, int]
    batch_size: int
    length: int
    accumulate: int = 1

    def __str__(self) -> str:
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items() if size != 1)
        microbatches = f", {self.accumulate} microbatches" if self.accumulate > 1 else ""
        return (f"{axes or 'one device'}, batch size {self.batch_size}, remat {self.model.remat}"
                f"{microbatches}")


def enumerate_configs(
    model: Config,
    num_devices: int,
    *,
    meshes: dict[str, Sequence[int]],
    batch_sizes: Sequence[int] = (),
    length: int | None = None,
    remat: Sequence[str] = ("none",),
    accumulate: Sequence[int] = (1,),
) -> list[PlanConfig]:
    """Returns a config for each combination of options whose mesh has `num_devices` devices.

    Args:
        model: the model's config.
        num_devices: number of target devices.
        meshes: mesh axis -> sizes to try; at most one axis may have -1, for the remaining devices.
        batch_sizes: global batch sizes; if empty, four sequences per batch shard and microbatch.
        length: number of tokens in a sequence; the model's max_length if None.
        remat: rematerialization policies; see `Config.remat`.
        accumulate: numbers of microbatches.

    Raises:
        ValueError: no mesh has `num_devices` devices.

    Example:
        >>> from transformer_jax.models import presets
        >>> configs = enumerate_configs(
        ...     presets.get("gpt2"), 8, meshes={"data": (-1,), "fsdp": (1, 4)}, batch_sizes=(64,))
        >>> [config.mesh for config in configs]
        [{'data': 8, 'fsdp': 1}, {'data': 2, 'fsdp': 4}]
    """
    configs = []
    for sizes in itertools.product(*meshes.values()):
        known = math.prod(size for size in sizes if size != -1)
        sizes = [num_devices // known if size == -1 else size for size in sizes]
        mesh = dict(zip(meshes, sizes))
        if math.prod(sizes) != num_devices:
            continue
        num_shards = math.prod(mesh.get(axis, 1) for axis in sharding.BATCH_AXES)
        for policy, num_microbatches in itertools.product(remat, accumulate):
            configs += [
                PlanConfig(model.replace(remat=policy), mesh, batch_size,
                           length or model.max_length, num_microbatches)
                for batch_size in batch_sizes or (4 * num_shards * num_microbatches,)]
    if not configs:
        raise ValueError(f"no mesh of {meshes} has {num_devices} devices; the product of the sizes "
                         "must be the number of devices")
    return configs
