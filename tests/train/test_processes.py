"""Several processes on the loopback train as one does; and who they are is read right."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer_jax import distributed
from transformer_jax.train import checkpointing, preemption

SCRIPT = Path(__file__).with_name("processes.py")


def start(out: Path, processes: int, devices: int, sizes: dict, *more) -> list[subprocess.Popen]:
    """So many processes of so many devices each, on their way."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    command = [sys.executable, SCRIPT, str(devices), json.dumps(sizes), out, *more]
    return [subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | (several | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}))
        for i in range(processes)]


def finish(running: list[subprocess.Popen], status: int) -> None:
    """Waits for all, which must end with this exit status."""
    try:
        said = [one.communicate(timeout=240)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert [one.returncode for one in running] == [status] * len(running), "\n".join(said)


def train(folder: Path, processes: int, devices: int, sizes: dict) -> dict:
    """What they come to."""
    out = folder / f"{processes}.json"
    finish(start(out, processes, devices, sizes), 0)
    return json.loads(out.read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "sizes", "count"), [
    (2, {"data": 2, "fsdp": 2}, 2),
    (4, {"data": 2, "sequence": 2, "tensor": 2}, 2),  # each row is on two processes
])
def test_several_processes_are_one(tmp_path, processes, sizes, count):
    total = int(np.prod(list(sizes.values())))
    alone = train(tmp_path, 1, total, sizes)
    several = train(tmp_path, processes, total // processes, sizes)
    assert (alone["processes"], several["processes"]) == (1, processes)
    assert several["share"] == [0, count]
    np.testing.assert_allclose(several["losses"], alone["losses"], rtol=1e-5)
    np.testing.assert_allclose(several["norm"], alone["norm"], rtol=1e-5)
    assert several["losses"][-1] < several["losses"][0]


@pytest.mark.slow
def test_if_one_is_asked_to_leave_all_save_the_same_step_and_leave(tmp_path):
    running = start(tmp_path / "out", 2, 1, {"data": 2}, "100000")
    try:
        for one in running:
            while (line := one.stdout.readline()) and not line.startswith("3"):  # it trains
                pass
        running[1].send_signal(signal.SIGTERM)
    finally:
        finish(running, preemption.EXIT_STATUS)
    assert checkpointing.latest_step(tmp_path / "out.checkpoints") >= 3


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}
ENVIRONMENTS = [
    ({}, None),
    (ADDRESS, None),  # for a launcher that JAX knows
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"SLURM_STEP_NUM_TASKS": "4"}, ()),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, ()),
    ({"TPU_WORKER_HOSTNAMES": "a"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, ()),
    ({"TRANSFORMER_JAX_DISTRIBUTED": "1"}, ()),
    (ADDRESS | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, ("host:1234", 3, 2)),
]


@pytest.mark.slow
def test_if_one_is_lost_the_others_leave_and_fewer_go_on(tmp_path):
    out = tmp_path / "found.json"
    running = start(out, 4, 1, {"data": 4}, "100000")
    try:
        for line in running[0].stdout:
            if line.strip() == "25":
                break
        running[2].kill()
        began = time.monotonic()
        said = [one.communicate(timeout=120)[0] for one in running]
        assert time.monotonic() - began < 60
    finally:
        for one in running:
            one.kill()
    assert all(running[i].returncode not in (0, None) for i in (0, 1, 3))
    assert all("task 2 heartbeat timeout" in said[i].lower() for i in (0, 1, 3)), said[1]
    reached = checkpointing.latest_step(f"{out}.checkpoints")
    assert reached >= 10
    finish(start(out, 2, 1, {"data": 2}, str(reached + 5)), 0)
    assert len(json.loads(out.read_text())["losses"]) == 5


@pytest.mark.parametrize(("environment", "asked"), ENVIRONMENTS, ids=str)
def test_what_started_us_says_who_we_are(monkeypatch, environment, asked):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append(args))
    assert not distributed.initialize(environment)
    assert calls == ([] if asked is None else [asked])


@pytest.mark.parametrize(("changes", "message"), [
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not; set all three"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is '2' of JAX_NUM"),
    ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "numbered from 0")])
def test_half_an_identity_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(ADDRESS | changes)
