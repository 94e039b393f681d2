"""Processes that take turns at the same work on one machine, so that its moods meet them alike.

A worker prepares, warms up and calls `serve`; `take_turns` starts the workers one after another and
lets one run at a time, the others stopped (SIGSTOP), because threads of some libraries spin while
they wait. Only the standard library is used: workers may live in other environments. Linux.
"""

import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_MARK = "turns:"  # before a worker's own lines; a library may print too


@dataclass
class Turns:
    """What a worker told: its facts when it was ready, and of each turn the seconds of each piece
    of work; the most bytes that its process, or its device, ever held."""

    facts: dict[str, Any]
    seconds: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        return statistics.median(s for turn in self.seconds for s in turn)


def peak_memory() -> int:
    """Bytes that this process held at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM; this needs Linux")


def serve(work: Callable[[], object], times: int = 2, seconds: float = 0.0, pieces: int = 1,
          peak: Callable[[], int] = peak_memory, **facts) -> None:
    """In a worker: says that it is ready, then, for each line it is sent, does `work` so many times
    and until so many seconds are over. A call of `work` is of so many pieces.

    The first call, which compiles, is timed as the fact "first_seconds"; another warms up.
    """
    first = timed(work)
    timed(work)
    _tell({"first_seconds": first, **facts})
    for _ in sys.stdin:
        taken = [timed(work) for _ in range(times)]
        while sum(taken) < seconds:
            taken.append(timed(work))
        _tell({"seconds": [s / pieces for s in taken], "peak_bytes": peak()})


def take_turns(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Turns]:
    """Turns of each worker by name. Ready-making is not in turns: it is one after the other.

    Raises:
        RuntimeError: a worker does not start, or ends early.
    """
    workers: dict[str, subprocess.Popen] = {}
    turns: dict[str, Turns] = {}
    try:
        for name, command in commands.items():
            workers[name] = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE)
            turns[name] = Turns(_answer(name, workers[name]))
            _stop(workers[name])
        for _ in range(rounds):
            for name, process in workers.items():
                process.send_signal(signal.SIGCONT)
                with contextlib.suppress(BrokenPipeError):  # it ended: `_answer` says so
                    process.stdin.write("go\n")
                    process.stdin.flush()
                told = _answer(name, process)
                _stop(process)
                turns[name].seconds.append(told["seconds"])
                turns[name].peak_bytes = max(turns[name].peak_bytes, told["peak_bytes"])
    finally:
        for process in workers.values():
            process.kill()
            process.communicate()
    return turns


def ratios(ours: Turns, theirs: Turns) -> list[float]:
    """Of each round, the median of ours to the median of theirs."""
    return [statistics.median(a) / statistics.median(b)
            for a, b in zip(ours.seconds, theirs.seconds)]


def timed(work: Callable[[], object]) -> float:
    """Seconds of one call."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _tell(value: dict) -> None:
    print(f"\n{_MARK}{json.dumps(value)}", flush=True)


def _answer(name: str, process: subprocess.Popen) -> dict:
    for line in process.stdout:
        if line.startswith(_MARK):
            return json.loads(line.removeprefix(_MARK))
    raise RuntimeError(f"the worker {name!r} ended with status {process.wait()}: "
                       f"{process.args[0]} has to be a Python with its packages; its own message "
                       "is above")


def _stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(ChildProcessError):  # it ended: its next answer is missed
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
