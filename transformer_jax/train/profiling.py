"""The number of XLA compilations of a run, and the memory of its devices."""

import jax
from jax import monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"


class CompilationCounter:
    """Counts what XLA compiles, or loads from the persistent cache, from when it is made. Shapes
    that change compile anew and in silence; this is how a run notices.

        compilations = Compilations()
        ...
        print(compilations.count, compilations.seconds)
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, seconds: float, **_) -> None:
        if event == _COMPILED:
            self.count += 1
            self.seconds += seconds

    def close(self) -> None:
        """Stop counting."""
        monitoring.unregister_event_duration_listener(self._hear)

    def __enter__(self) -> "Compilations":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def peak_memory() -> int | None:
    """Bytes at the most so far: of the first device where it says, of this process on a CPU; None
    where nobody says."""
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
    """Bytes that the first device lets JAX have; on a CPU, its share of those that are free."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return free_memory() or 2**63


def free_memory() -> int | None:
    """Bytes that the first local device can still give out; None where nobody says."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return 1024 * free // jax.local_device_count()
