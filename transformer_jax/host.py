"""The process a run lives in: its memory allocator, and where it keeps what it compiled."""

import ctypes
import hashlib
import os
import platform
from pathlib import Path

# glibc's malloc.h: parameter numbers of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1
# Device files of NVIDIA's and AMD's GPUs and of TPUs.
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """Let glibc keep freed buffers instead of giving them back to the kernel.

    On CPU, XLA allocates its temporaries anew at each step; large ones come as fresh mappings whose
    pages must be faulted in one by one. With one arena, no mmap and no trimming the same pages
    serve every step: a step of BART-base takes 0.85 of the time.

    Call it before JAX starts its backend (`jax.devices()` does, and any array): threads that are
    there already have arenas of their own, and nothing changes.

    Returns:
        True where it took effect: Linux with glibc. Elsewhere nothing happens.
    """
    if (libc := _glibc()) is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return [libc.mallopt(name, value) for name, value in settings] == [1] * len(settings)


def _glibc() -> ctypes.CDLL | None:
    """The C library of this process, if it is GNU's."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libc.so.6")


def give_back_freed_memory() -> bool:
    """Gives glibc's freed memory to the kernel now, whatever it was told to keep.

    Drawing parameters and compiling take more memory, for a moment, than they leave. What a step
    allocates is one block of temporaries, which seldom fits into a hole of theirs: without this it
    lies beside them (GPT-2: 3.0 GB at the most instead of 2.6).

    Returns:
        Whether there was any; False where the C library is another.
    """
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def will_use_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without starting it: by JAX_PLATFORMS, or because
    there is no device of another kind."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def say_devices(wanted: str | None = None) -> bool:
    """Prints the devices that are here, for the first cell of a notebook; and says loudly if they
    are not of the platform that is wanted, "tpu" or "gpu", and how to get it in Colab.

    Returns:
        False if the wanted platform is missing.
    """
    import jax

    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
          f"jax {jax.__version__}")
    if wanted is None or devices[0].platform == wanted:
        return True
    line = "!" * 88
    print(f"{line}\n!!  NO {wanted.upper()} HERE. What follows runs on the {devices[0].platform}, "
          f"slowly.\n!!  In Colab: Runtime > Change runtime type > {wanted.upper()}, then run all "
          f"cells again.\n{line}")
    return False


def compiled_folder(device_kind: str) -> Path:
    """Where programs compiled for a kind of device are kept between runs: in
    $TRANSFORMER_JAX_CACHE, or ~/.cache/transformer_jax.

    Code for a CPU may use instructions that another CPU lacks, so in a home that several machines
    share each kind has a folder of its own.
    """
    root = os.environ.get("TRANSFORMER_JAX_CACHE") or Path("~/.cache/transformer_jax").expanduser()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return Path(root) / "compiled" / f"{device_kind}-{digest}".replace(" ", "_")
