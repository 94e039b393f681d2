"""Interleaved timing of several processes on one machine.

The speed of a shared machine drifts, so the programs to compare are timed alternately: in each
round, every worker process runs for a short time while the others are suspended (SIGSTOP). They are
suspended because the threads of some libraries spin while they wait.

A worker process initializes, then calls `serve`; the driver calls `run_interleaved`. Only the
standard library is used, because workers may run in other Python environments. Linux only.
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

_PREFIX = "timing:"  # marks the messages of a worker; its libraries may print other lines


@dataclass
class Timings:
    """Seconds per unit of work of one worker: the durations of the calls of each round.

    `info` has what the worker reported after warm-up, including "first_seconds".
    """

    info: dict[str, Any]
    seconds: list[list[float]] = field(default_factory=list)
    peak_bytes: int = 0

    @property
    def median(self) -> float:
        """Median seconds per unit of work, over all rounds."""
        return statistics.median(s for durations in self.seconds for s in durations)


def peak_memory() -> int:
    """Returns the peak resident memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    raise OSError("/proc/self/status has no VmHWM; run this benchmark on Linux")


def serve(
    work: Callable[[], object], *, min_calls: int = 2, min_seconds: float = 0.0,
    units_per_call: int = 1, peak_bytes: Callable[[], int] = peak_memory, **info: Any,
) -> None:
    """Runs a worker: warms up, then times a round for each line on standard input.

    A call of `work` must block until it is done. The duration of the first, which includes
    compilation, is reported as "first_seconds", and the second is not. A round has at least
    `min_calls` calls and `min_seconds`; `info` is reported as it is.
    """
    first_seconds = time_call(work)
    time_call(work)
    _send({"first_seconds": first_seconds, **info})
    for _ in sys.stdin:
        durations = [time_call(work) for _ in range(min_calls)]
        while sum(durations) < min_seconds:
            durations.append(time_call(work))
        _send({"seconds": [s / units_per_call for s in durations], "peak_bytes": peak_bytes()})


def run_interleaved(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, Timings]:
    """Starts the workers (name -> command line), then times them in interleaved rounds."""
    workers: dict[str, subprocess.Popen] = {}
    timings: dict[str, Timings] = {}
    try:
        for name, command in commands.items():
            workers[name] = subprocess.Popen(command, text=True, stdin=subprocess.PIPE,
                                             stdout=subprocess.PIPE)
            timings[name] = Timings(_receive(name, workers[name]))
            _suspend(workers[name])
        for _ in range(rounds):
            for name, process in workers.items():
                process.send_signal(signal.SIGCONT)
                with contextlib.suppress(BrokenPipeError):  # it has exited; `_receive` raises
                    process.stdin.write("go\n")
                    process.stdin.flush()
                message = _receive(name, process)
                _suspend(process)
                timings[name].seconds.append(message["seconds"])
                timings[name].peak_bytes = max(timings[name].peak_bytes, message["peak_bytes"])
    finally:
        for process in workers.values():
            process.kill()
            process.communicate()
    return timings


def ratios(measured: Timings, reference: Timings) -> list[float]:
    """Returns the median duration of a worker divided by that of a reference, for each round.

    Example:
        >>> ratios(Timings({}, [[1.0], [3.0]]), Timings({}, [[2.0], [4.0]]))
        [0.5, 0.75]
    """
    return [statistics.median(a) / statistics.median(b)
            for a, b in zip(measured.seconds, reference.seconds)]


def time_call(work: Callable[[], object]) -> float:
    """Returns the duration of one call, in seconds."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _send(message: dict) -> None:
    """Sends a message from a worker to the driver."""
    print(f"\n{_PREFIX}{json.dumps(message)}", flush=True)


def _receive(name: str, process: subprocess.Popen) -> dict:
    """Returns the next message of a worker."""
    for line in process.stdout:
        if line.startswith(_PREFIX):
            return json.loads(line.removeprefix(_PREFIX))
    raise ChildProcessError(
        f"the worker {name!r} ended with status {process.wait()}; its error is printed above. "
        f"{process.args[0]} must be a Python interpreter with the packages that the worker needs")


def _suspend(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGSTOP)
    with contextlib.suppress(ChildProcessError):  # it has exited; the next `_receive` raises
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
