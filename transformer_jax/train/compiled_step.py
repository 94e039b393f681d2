"""Compiled train steps, the number of XLA compilations, and the memory use of the devices."""

from collections.abc import Callable
from typing import Any

import jax
from jax import monitoring
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax import distributed
from transformer_jax.tree import PyTree

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
GIB = 2**30


class CompiledStep:
    """Compiles `train_step(state, batch, rng, ...)`, with the state donated.

    Each new batch shape is compiled at its first call. On a mesh, the returned state has the
    shardings of `state`; without this constraint, XLA could choose other shardings.

    Args:
        train_step: a function that returns (state, metrics).
        state: the initial state, for its shardings.
        mesh: the device mesh; None if the state is on one device.

    Raises:
        ValueError: a step needs more memory than is free. Raised by the call that compiles it.

    Example:
        >>> import jax.numpy as jnp
        >>> def train_step(state, batch, rng):
        ...     return state + batch["x"].sum(), {"loss": jnp.float32(0.0)}
        >>> step = CompiledStep(train_step, jnp.float32(0.0), mesh=None)
        >>> state, metrics = step(jnp.float32(0.0), {"x": jnp.ones(3)}, None)
        >>> float(state)
        3.0
    """

    def __init__(self, train_step: Callable, state: PyTree, mesh: Mesh | None):
        options = {}
        if mesh is not None:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            options = {"out_shardings": (shardings, NamedSharding(mesh, P()))}
        self._step = jax.jit(train_step, donate_argnums=0, **options)
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, state: PyTree, batch: PyTree, *args) -> tuple[PyTree, dict[str, jax.Array]]:
        """Runs one step, and compiles it first if the shape of the batch is new."""
        leaves, structure = jax.tree.flatten(batch)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._compiled:
            compiled = self._step.lower(state, batch, *args).compile()
            distributed.malloc_trim()
            check_memory(compiled.memory_analysis(), free_memory())
            self._compiled[key] = compiled
        return self._compiled[key](state, batch, *args)


def check_memory(analysis: Any, free: int | None) -> None:
    """Raises ValueError if a compiled step needs more memory than is free.

    Args:
        analysis: from `compiled.memory_analysis()`, or None if the backend does not provide one.
            The arguments of the step are not counted, because they are in memory already.
        free: free memory in bytes, or None if unknown.
    """
    if analysis is None or free is None:
        return
    needed = analysis.temp_size_in_bytes + max(
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    if needed > free:
        raise ValueError(
            f"a step needs {needed / GIB:.2f} GiB in addition to the "
            f"{analysis.argument_size_in_bytes / GIB:.2f} GiB of parameters, optimizer state and "
            f"batch, and {free / GIB:.2f} GiB are free; use a smaller batch_size, more "
            "microbatches (accumulate), remat='full', a 16-bit dtype, or more devices (mesh.fsdp)")


class CompilationCounter:
    """Counts XLA compilations, and programs loaded from the persistent compilation cache.

    JAX silently recompiles a function for arguments of new shapes; this counter detects it.
    Counting starts when the counter is created, and ends with `close` or the `with` block.

    Attributes:
        count: the number of compilations so far.
        seconds: the total compilation time.

    Example:
        >>> import jax.numpy as jnp
        >>> double, x = jax.jit(lambda x: 2 * x), jnp.ones(3)
        >>> with CompilationCounter() as compilations:
        ...     _ = double(x), double(x)
        >>> compilations.count
        1
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += seconds

    def close(self) -> None:
        """Stops counting."""
        monitoring.unregister_event_duration_listener(self._on_event)

    def __enter__(self) -> "CompilationCounter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def peak_memory() -> int | None:
    """Returns the peak memory use of the first device in bytes.

    On a CPU, it is the peak memory use of this process. None if the platform does not report it.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        with open("/proc/self/status") as status:
            found = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        return int(found[0]) * 1024
    except (OSError, IndexError):
        return None


def memory_limit() -> int:
    """Returns the bytes that JAX can allocate on the first device.

    On a CPU, it is `free_memory()`. 2**63 if the platform does not report it.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return free_memory() or 2**63


def free_memory() -> int | None:
    """Returns the free memory of the first local device in bytes.

    The free memory of a host is divided equally among its CPU devices. None if the platform does
    not report it.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return 1024 * free // jax.local_device_count()
