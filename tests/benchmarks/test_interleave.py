"""Interleaved workers: only one runs at a time, and the error names a worker that fails."""

import subprocess
import sys
from pathlib import Path

import interleave
import pytest

WORKER = """
import sys
sys.path.insert(0, {folder!r})
import interleave
print("a line that a library prints")
interleave.serve(lambda: bytearray(10**8), min_calls={min_calls}, trained=7)
"""


def command(program: str = WORKER, min_calls: int = 2) -> list[str]:
    folder = str(Path(interleave.__file__).parent)
    return [sys.executable, "-c", program.format(folder=folder, min_calls=min_calls)]


@pytest.mark.slow
def test_only_one_worker_runs_at_a_time(monkeypatch):
    started, states_of_others = [], []
    popen, receive = subprocess.Popen, interleave._receive

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def receive_and_check(name, process):
        if len(started) == 2:  # both are started, and the other one must be suspended
            states_of_others.extend(
                Path(f"/proc/{p.pid}/stat").read_text().rsplit(")")[1].split()[0]
                for p in started if p is not process)
        return receive(name, process)

    monkeypatch.setattr(interleave.subprocess, "Popen", start)
    monkeypatch.setattr(interleave, "_receive", receive_and_check)
    timings = interleave.run_interleaved({"a": command(), "b": command(min_calls=3)}, rounds=2)
    assert states_of_others == ["T"] * 5
    assert [[len(durations) for durations in worker.seconds] for worker in timings.values()] == [
        [2, 2], [3, 3]]
    assert all(worker.info["trained"] == 7 and worker.info["first_seconds"] > 0
               for worker in timings.values())
    assert all(worker.peak_bytes > 1e8 and worker.median > 0 for worker in timings.values())
    assert all(process.returncode is not None for process in started)


def test_ratios_by_round():
    a, b = (interleave.Timings({}, seconds) for seconds in ([[1, 1, 9], [2]], [[2], [4]]))
    assert interleave.ratios(a, b) == [0.5, 0.5]


def test_worker_that_fails_at_start_is_named():
    with pytest.raises(OSError, match=r"the worker 'b' ended with status 3; .*python"):
        interleave.run_interleaved({"a": command(), "b": command("raise SystemExit(3)")}, rounds=1)


def test_worker_that_ends_between_rounds_is_named():
    """As a process that the system kills because memory is exhausted."""
    program = WORKER.replace(
        "interleave.serve(",
        "import os, threading\nthreading.Timer(1, os._exit, [9]).start()\ninterleave.serve(")
    with pytest.raises(OSError, match="the worker 'a' ended with status 9"):
        interleave.run_interleaved({"a": command(program)}, rounds=10_000)
