"""Workers that take turns: only one runs, and one that fails is named."""

import subprocess
import sys
from pathlib import Path

import pytest
import interleave

WORKER = """
import sys
sys.path.insert(0, {folder!r})
import interleave
print("a library says hello")
interleave.serve(lambda: bytearray(10**8), times={times}, trained=7)
"""


def command(text: str = WORKER, times: int = 2) -> list[str]:
    return [sys.executable, "-c", text.format(folder=str(Path(interleave.__file__).parent), times=times)]


def test_turns_while_the_others_are_stopped(monkeypatch):
    started, others = [], []
    popen, answer = subprocess.Popen, interleave._answer

    def start(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def watched(name, process):
        if len(started) == 2:  # once both are there, the other one is stopped
            others.extend(Path(f"/proc/{p.pid}/stat").read_text().rsplit(")")[1].split()[0]
                          for p in started if p is not process)
        return answer(name, process)

    monkeypatch.setattr(interleave.subprocess, "Popen", start)
    monkeypatch.setattr(interleave, "_answer", watched)
    found = interleave.run_interleaved({"a": command(), "b": command(times=3)}, rounds=2)
    assert others == ["T"] * 5
    assert [[len(turn) for turn in side.seconds] for side in found.values()] == [[2, 2], [3, 3]]
    assert all(side.facts["trained"] == 7 and side.facts["first_seconds"] > 0
               for side in found.values())
    assert all(side.peak_bytes > 1e8 and side.median > 0 for side in found.values())
    assert all(p.returncode is not None for p in started)


def test_ratios_are_of_rounds():
    ours, theirs = (interleave.Timings({}, seconds) for seconds in ([[1, 1, 9], [2]], [[2], [4]]))
    assert interleave.ratios(ours, theirs) == [0.5, 0.5]


def test_a_worker_that_fails():
    with pytest.raises(RuntimeError, match=r"the worker 'b' ended with status 3: .*python"):
        interleave.run_interleaved({"a": command(), "b": command("raise SystemExit(3)")}, rounds=1)


def test_a_worker_that_ends_between_its_turns():
    """Such as one that the system kills for its memory."""
    ends = WORKER.replace("interleave.serve(", "import os, threading\nthreading.Timer(1, os._exit, [9])"
                          ".start()\ninterleave.serve(")
    with pytest.raises(RuntimeError, match="the worker 'a' ended with status 9"):
        interleave.run_interleaved({"a": command(ends)}, rounds=10_000)
