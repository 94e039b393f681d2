"""Lookup, verification and quarantine of the checkpoints in a checkpoint directory."""

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from transformer_jax import storage


class SaveError(OSError):
    """Raised if a checkpoint cannot be saved. Earlier checkpoints are unchanged."""


def saved_steps(root: Path) -> list[int]:
    """Returns the steps with a complete checkpoint in `root`, in ascending order.

    A checkpoint is complete if Orbax has finalized it and its manifest exists. If no checkpoint has
    a manifest, because the process was killed before it wrote the first one, all checkpoints that
    Orbax has finalized are returned.
    """
    if not root.is_dir():
        return []
    found = sorted(int(path.name) for path in root.iterdir()
                   if path.name.isdecimal() and ocp.is_orbax_checkpoint(path))
    return [step for step in found if storage.has_manifest(root / str(step))] or found


def quarantine_incomplete(directory: str | Path, after: int = -1) -> None:
    """Renames checkpoints that are not resumed from, and deletes temporary files of aborted saves.

    When training resumes from step `after`, all later checkpoints are corrupted or incomplete. Each
    of them is renamed to "<step>.damaged", or "<step>.damaged-<n>" if that exists, so that the step
    can be saved again.

    Args:
        directory: the checkpoint directory; nothing is done if it does not exist.
        after: the step that training resumes from; -1 renames all checkpoints.
    """
    root = Path(directory)
    for path in list(root.iterdir()) if root.is_dir() else ():
        if path.name.isdecimal() and int(path.name) > after:
            new_path, suffix = path.with_name(f"{path.name}.damaged"), 1
            while new_path.exists():
                new_path = path.with_name(f"{path.name}.damaged-{suffix}")
                suffix += 1
            path.rename(new_path)
        elif ".orbax-checkpoint-tmp" in path.name:
            shutil.rmtree(path)


def verified_checkpoint_path(directory: str | Path, step: int | None) -> Path:
    """Returns the path of a checkpoint whose files match their manifest.

    With several processes, process 0 verifies the files and broadcasts the step.

    Args:
        directory: the checkpoint directory.
        step: a step; None selects the latest step that is not corrupted. Corrupted later steps are
            reported on standard error.

    Raises:
        FileNotFoundError: the directory, or a checkpoint of that step, does not exist.
        ValueError: the checkpoint of that step is corrupted, or all checkpoints are if the step is
            None.
    """
    path = checkpoint_path(directory, step)
    if jax.process_count() == 1:
        return path.with_name(str(_verified_step(path, step)))
    # Imported here because it is slow to import and not needed by a single process.
    from jax.experimental import multihost_utils

    error, number = None, -1
    if jax.process_index() == 0:
        try:
            number = _verified_step(path, step)
        except ValueError as found:
            error = found
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if number < 0:
        raise error or ValueError(f"{path.parent} has no checkpoint that can be restored; see the "
                                  "error of process 0")
    return path.with_name(str(number))


def _verified_step(path: Path, step: int | None) -> int:
    """Returns `step`, or the latest step with intact files if it is None, after verifying it."""
    for number in reversed(saved_steps(path.parent)) if step is None else (step,):
        folder = path.with_name(str(number))
        if not storage.has_manifest(folder):  # then no checkpoint has a manifest; see `saved_steps`
            return number
        if (problem := storage.verify_manifest(folder)) is None:
            return number
        message = f"checkpoint {folder} is corrupted: {problem}"
        if step is not None:
            raise ValueError(f"{message}; choose another step")
        print(f"{message}; trying the previous step", file=sys.stderr, flush=True)
    raise ValueError(f"every checkpoint in {path.parent} is corrupted; for example, {message}; "
                     "restore the files from a backup, or train in another directory")


def check_disk_space(root: Path, step: int, arrays: Iterable[Any]) -> None:
    """Raises `SaveError` if the file system of `root` has less free space than the arrays need."""
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    needed, free = sum(x.nbytes for x in arrays), shutil.disk_usage(existing).free
    if free < needed:
        raise SaveError(
            f"step {step} needs {needed / 2**20:,.0f} MiB in {root}, which has "
            f"{free / 2**20:,.0f} MiB free; delete files, keep fewer checkpoints (option keep), or "
            "choose another directory")


def checkpoint_path(directory: str | Path, step: int | None) -> Path:
    """Returns the path of the checkpoint of `step`, or of the latest step if it is None.

    Raises:
        FileNotFoundError: the directory, or a checkpoint of that step, does not exist.
    """
    root = Path(directory).absolute()
    if not root.is_dir():
        raise FileNotFoundError(f"the checkpoint directory {root} does not exist; check the path, "
                                "or save a checkpoint there first")
    saved = saved_steps(root)
    if not saved:
        raise FileNotFoundError(f"{root} contains no checkpoint; check the path, or save a "
                                "checkpoint there first")
    if step is not None and step not in saved:
        raise FileNotFoundError(
            f"{root} has no checkpoint of step {step}; choose one of {', '.join(map(str, saved))}"
        )
    return root / str(saved[-1] if step is None else step)
