"""Damage checkpoints, disks and writers in every way we know, and look what a run makes of it.

    python tests/endurance/faults.py --trials 200

Each trial copies a folder of three saved steps and damages one of them, mostly the last: a file is
truncated, emptied, lengthened, exchanged with another, deleted, or one bit of it flipped; a whole
item, the list of digests or the mark of completion is taken away; bytes are put into the list. Then
the run is restored. What comes back must be, bit for bit, what was saved at the step that it says
it is, or there must be an error of ours; anything else is a silent corruption. Saves are made to
fail as well: by a full disk, a folder that cannot be written, a writer that dies. Hardware: one CPU
core takes a minute.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transformer_jax import storage
from transformer_jax.train import checkpoint_dirs, checkpointing, step

STEPS = (10, 20, 30)


def state_at(number: int) -> step.TrainState:
    """A state that says which step it is of."""
    params = {"a": jnp.arange(3000.0).reshape(60, 50) + number, "b": {"c": jnp.full(7, number)}}
    return step.init_state(params, optax.adam(1e-3))._replace(step=jnp.int32(number))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# What happens to a file: (bytes, other bytes, a source of chance) -> bytes, or None for its loss.
FILE_FAULTS = {
    "truncated": lambda old, other, rng: old[: rng.randrange(len(old))] if old else b"x",
    "emptied": lambda old, other, rng: b"",
    "lengthened": lambda old, other, rng: old + rng.randbytes(rng.randint(1, 20)),
    "exchanged": lambda old, other, rng: other,
    "deleted": lambda old, other, rng: None,
    "zeroed": lambda old, other, rng: bytes(len(old)),
}


def flip(old: bytes, other: bytes, rng: random.Random) -> bytes:
    """One bit the other way."""
    place = rng.randrange(8 * len(old))
    new = bytearray(old)
    new[place // 8] ^= 1 << place % 8
    return bytes(new)


def damage(folder: Path, rng: random.Random) -> str:
    """One fault in a step's folder; says which."""
    kind = rng.choice(["bit", "bit", "bit", *FILE_FAULTS, "item", "list", "mark"])
    if kind == "item":
        shutil.rmtree(rng.choice([path for path in folder.iterdir() if path.is_dir()]))
        return kind
    if kind in ("list", "mark"):
        (folder / (storage.MANIFEST if kind == "list" else "_CHECKPOINT_METADATA")).unlink()
        return kind
    path = rng.choice([path for path in files(folder) if path.stat().st_size])
    old, other = path.read_bytes(), rng.choice(files(folder)).read_bytes()
    new = flip(old, other, rng) if kind == "bit" else FILE_FAULTS[kind](old, other, rng)
    if new == old:
        return "none"
    path.unlink() if new is None else path.write_bytes(new)
    return kind


def restored(root: Path) -> str:
    """What becomes of a run in this folder: the step it goes on from, or "refused".

    Raises:
        AssertionError: a silent corruption.
    """
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            found = checkpointing.restore(root, state_at(0))
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error), error
            return "refused"
    number = int(found.state.step)
    expected = state_at(number)
    for ours, theirs in zip(jax.tree.leaves(found.state), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=f"silent corruption at step {number}")
    assert found.data_state == {"at": number} and found.metadata == {"run": "this"}
    assert number == STEPS[-1] or "is corrupted" in said.getvalue() or number in STEPS
    checkpoint_dirs.quarantine_incomplete(root, after=number)
    checkpointing.save(root, number + 10, state_at(number + 10))  # the run goes on
    assert checkpointing.latest_step(root) == number + 10
    return f"step {number}"


def loads(trials: int, seed: int) -> dict[str, dict[str, int]]:
    """kind of fault -> what became of it -> how often."""
    rng, counts = random.Random(seed), collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place) / "whole"
        for number in STEPS:
            checkpointing.save(whole, number, state_at(number), data_state={"at": number},
                            metadata={"run": "this"})
        for trial in range(trials):
            root = Path(place) / f"trial{trial}"
            shutil.copytree(whole, root)
            kind = damage(root / str(rng.choice((*STEPS, STEPS[-1], STEPS[-1]))), rng)
            counts[kind][restored(root)] += 1
            shutil.rmtree(root)
    return {kind: dict(sorted(found.items())) for kind, found in sorted(counts.items())}


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond a few bytes, in any thread: what a full disk does to a writer."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


@contextlib.contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def dies(*args, **kwargs):
    raise OSError(5, "Input/output error")


def no_room(path):
    return shutil._ntuple_diskusage(10**9, 10**9, 10)


SAVE_FAULTS = {
    "disk full": full_disk,
    "no room": lambda: replaced(shutil, "disk_usage", no_room),
    "rename fails": lambda: replaced(os, "rename", dies),
    "digests fail": lambda: replaced(storage, "write", dies),
    "writer dies": lambda: replaced(storage, "digest_of", dies),
}


def saves() -> dict[str, str]:
    """Fault -> the message. After each the step before is there, and the next save works."""
    said = {}
    for name, fault in SAVE_FAULTS.items():
        with tempfile.TemporaryDirectory() as place:
            root = Path(place) / "run"
            checkpointing.save(root, 10, state_at(10), data_state={"at": 10},
                            metadata={"run": "this"})
            try:
                with fault():
                    checkpointing.save(root, 20, state_at(20), wait=False).result()
            except checkpointing.SaveError as error:
                said[name] = str(error)
            assert name in said, f"{name}: no error"
            assert restored(root) == "step 10", name
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "file"
        file.write_text("not a folder")
        try:
            checkpointing.save(file / "run", 1, state_at(1))
        except checkpointing.SaveError as error:
            said["no folder"] = str(error)
    return said


def main(trials: int, seed: int = 0) -> dict:
    """Both."""
    found = {"loads": loads(trials, seed), "saves": saves()}
    print(json.dumps(found, indent=1), flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    main(*vars(parser.parse_args()).values())
    sys.exit(0)
