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


def matmul_rate(dtype="float32", size: int = 2048, seconds: float = 0.5) -> float:
    """FLOPs a second of a product of two square matrices on the first device: the peak that a
    model's rate is compared with."""
    return 2 * size**3 / _least(lambda x: x @ x, jnp.ones((size, size), dtype), seconds)


def read_rate(megabytes: int = 512, seconds: float = 0.5) -> float:
    """Bytes a second at which the first device reads its memory, in a sum."""
    x = jnp.ones((megabytes * 2**18,), jnp.float32)
    return x.nbytes / _least(jnp.sum, x, seconds)


def _least(fn: Callable, x: jax.Array, seconds: float) -> float:
    """The fewest seconds that `fn(x)` took, compiled, of as many times as fit into `seconds`."""
    fn = jax.jit(fn)
    fn(x).block_until_ready()
    least, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < seconds:
        start = time.perf_counter()
        fn(x).block_until_ready()
        least = min(least, time.perf_counter() - start)
    return least


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
