"""What this machine does: its matrix product, its memory, and how often it compiles."""

import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import monitoring

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Compilations:
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


def matmul_work(dtype="float32", size: int | None = None) -> tuple[Callable[[], object], float]:
    """A product of two square matrices on the first device, and its FLOPs: its rate is the peak
    that a model's is compared with. Random numbers: a GPU multiplies ones faster.

    Args:
        size: of a side; 2048 on a CPU and 8192 elsewhere if None.
    """
    size = size or (2048 if jax.default_backend() == "cpu" else 8192)
    x, fn = jax.random.normal(jax.random.key(0), (size, size), dtype), jax.jit(lambda x: x @ x)
    return lambda: fn(x).block_until_ready(), 2 * size**3


def read_work(megabytes: int | None = None) -> tuple[Callable[[], object], float]:
    """A sum that reads the memory of the first device, and its bytes: `megabytes`, 512 on a CPU and
    4096 elsewhere if None."""
    megabytes = megabytes or (512 if jax.default_backend() == "cpu" else 4096)
    x, fn = jnp.ones((megabytes * 2**18,), jnp.float32), jax.jit(jnp.sum)
    return lambda: fn(x).block_until_ready(), x.nbytes


def rate(work: Callable[[], object], amount: float, seconds: float = 0.5) -> float:
    """`amount` a second, of the fastest of as many calls of `work` as fit into `seconds`."""
    work()
    least, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        work()
        least = min(least, time.perf_counter() - start)
    return amount / least


def matmul_rate(dtype="float32", size: int | None = None, seconds: float = 0.5) -> float:
    """FLOPs a second of `matmul_work`."""
    return rate(*matmul_work(dtype, size), seconds)


def read_rate(megabytes: int | None = None, seconds: float = 0.5) -> float:
    """Bytes a second of `read_work`."""
    return rate(*read_work(megabytes), seconds)


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
