"""Reliability trial: runs killed at random moments and resumed, compared with uninterrupted runs.

    python tests/endurance/kills.py --kills 50
    python tests/endurance/kills.py --kills 12 --devices 1 2 4 8      # another number at each start
    python tests/endurance/kills.py --kills 12 --processes 1 2 4      # likewise of processes

There are two runs of a tiny GPT: pre-training, and fine-tuning with LoRA. Each process writes the
rows of its batches to a journal, and the first process writes the losses. At the end the final
parameters, and the rows and the loss of every step, are compared with those of the uninterrupted
run, and the rows of each epoch with all rows. Hardware: two CPU cores take about six seconds a
kill.
"""

import argparse
import functools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUM_ROWS, BATCH_SIZE, NUM_STEPS, SAVE_EVERY = 200, 8, 400, 10
MODES = ("pretrain", "lora:2:all")
# LoRA on a random base learns little. At 1e-2 training is chaotic: a relative change of 1e-7 in the
# initial parameters changes the losses by 1e-3 after 200 steps, on one device too.
PEAK_LRS = {"pretrain": 1e-2, "lora:2:all": 3e-3}


class NumberedRows:
    """A data source whose rows contain their row number."""

    def __len__(self):
        return NUM_ROWS

    def take(self, rows):
        ids = (np.asarray(rows)[:, None] * 3 + 7 * np.arange(9) ** 2) % 40
        return {"tokens": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32),
                "weights": np.ones((len(ids), 8), np.float32),
                "row": np.asarray(rows, np.int32)}


class Journal:
    """An iterator of batches that appends the rows of each batch to a file."""

    def __init__(self, batches: Any, path: Path, process_count: int):
        self.batches, self.step, self.process_count = batches, 0, process_count
        self.file = path.open("a")

    def __next__(self):
        batch = next(self.batches)
        self.step += 1
        entry = [self.step, self.process_count, batch["row"].tolist()]
        self.file.write(json.dumps(entry) + "\n")
        self.file.flush()
        return batch

    def get_state(self):
        return {"step": self.step, "batches": self.batches.get_state()}

    def set_state(self, state):
        self.step = state["step"]
        self.batches.set_state(state["batches"])


def train(mode: str, num_devices: int, folder: Path) -> None:
    """Trains in this process, one of one or several; resumes if the folder has a checkpoint.

    Args:
        mode: "pretrain" or a trainable spec.
        num_devices: number of devices of this process.
        folder: folder of the run.
    """
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", num_devices)
    from transformer_jax import distributed

    distributed.initialize()
    process_index, process_count = jax.process_index(), jax.process_count()
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from transformer_jax import sharding
    from transformer_jax.data import batching
    from transformer_jax.finetuning import peft
    from transformer_jax.models import GPTConfig, build_model, init_params
    from transformer_jax.objectives import causal_lm
    from transformer_jax.train import Checkpointer, Logging, loop, optimizers, step

    model = build_model(GPTConfig(
        vocab_size=40, max_length=8, num_layers=2, d_model=16, num_heads=2, mlp_dim=32,
        dropout_rate=0.1, attention_dropout_rate=0.0, norm_first=True))
    params, mask = init_params(model, jax.random.key(0)), None
    if mode != "pretrain":
        params, mask = peft.add_and_mask(params, mode, jax.random.key(5))
    schedule = optimizers.make_schedule("cosine", PEAK_LRS[mode], NUM_STEPS, 20)
    optimizer = optimizers.make_optimizer(
        schedule, finetuning=optimizers.FinetuningOptions(ema=0.9))
    losses = (folder / ("losses.jsonl" if process_index == 0 else os.devnull)).open("a")

    def log(row):
        losses.write(json.dumps([row["step"], row["loss"]]) + "\n")
        losses.flush()
        print(row["step"], flush=True)
        time.sleep(0.002)  # otherwise steps are too short for a kill to interrupt one

    num_shards = num_devices * process_count
    mesh = sharding.make_mesh(num_shards) if num_shards > 1 else None
    batches = batching.make_loader(
        NumberedRows(), BATCH_SIZE, seed=3, process_index=process_index,
        process_count=process_count)
    state, _ = loop.fit(
        step.init_state(params, optimizer, mask),
        step.make_train_step(functools.partial(causal_lm.loss, model.apply), optimizer, mask),
        Journal(batches, folder / f"rows_{process_index}.jsonl", process_count),
        rng=jax.random.key(1), num_steps=NUM_STEPS, mesh=mesh,
        checkpoint=Checkpointer(folder / "checkpoints", save_every=SAVE_EVERY,
                                metadata={"mode": mode, "steps": NUM_STEPS}),
        callbacks=[Logging(every=1), log])
    if process_index == 0:
        leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
        np.savez(folder / "unfinished.npz", **leaves)
        (folder / "unfinished.npz").replace(folder / "final.npz")


def start_run(
    mode: str, num_devices: int, folder: Path, num_processes: int = 1
) -> list[subprocess.Popen]:
    """Starts the processes of a run, each with `num_devices` devices."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def environment(process_id: int) -> dict[str, str]:
        if num_processes == 1:
            return dict(os.environ)
        return os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(num_processes), "JAX_PROCESS_ID": str(process_id)}

    return [subprocess.Popen(
        [sys.executable, __file__, "--run", mode, str(num_devices), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(i))
        for i in range(num_processes)]


def wait_for_success(processes: Sequence[subprocess.Popen], name: str) -> None:
    """Waits for all processes of a run.

    Raises:
        RuntimeError: one of them failed; the message has the end of its standard error.
    """
    for process in processes:
        stderr = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(
                f"{name} ended with status {process.returncode}: {stderr[-2000:]}")


def run_with_kills(mode: str, kills: int, folder: Path, seed: int, devices: Sequence[int],
                   processes: Sequence[int]) -> dict[str, int]:
    """Starts a run again and again, and kills it at random moments until the last start.

    It is killed at a random time after its start, or shortly after a random step.

    Args:
        mode: "pretrain" or a trainable spec.
        kills: number of kills.
        folder: folder of the run.
        seed: of the random moments.
        devices: numbers of devices; one is drawn at each start.
        processes: numbers of processes; one is drawn at each start.

    Returns:
        The numbers of "kills" and "starts".
    """
    rng, num_kills, num_starts = random.Random(seed), 0, 0
    while True:
        running = start_run(mode, rng.choice(devices), folder, rng.choice(processes))
        num_starts += 1
        # With many kills, the run would end before the last one if each start did many steps.
        num_steps = rng.randrange(max(2, 2 * NUM_STEPS // max(kills, 1)))
        if num_kills < kills and rng.random() < 0.2:
            time.sleep(rng.uniform(0, 6))
        elif num_kills < kills:
            for _, _ in zip(range(num_steps + 1), running[0].stdout):
                pass
            time.sleep(rng.uniform(0, 0.02))
        if num_kills == kills or running[0].poll() is not None:
            wait_for_success(running, f"start {num_starts}")
            return {"kills": num_kills, "starts": num_starts}
        for process in running:
            process.send_signal(signal.SIGKILL)
        for process in running:
            process.communicate()
        num_kills += 1


def load_json_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def compare_runs(killed: Path, uninterrupted: Path, tolerance: float) -> dict[str, Any]:
    """Compares a killed run with the uninterrupted one.

    Args:
        killed: folder of the run that was killed.
        uninterrupted: folder of the other.
        tolerance: largest relative difference of losses; 0 also requires equal final states.

    Raises:
        AssertionError: the runs differ.
    """
    rows_of_step = {step: rows for step, _, rows in load_json_lines(uninterrupted / "rows_0.jsonl")}
    for path in killed.glob("rows_*.jsonl"):
        process_index = int(path.stem.removeprefix("rows_"))
        for step, process_count, rows in load_json_lines(path):  # with the steps done twice
            shard_size = BATCH_SIZE // process_count
            start = process_index * shard_size
            expected = rows_of_step[step][start : start + shard_size]
            assert rows == expected, f"step {step} of the killed run had other rows"
    order = np.concatenate([rows_of_step[step] for step in range(1, NUM_STEPS + 1)])
    epochs = order[: len(order) // NUM_ROWS * NUM_ROWS].reshape(-1, NUM_ROWS)
    assert (np.sort(epochs) == np.arange(NUM_ROWS)).all(), "rows are missing from an epoch"
    losses, expected_losses = (dict(load_json_lines(folder / "losses.jsonl"))
                               for folder in (killed, uninterrupted))
    assert losses.keys() == expected_losses.keys(), "the steps differ"
    loss_difference = max(abs(losses[step] - expected) / abs(expected)
                          for step, expected in expected_losses.items())
    assert loss_difference <= tolerance, f"losses differ by {loss_difference:.1e}"
    with (np.load(killed / "final.npz") as state,
          np.load(uninterrupted / "final.npz") as expected_state):
        difference = max(np.abs(state[name] - expected_state[name]).max(initial=0)
                         for name in expected_state)
        bit_equal = all((state[name] == expected_state[name]).all() for name in expected_state)
    assert bit_equal or tolerance, f"the final states differ by {difference}"
    leftover = {path.name for path in (killed / "checkpoints").iterdir()
                if not path.name.isdecimal()} - {"lock"}
    num_steps = len(load_json_lines(killed / "rows_0.jsonl"))
    return {"epochs": len(epochs), "steps_done_twice": num_steps - NUM_STEPS,
            "loss_difference": loss_difference, "bit_equal": bit_equal,
            "leftover_files": sorted(leftover)}


def main(kills: int, devices: Sequence[int] = (1,), processes: Sequence[int] = (1,), seed: int = 0,
         modes: Sequence[str] = MODES) -> dict[str, dict[str, Any]]:
    """Runs the trial of each mode, with an equal part of the kills, and prints JSON lines."""
    results = {}
    with tempfile.TemporaryDirectory() as root:
        for mode in modes:
            began, folder = time.time(), Path(root) / mode.replace(":", "_")
            wait_for_success(start_run(mode, devices[0], folder / "uninterrupted"),
                             "the uninterrupted run")
            results[mode] = run_with_kills(mode, kills // len(modes), folder / "killed", seed,
                                           devices, processes)
            # Other numbers of devices and processes sum in another order.
            tolerance = 1e-5 if len(devices) * len(processes) > 1 else 0.0
            results[mode] |= compare_runs(folder / "killed", folder / "uninterrupted", tolerance)
            results[mode]["seconds"] = round(time.time() - began)
            print(mode, json.dumps(results[mode]), flush=True)
    return results


if __name__ == "__main__":
    if "--run" in sys.argv:
        mode, num_devices, folder = sys.argv[sys.argv.index("--run") + 1:]
        train(mode, int(num_devices), Path(folder))
        os._exit(0)  # without waiting for the threads of the loader
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--devices", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
