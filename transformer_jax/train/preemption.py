"""Leaving when asked to: SIGTERM and SIGINT end a run after the step at hand, once it is saved."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: the same command, later, goes on


class Preempted(SystemExit):
    """A run was asked to end, and has saved itself at `step`. Uncaught, it ends the process with
    `EXIT_STATUS`, which tells a scheduler from a failure."""

    def __init__(self, signal_name: str, step: int):
        super().__init__(EXIT_STATUS)
        self.signal_name, self.step = signal_name, step


@contextlib.contextmanager
def catch_signals(active: bool = True) -> Iterator[Callable[[int], str | None]]:
    """Yields `asked(step)`: the name of the signal that asked the run to end, or None.

    A second signal acts as it would have without this. With several processes, of which a scheduler
    may tell one before the other, JAX's coordinator makes them all agree on a step; it listens to
    SIGTERM alone. Outside the main thread, where Python takes no signals, nobody is ever asked.
    """
    if not active or (jax.process_count() == 1
                      and threading.current_thread() is not threading.main_thread()):
        yield lambda step: None
        return
    if jax.process_count() > 1:
        # Imported here: it brings in much that a single process never needs.
        from jax.experimental import multihost_utils

        yield lambda step: (
            "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None)
        return
    heard: list[str] = []
    before = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def hear(number, frame) -> None:
        heard.append(signal.Signals(number).name)
        restore()

    for number in (signal.SIGTERM, signal.SIGINT):
        before[number] = signal.signal(number, hear)
    try:
        yield lambda step: heard[0] if heard else None
    finally:
        restore()
