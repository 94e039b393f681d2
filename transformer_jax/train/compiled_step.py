"""The training step, compiled for each shape of batch, and refused where memory cannot hold it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax import distributed
from transformer_jax.train import profiling
from transformer_jax.tree import PyTree

GIB = 2**30


class CompiledStep:
    """`step(state, batch, rng, ...)`, its first argument donated.

    On a mesh the state stays where it is, or XLA might move it at each step.

    Raises:
      ValueError: when a shape is compiled: the step needs more memory than is free.
    """

    def __init__(self, train_step: Callable, state: PyTree, mesh: Mesh | None):
        where = {}
        if mesh is not None:
            places = jax.tree.map(lambda x: x.sharding, state)
            where = {"out_shardings": (places, NamedSharding(mesh, P()))}
        self._step = jax.jit(train_step, donate_argnums=0, **where)
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, state: PyTree, batch: PyTree, *more) -> tuple[PyTree, dict[str, jax.Array]]:
        leaves, structure = jax.tree.flatten(batch)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._compiled:
            compiled = self._step.lower(state, batch, *more).compile()
            distributed.malloc_trim()
            check_memory(compiled.memory_analysis(), profiling.free_memory())
            self._compiled[key] = compiled
        return self._compiled[key](state, batch, *more)


def check_memory(program: Any, free: int | None) -> None:
    """`program` is of `compiled.memory_analysis()`; what is given to it is in memory already."""
    if program is None or free is None:
        return
    new = program.temp_size_in_bytes + max(
        program.output_size_in_bytes - program.alias_size_in_bytes, 0)
    if new > free:
        raise ValueError(
            f"a step needs {new / GIB:.2f} GiB beside the "
            f"{program.argument_size_in_bytes / GIB:.2f} of parameters, optimizer state and batch, "
            f"and {free / GIB:.2f} are free; use a smaller batch_size or more microbatches "
            "(accumulate), remat full, a dtype of 16 bits, or more devices (mesh.fsdp)")
