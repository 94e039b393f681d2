"""Training in several local processes: equal results, preemption, and the loss of a process."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from transformer_jax.train import anomalies, checkpointing

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("processes.py")


def start(out: Path, processes: int, devices: int, sizes: dict, *more) -> list[subprocess.Popen]:
    """Starts `processes.py` in several processes with several devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    variables = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                 "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, SCRIPT, str(devices), json.dumps(sizes), out, *more]
    return [subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | (variables | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}))
        for i in range(processes)]


def finish(running: list[subprocess.Popen], status: int) -> None:
    """Waits for all processes, and checks their exit status."""
    try:
        outputs = [process.communicate(timeout=240)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [p.returncode for p in running] == [status] * len(running), "\n".join(outputs)


def train(folder: Path, processes: int, devices: int, sizes: dict) -> dict:
    """Trains to the end, and returns the results."""
    out = folder / f"{processes}.json"
    finish(start(out, processes, devices, sizes), 0)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sizes", "count"), [
    (2, {"data": 2, "fsdp": 2}, 2),
    (4, {"data": 2, "sequence": 2, "tensor": 2}, 2),  # two processes hold each row
])
def test_several_processes_equal_one(tmp_path, processes, sizes, count):
    total = int(np.prod(list(sizes.values())))
    single = train(tmp_path, 1, total, sizes)
    several = train(tmp_path, processes, total // processes, sizes)
    assert (single["processes"], several["processes"]) == (1, processes)
    assert several["data_shard"] == [0, count]
    np.testing.assert_allclose(several["losses"], single["losses"], rtol=1e-5)
    np.testing.assert_allclose(several["squared_norm"], single["squared_norm"], rtol=1e-5)
    assert several["losses"][-1] < several["losses"][0]


@pytest.mark.slow
def test_when_one_process_is_signaled_all_save_the_same_step_and_exit(tmp_path):
    running = start(tmp_path / "out", 2, 1, {"data": 2}, "100000")
    try:
        for process in running:
            while (line := process.stdout.readline()) and not line.startswith("3"):  # step 3
                pass
        running[1].send_signal(signal.SIGTERM)
    finally:
        finish(running, anomalies.EXIT_STATUS)
    assert checkpointing.latest_step(tmp_path / "out.checkpoints") >= 3


@pytest.mark.slow
def test_when_one_process_is_lost_the_others_exit_and_fewer_processes_resume(tmp_path):
    out = tmp_path / "found.json"
    running = start(out, 4, 1, {"data": 4}, "100000")
    try:
        for line in running[0].stdout:
            if line.strip() == "25":
                break
        running[2].kill()
        start_time = time.monotonic()
        outputs = [process.communicate(timeout=120)[0] for process in running]
        assert time.monotonic() - start_time < 60
    finally:
        for process in running:
            process.kill()
    assert all(running[i].returncode not in (0, None) for i in (0, 1, 3))
    assert all("task 2 heartbeat timeout" in outputs[i].lower() for i in (0, 1, 3)), outputs[1]
    last_step = checkpointing.latest_step(f"{out}.checkpoints")
    assert last_step >= 10
    finish(start(out, 2, 1, {"data": 2}, str(last_step + 5)), 0)
    assert len(json.loads(out.read_text())["losses"]) == 5
