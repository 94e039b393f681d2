"""Graceful preemption: on SIGTERM or SIGINT, a run finishes its step, saves it and exits."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: running the same command later resumes the run


class Preempted(SystemExit):
    """Raised after a run has received a signal and saved a checkpoint.

    If it is not caught, the process exits with `EXIT_STATUS`, so that a scheduler can distinguish a
    preemption from a failure.

    Attributes:
        signal_name: "SIGTERM" or "SIGINT".
        step: the step that was saved.
    """

    def __init__(self, signal_name: str, step: int):
        super().__init__(EXIT_STATUS)
        self.signal_name, self.step = signal_name, step


@contextlib.contextmanager
def catch_signals(active: bool = True) -> Iterator[Callable[[int], str | None]]:
    """Context manager that catches SIGTERM and SIGINT and yields a function `should_stop(step)`.

    `should_stop` returns the name of the received signal, or None. A second signal has its usual
    effect, because the previous handlers are restored after the first one.

    With several processes, a scheduler may send the signal to only some of them. JAX's coordination
    service then makes all processes stop at the same step; it catches SIGTERM only. In a single
    process, outside the main thread, Python cannot handle signals and `should_stop` always returns
    None.

    Args:
        active: whether to catch signals; if False, `should_stop` always returns None.

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
        # Imported here because it is slow to import and not needed by a single process.
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
