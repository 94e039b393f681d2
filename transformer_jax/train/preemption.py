"""Graceful preemption: on SIGTERM or SIGINT, a run finishes its step, saves it and exits."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: running the same command later resumes the run


class Preempted(SystemExit):
    """A run received a signal, saved a checkpoint and stopped.

    Uncaught, it ends the process with `EXIT_STATUS`, so that a scheduler can tell a preemption from
    a failure.

    Attributes:
        signal_name: "SIGTERM" or "SIGINT".
        step: the step that was saved.
    """

    def __init__(self, signal_name: str, step: int):
        super().__init__(EXIT_STATUS)
        self.signal_name, self.step = signal_name, step


@contextlib.contextmanager
def catch_signals(active: bool = True) -> Iterator[Callable[[int], str | None]]:
    """Yields `should_stop(step)`: the name of the signal that was received, or None.

    A second signal has its usual effect, because the previous handlers are restored after the
    first. A scheduler may signal only some of several processes, so there JAX's coordination
    service makes all processes stop at the same step; it handles SIGTERM only. In a thread other
    than the main thread, where Python cannot handle signals, `should_stop` always returns None.

    Args:
        active: False leaves the signal handlers unchanged.

    Example:
        >>> with catch_signals() as should_stop:
        ...     for step in range(1, 4):
        ...         if should_stop(step):
        ...             raise Preempted(should_stop(step), step)
    """
    if not active or (jax.process_count() == 1
                      and threading.current_thread() is not threading.main_thread()):
        yield lambda step: None
        return
    if jax.process_count() > 1:
        # Imported here, because it imports much that a single process does not need.
        from jax.experimental import multihost_utils

        yield lambda step: (
            "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None)
        return
    received: list[str] = []
    previous_handlers = {}

    def restore_handlers() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def handle(number, frame) -> None:
        received.append(signal.Signals(number).name)
        restore_handlers()

    for number in (signal.SIGTERM, signal.SIGINT):
        previous_handlers[number] = signal.signal(number, handle)
    try:
        yield lambda step: received[0] if received else None
    finally:
        restore_handlers()
