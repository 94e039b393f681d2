"""Process set-up: hosts, devices, the memory allocator and the compilation cache."""

import ctypes
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is lost: the others end, with its number. A step
may last longer; what counts is that the process lives."""

FORCE = "TRANSFORMER_JAX_DISTRIBUTED"  # 1: let JAX find out, whatever is set


def initialize(environment: Mapping[str, str] = os.environ, timeout_seconds: int = 300) -> bool:
    """Makes this process one of several where its environment says that it is.

    Call it before anything else of JAX. By hand, every process gets `JAX_COORDINATOR_ADDRESS`
    (host:port of the first), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. What Slurm's srun, Open MPI,
    GKE and multislice set is recognised and given to `jax.distributed.initialize`, which knows
    them. Cloud TPU VMs set nothing: there, `TRANSFORMER_JAX_DISTRIBUTED=1`.

    Args:
      timeout_seconds: how long the first waits for the others; then it says who is missing.

    Returns:
      True if there are several processes.

    Raises:
      ValueError: one of the three variables is missing or is no number.
    """
    import jax

    by_hand = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in by_hand if name in environment]
    if "JAX_NUM_PROCESSES" in given or "JAX_PROCESS_ID" in given:
        if len(given) < len(by_hand):
            missing = ", ".join(name for name in by_hand if name not in given)
            raise ValueError(f"{', '.join(given)} is set and {missing} is not; set all three, or "
                             "none for a single process")
        address, count, process = (environment[name] for name in by_hand)
        if not (count.isdigit() and process.isdigit() and int(process) < int(count)):
            raise ValueError(f"JAX_PROCESS_ID is {process!r} of JAX_NUM_PROCESSES {count!r}; "
                             "processes are numbered from 0 up to their number, less one")
        jax.distributed.initialize(address, int(count), int(process),
                                   initialization_timeout=timeout_seconds,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    elif environment.get(FORCE) == "1" or _many(environment):
        jax.distributed.initialize(initialization_timeout=timeout_seconds,
                                   heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    return jax.process_count() > 1


def _many(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started more than one process."""
    counts = [environment.get(name, "1") for name in
              ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return (any(count.isdigit() and int(count) > 1 for count in counts) or "," in hosts
            or "MEGASCALE_COORDINATOR_ADDRESS" in environment)


# glibc's malloc.h: parameter numbers of mallopt.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1
# Device files of NVIDIA's and AMD's GPUs and of TPUs.
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")


def configure_malloc() -> bool:
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


def malloc_trim() -> bool:
    """Gives glibc's freed memory to the kernel now, whatever it was told to keep.

    Drawing parameters and compiling take more memory, for a moment, than they leave. What a step
    allocates is one block of temporaries, which seldom fits into a hole of theirs: without this it
    lies beside them (GPT-2: 3.0 GB at the most instead of 2.6).

    Returns:
        Whether there was any; False where the C library is another.
    """
    libc = _glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def platform_is_cpu() -> bool:
    """Whether JAX will compute on the CPU, told without starting it: by JAX_PLATFORMS, or because
    there is no device of another kind."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def print_devices(wanted: str | None = None) -> bool:
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


def compilation_cache_dir(device_kind: str) -> Path:
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
