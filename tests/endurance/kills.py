"""Kill a run at random moments, start it again, and compare it with one that was left alone.

    python tests/endurance/kills.py --kills 50
    python tests/endurance/kills.py --kills 12 --devices 1 2 4 8      # another number at each start
    python tests/endurance/kills.py --kills 12 --processes 1 2 4      # the same of processes

Two runs of a tiny GPT: pre-training, and fine-tuning by LoRA. Each writes its batches' rows and its
losses to a journal as it goes. In the end the parameters are compared, every step's rows and loss
with those of the run that was left alone, and the rows of each epoch with all rows. Hardware: two
CPU cores take about six seconds a kill.
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
from pathlib import Path

import numpy as np

ROWS, BATCH, STEPS, SAVE_EVERY = 200, 8, 400, 10
MODES = ("pretrain", "lora:2:all")
# LoRA learns little, its base being random; at 1e-2 it wanders, and a relative change of 1e-7 in
# the first parameters is 1e-3 in the losses after 200 steps, on one device too.
RATES = {"pretrain": 1e-2, "lora:2:all": 3e-3}


class Numbered:
    """Rows that know their number."""

    def __len__(self):
        return ROWS

    def take(self, rows):
        ids = (np.asarray(rows)[:, None] * 3 + 7 * np.arange(9) ** 2) % 40
        return {"tokens": ids[:, :-1].astype(np.int32), "targets": ids[:, 1:].astype(np.int32),
                "weights": np.ones((len(ids), 8), np.float32),
                "row": np.asarray(rows, np.int32)}


def run(mode: str, devices: int, folder: Path) -> None:
    """The run, in a process of its own or several; it goes on where it was killed."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    from transformer_jax import distributed

    distributed.initialize()
    index, count = jax.process_index(), jax.process_count()
    jax.config.update("jax_compilation_cache_dir", str(folder.parent / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    from transformer_jax import sharding
    from transformer_jax.data import batching
    from transformer_jax.finetuning import peft
    from transformer_jax.models import GPTConfig, build_model, init_params
    from transformer_jax.objectives import causal_lm
    from transformer_jax.train import loop, optimizers, step

    class Journal:
        """The batches, and a line for each in a file."""

        def __init__(self, batches):
            self.batches, self.step = batches, 0
            self.file = (folder / f"rows_{index}.jsonl").open("a")

        def __next__(self):
            batch = next(self.batches)
            self.step += 1
            self.file.write(json.dumps([self.step, count, batch["row"].tolist()]) + "\n")
            self.file.flush()
            return batch

        def get_state(self):
            return {"step": self.step, "batches": self.batches.get_state()}

        def set_state(self, state):
            self.step = state["step"]
            self.batches.set_state(state["batches"])

    model = build_model(GPTConfig(
        vocab_size=40, max_length=8, num_layers=2, d_model=16, num_heads=2, mlp_dim=32,
        dropout_rate=0.1, attention_dropout_rate=0.0, norm_first=True))
    params, mask = init_params(model, jax.random.key(0)), None
    if mode != "pretrain":
        params, mask = peft.add_and_mask(params, mode, jax.random.key(5))
    optimizer = optimizers.make_optimizer(optimizers.make_schedule("cosine", RATES[mode], STEPS, 20), ema=0.9)
    losses = (folder / ("losses.jsonl" if index == 0 else os.devnull)).open("a")

    def log(row):
        losses.write(json.dumps([row["step"], row["loss"]]) + "\n")
        losses.flush()
        print(row["step"], flush=True)
        time.sleep(0.002)  # a step is too short to be killed in

    mesh = sharding.make_mesh(devices * count) if devices * count > 1 else None
    state, _ = loop.fit(
        step.init_state(params, optimizer, mask),
        step.make_train_step(functools.partial(causal_lm.loss, model.apply), optimizer, mask),
        Journal(batching.make_loader(Numbered(), BATCH, seed=3, process_index=index,
                                     process_count=count)), rng=jax.random.key(1),
        num_steps=STEPS, mesh=mesh, log_every=1, quiet=True, on_log=log,
        checkpoint_dir=folder / "checkpoints", save_every=SAVE_EVERY,
        metadata={"mode": mode, "steps": STEPS})
    if index:
        return
    leaves = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(state))}
    np.savez(folder / "unfinished.npz", **leaves)
    (folder / "unfinished.npz").replace(folder / "final.npz")


def start(mode: str, devices: int, folder: Path, processes: int = 1) -> list[subprocess.Popen]:
    """The run, of so many processes of so many devices each."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    several = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    return [subprocess.Popen(
        [sys.executable, __file__, "--run", mode, str(devices), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | (several | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}))
        for i in range(processes)]


def finish(running: list[subprocess.Popen], what: str) -> None:
    """Waits for all.

    Raises:
        RuntimeError: one failed; with what it said.
    """
    for process in running:
        said = process.communicate()[1]
        if process.returncode:
            raise RuntimeError(f"{what} ended with {process.returncode}: {said[-2000:]}")


def torment(mode: str, kills: int, folder: Path, seed: int, devices: list[int],
            processes: list[int]) -> dict:
    """Kills the run so many times: at any time from its start, or soon after a step."""
    rng, done, starts, finished = random.Random(seed), 0, 0, False
    while not finished:
        running = start(mode, rng.choice(devices), folder, rng.choice(processes))
        starts += 1
        # Where it would end too early it is killed sooner after each start.
        steps = rng.randrange(max(2, 2 * STEPS // max(kills, 1)))
        if done < kills and rng.random() < 0.2:
            time.sleep(rng.uniform(0, 6))
        elif done < kills:
            for _, _ in zip(range(steps + 1), running[0].stdout):
                pass
            time.sleep(rng.uniform(0, 0.02))
        if done < kills and running[0].poll() is None:
            for process in running:
                process.send_signal(signal.SIGKILL)
            for process in running:
                process.communicate()
            done += 1
            continue
        finish(running, f"start {starts}")
        finished = True
    return {"kills": done, "starts": starts}


def compare(folder: Path, alone: Path, tolerance: float) -> dict:
    """What is checked in the end.

    Raises:
        AssertionError: the runs differ.
    """
    def last(path):
        return dict(json.loads(line) for line in path.read_text().splitlines())

    def journal(path):
        return [json.loads(line) for line in path.read_text().splitlines()]

    once = {step: rows for step, _, rows in journal(alone / "rows_0.jsonl")}
    lines = journal(folder / "rows_0.jsonl")
    for path in folder.glob("rows_*.jsonl"):
        index = int(path.stem.removeprefix("rows_"))
        for step, count, rows in journal(path):  # also those that were done twice
            share = BATCH // count
            assert rows == once[step][index * share : (index + 1) * share], (
                f"step {step} saw other rows")
    order = np.concatenate([once[step] for step in range(1, STEPS + 1)])
    epochs = order[: len(order) // ROWS * ROWS].reshape(-1, ROWS)
    assert (np.sort(epochs) == np.arange(ROWS)).all(), "an epoch lacks rows"
    ours, theirs = last(folder / "losses.jsonl"), last(alone / "losses.jsonl")
    off = max(abs(ours[n] - theirs[n]) / abs(theirs[n]) for n in theirs)
    assert ours.keys() == theirs.keys() and off <= tolerance, f"losses differ by {off:.1e}"
    with np.load(folder / "final.npz") as a, np.load(alone / "final.npz") as b:
        far = max(np.abs(a[name] - b[name]).max(initial=0) for name in b)
        equal = all((a[name] == b[name]).all() for name in b)
    assert equal or tolerance, f"parameters differ by {far}"
    left = [p.name for p in (folder / "checkpoints").iterdir() if not p.name.isdecimal()]
    return {"epochs": len(epochs), "steps_done_twice": len(lines) - STEPS, "loss_off": off,
            "bit_equal": equal, "left_behind": sorted(set(left) - {"lock"})}


def main(kills: int, devices: list[int], seed: int = 0, modes: tuple[str, ...] = MODES,
         processes: tuple[int, ...] = (1,)) -> dict:
    """Kills are shared by the modes."""
    found = {}
    with tempfile.TemporaryDirectory() as root:
        for mode in modes:
            began, place = time.time(), Path(root) / mode.replace(":", "_")
            finish(start(mode, devices[0], place / "alone"), "the run that was left alone")
            found[mode] = torment(mode, kills // len(modes), place / "killed", seed, devices,
                                  processes)
            found[mode] |= compare(place / "killed", place / "alone",
                                   1e-5 if len(devices) * len(processes) > 1 else 0.0)
            found[mode]["seconds"] = round(time.time() - began)
            print(mode, json.dumps(found[mode]), flush=True)
    return found


if __name__ == "__main__":
    if "--run" in sys.argv:
        mode, devices, folder = sys.argv[sys.argv.index("--run") + 1:]
        run(mode, int(devices), Path(folder))
        os._exit(0)  # loader threads need not be waited for
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--devices", type=int, nargs="+", default=[1])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.kills, arguments.devices, arguments.seed, processes=arguments.processes)
