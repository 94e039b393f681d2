"""Number of XLA compilations, and memory use of the devices."""

import jax
from jax import monitoring

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


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
