"""Reliability trial: checkpoints with corrupted files, and saves that fail.

    python tests/endurance/faults.py --trials 200

Each trial copies a folder of three checkpoints and corrupts one of them, mostly the last: a file is
truncated, emptied, extended, replaced by another, deleted or zeroed, or one of its bits is flipped;
or an item, the manifest or Orbax's completion marker is deleted. Then the run is restored. The
result must be, bit for bit, what was saved at the step that it claims to be, or a documented error;
anything else is a silent corruption.

Saves also fail: because the disk is full, the folder cannot be written, or the writer fails.
Hardware: one CPU core takes a minute.
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
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transformer_jax import storage
from transformer_jax.train import checkpoint_files, checkpointing, step

STEPS = (10, 20, 30)
COMPLETION_MARKER = "_CHECKPOINT_METADATA"


def state_at(number: int) -> step.TrainState:
    """Returns a state whose values depend on its step number."""
    params = {"a": jnp.arange(3000.0).reshape(60, 50) + number, "b": {"c": jnp.full(7, number)}}
    return step.init_state(params, optax.adam(1e-3))._replace(step=jnp.int32(number))


def save(root: Path, number: int, **options: Any) -> checkpoint_files.PendingSave:
    return checkpointing.save(root, number, state_at(number), data_state={"at": number},
                              metadata={"run": "this"}, **options)


# Corrupted checkpoints ----------------------------------------------------------------------------


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip_bit(content: bytes, other: bytes, rng: random.Random) -> bytes:
    position = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


# Kind of fault -> function of (content, content of another file, rng) that returns the new content,
# or None to delete the file.
FILE_FAULTS = {
    "bit flipped": flip_bit,
    "truncated": lambda content, other, rng: (
        content[: rng.randrange(len(content))] if content else b"x"),
    "emptied": lambda content, other, rng: b"",
    "extended": lambda content, other, rng: content + rng.randbytes(rng.randint(1, 20)),
    "replaced": lambda content, other, rng: other,
    "deleted": lambda content, other, rng: None,
    "zeroed": lambda content, other, rng: bytes(len(content)),
}


def corrupt(folder: Path, rng: random.Random) -> str:
    """Applies one random fault to the folder of a checkpoint; returns the kind of fault."""
    kind = rng.choice(["bit flipped", "bit flipped", *FILE_FAULTS, "item deleted",
                       "manifest deleted", "marker deleted"])
    if kind == "item deleted":
        shutil.rmtree(rng.choice([path for path in folder.iterdir() if path.is_dir()]))
        return kind
    if kind in ("manifest deleted", "marker deleted"):
        name = storage.MANIFEST if kind == "manifest deleted" else COMPLETION_MARKER
        (folder / name).unlink()
        return kind
    path = rng.choice([path for path in list_files(folder) if path.stat().st_size])
    content, other = path.read_bytes(), rng.choice(list_files(folder)).read_bytes()
    changed = FILE_FAULTS[kind](content, other, rng)
    if changed == content:
        return "none"
    path.unlink() if changed is None else path.write_bytes(changed)
    return kind


def restore_outcome(root: Path) -> str:
    """Restores the run in a folder and saves its next checkpoint.

    Returns:
        "step N", the step from which the run resumes, or "refused".

    Raises:
        AssertionError: a silent corruption.
    """
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            found = checkpointing.restore(root, state_at(0))
        except (ValueError, FileNotFoundError) as error:
            assert "\n" not in str(error), error
            return "refused"
    number = int(found.state.step)
    restored, expected = jax.tree.leaves(found.state), jax.tree.leaves(state_at(number))
    for leaf, expected_leaf in zip(restored, expected, strict=True):
        np.testing.assert_array_equal(
            leaf, expected_leaf, err_msg=f"silent corruption at step {number}")
    assert found.data_state == {"at": number} and found.metadata == {"run": "this"}
    assert number == STEPS[-1] or "is corrupted" in stderr.getvalue() or number in STEPS
    checkpoint_files.quarantine_incomplete(root, after=number)
    checkpointing.save(root, number + 10, state_at(number + 10))
    assert checkpointing.latest_step(root) == number + 10
    return f"step {number}"


def corrupted_checkpoints(trials: int, seed: int) -> dict[str, dict[str, int]]:
    """Returns kind of fault -> outcome of the restoration -> number of trials."""
    rng, counts = random.Random(seed), collections.defaultdict(collections.Counter)
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder) / "original"
        for number in STEPS:
            save(original, number)
        for trial in range(trials):
            root = Path(folder) / f"trial{trial}"
            shutil.copytree(original, root)
            kind = corrupt(root / str(rng.choice((*STEPS, STEPS[-1], STEPS[-1]))), rng)
            counts[kind][restore_outcome(root)] += 1
            shutil.rmtree(root)
    return {kind: dict(sorted(outcomes.items())) for kind, outcomes in sorted(counts.items())}


# Failing saves ------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_file_limit() -> Iterator[None]:
    """Limits files to 2,000 bytes in all threads, so that writers fail as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replaces an attribute."""
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def raise_io_error(*args, **kwargs):
    raise OSError(5, "Input/output error")


def almost_full_disk_usage(path):
    return shutil._ntuple_diskusage(10**9, 10**9, 10)


SAVE_FAULTS = {
    "file too large": small_file_limit,
    "disk full": lambda: replaced(shutil, "disk_usage", almost_full_disk_usage),
    "rename fails": lambda: replaced(os, "rename", raise_io_error),
    "manifest fails": lambda: replaced(storage, "write_manifest", raise_io_error),
    "checksum fails": lambda: replaced(storage, "sha256", raise_io_error),
}


def failing_saves() -> dict[str, str]:
    """Returns fault -> error message of the save.

    After each fault the previous checkpoint can be restored, and the next save succeeds.
    """
    messages = {}
    for name, fault in SAVE_FAULTS.items():
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder) / "run"
            save(root, 10)
            try:
                with fault():
                    save(root, 20, wait=False).result()
            except checkpoint_files.SaveError as error:
                messages[name] = str(error)
            assert name in messages, f"{name}: the save did not fail"
            assert restore_outcome(root) == "step 10", name
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file"
        file.write_text("not a folder")
        try:
            save(file / "run", 1)
        except checkpoint_files.SaveError as error:
            messages["not a folder"] = str(error)
    return messages


def main(trials: int, seed: int = 0) -> dict[str, Any]:
    """Runs both trials and prints their results as JSON."""
    results = {"loads": corrupted_checkpoints(trials, seed), "saves": failing_saves()}
    print(json.dumps(results, indent=1), flush=True)
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    main(**vars(parser.parse_args()))
