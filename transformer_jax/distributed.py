"""Several processes as one: who they are is said by what started them."""

import os
from collections.abc import Mapping

import jax

HEARTBEAT_SECONDS = 30
"""A process that has not been heard of for so long is lost: the others end, with its number. A step
may last longer; what counts is that the process lives."""

FORCE = "TRANSFORMER_JAX_DISTRIBUTED"  # 1: let JAX find out, whatever is set


def join(environment: Mapping[str, str] = os.environ, timeout_seconds: int = 300) -> bool:
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
