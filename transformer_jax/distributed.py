"""Process setup: multi-process initialization, devices, the compilation cache and the allocator.

JAX is imported inside functions, so that this module can configure the process before JAX starts.
"""

import ctypes
import hashlib
import os
import platform
from collections.abc import Mapping
from pathlib import Path

HEARTBEAT_TIMEOUT_SECONDS = 30
"""A process that sends no heartbeat for this long is considered lost: the other processes end with
an error that names it. Steps may take longer, because heartbeats do not depend on steps."""

FORCE_VARIABLE = "TRANSFORMER_JAX_DISTRIBUTED"  # "1": always let JAX detect the cluster

# Device files of NVIDIA GPUs, AMD GPUs and TPUs.
_ACCELERATORS = ("nvidia[0-9]*", "kfd", "accel*", "vfio/[0-9]*")

# Parameter numbers of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_MAX_THRESHOLD = 2**31 - 1  # never trim


# Processes and devices ----------------------------------------------------------------------------


def initialize(environment: Mapping[str, str] = os.environ, timeout_seconds: int = 300) -> bool:
    """Initializes JAX for several processes, if environment variables describe a multi-process run.

    Call it before any other JAX function. To start processes manually, set
    `JAX_COORDINATOR_ADDRESS` (host:port of the first process), `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID` for each. Slurm's srun, Open MPI, GKE and multislice TPUs are detected by their
    own variables, and `jax.distributed.initialize` gets the addresses from them. Cloud TPU VMs set
    none of these variables: set `TRANSFORMER_JAX_DISTRIBUTED=1` there.

    Args:
        environment: environment variables.
        timeout_seconds: how long the first process waits for the others. After that, it fails with
            an error that names the missing processes.

    Returns:
        Whether there are several processes.

    Raises:
        ValueError: only some of the three variables are set, or one has an invalid value.
    """
    import jax

    variables = ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]
    given = [name for name in variables if name in environment]
    detect = environment.get(FORCE_VARIABLE) == "1" or _has_multiple_processes(environment)
    if given and not (detect and given == variables[:1]):  # JAX itself reads the address
        if len(given) < len(variables):
            missing = ", ".join(name for name in variables if name not in given)
            raise ValueError(f"{', '.join(given)} is set, but {missing} is not; set all three, or "
                             "none for a single process; with a launcher that JAX detects, set "
                             f"{FORCE_VARIABLE}=1 and at most JAX_COORDINATOR_ADDRESS")
        address, count, process = (environment[name] for name in variables)
        if not (count.isdigit() and process.isdigit() and int(process) < int(count)):
            raise ValueError(f"JAX_PROCESS_ID is {process!r} and JAX_NUM_PROCESSES is {count!r}; "
                             "processes are numbered from 0 to JAX_NUM_PROCESSES - 1")
        jax.distributed.initialize(address, int(count), int(process),
                                   initialization_timeout=timeout_seconds,
                                   heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS)
    elif detect:
        jax.distributed.initialize(initialization_timeout=timeout_seconds,
                                   heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_SECONDS)
    return jax.process_count() > 1


def _has_multiple_processes(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX supports has started more than one process.

    JAX finds the addresses, but does not decide whether to initialize: its detection would wait for
    other processes in a Slurm batch script that starts only one, would query a metadata server on
    every TPU machine, and is an error once a backend has started, as in a notebook.
    """
    counts = [environment.get(name, "1") for name in
              ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES", ""))
    return (any(count.isdigit() and int(count) > 1 for count in counts) or "," in hosts
            or "MEGASCALE_COORDINATOR_ADDRESS" in environment)


def platform_is_cpu() -> bool:
    """Whether JAX will use the CPU, determined without starting JAX.

    True if the first platform in JAX_PLATFORMS is the CPU or, if that variable is not set, if the
    machine has no GPU and no TPU.
    """
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.split(",")[0] == "cpu"
    return not any(any(Path("/dev").glob(name)) for name in _ACCELERATORS)


def print_devices(wanted: str | None = None) -> bool:
    """Prints the devices, and returns whether their platform is `wanted`: "tpu", "gpu" or None for
    any.

    For the first cell of a notebook: a warning explains how to select the platform in Colab.
    """
    import jax

    devices = jax.devices()
    print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), "
          f"jax {jax.__version__}")
    if wanted is None or devices[0].platform == wanted:
        return True
    line = "!" * 88
    print(f"{line}\n!!  NO {wanted.upper()} FOUND. The code will run on the "
          f"{devices[0].platform}, slowly.\n!!  In Colab: Runtime > Change runtime type > "
          f"{wanted.upper()}, then run all cells again.\n{line}")
    return False


def compilation_cache_dir(device_kind: str) -> Path:
    """Returns the directory of the persistent compilation cache, in $TRANSFORMER_JAX_CACHE.

    Its name depends on the instruction set of the CPU, because a home directory may be shared by
    machines with different CPUs, and code compiled for one may crash on another.

    Example:
        >>> compilation_cache_dir("TPU v5 lite").name.rsplit("-", 1)[0]
        'TPU_v5_lite'
    """
    root = os.environ.get("TRANSFORMER_JAX_CACHE") or Path("~/.cache/transformer_jax").expanduser()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    digest = hashlib.sha256(features.encode()).hexdigest()[:8]
    return Path(root) / "compiled" / f"{device_kind}-{digest}".replace(" ", "_")


# Memory allocator ---------------------------------------------------------------------------------


def configure_malloc() -> bool:
    """Configures glibc to keep freed memory; returns False if the C library is not glibc.

    On a CPU, XLA allocates its temporary buffers at each step. By default, glibc gets large buffers
    from the kernel each time, with a page fault for each page. With a single arena, without mmap
    and without trimming, the pages are reused, and a step of BART-base takes 15 % less time. Call
    it before JAX starts its backend, because threads that exist already have their own arenas.
    """
    if (libc := _load_glibc()) is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _MAX_THRESHOLD), (_M_ARENA_MAX, 1))
    return [libc.mallopt(name, value) for name, value in settings] == [1] * len(settings)


def malloc_trim() -> bool:
    """Makes glibc return its freed memory to the kernel, once; False if the C library is not glibc.

    Initialization and compilation free regions into which the temporary buffers of a step, one
    block, rarely fit. Without trimming they stay resident (GPT-2: a peak of 3.0 GB instead of 2.6).
    """
    libc = _load_glibc()
    return libc is not None and bool(libc.malloc_trim(0))


def _load_glibc() -> ctypes.CDLL | None:
    """Returns the C library of this process if it is glibc, and None otherwise."""
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL("libc.so.6")
