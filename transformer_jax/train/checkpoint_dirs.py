"""The folder of a run's checkpoints: which steps are in it, and which of them are whole."""

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
    """A checkpoint could not be written; those before it are as they were."""


def steps(root: Path) -> list[int]:
    """The complete steps: those that Orbax has renamed and whose files are listed. Where none is
    listed, those that Orbax has: the process died in between."""
    if not root.is_dir():
        return []
    found = sorted(int(path.name) for path in root.iterdir()
                   if path.name.isdecimal() and ocp.is_orbax_checkpoint(path))
    return [step for step in found if storage.has_manifest(root / str(step))] or found


def quarantine_incomplete(directory: str | Path, after: int = -1) -> None:
    """Renames the folders of steps after `after`, damaged or incomplete ones, so that these steps
    can be saved again, and deletes what saves that were cut off have left."""
    root = Path(directory)
    for path in list(root.iterdir()) if root.is_dir() else ():
        if path.name.isdecimal() and int(path.name) > after:
            aside, more = path.with_name(f"{path.name}.damaged"), 1
            while aside.exists():
                aside, more = path.with_name(f"{path.name}.damaged-{more}"), more + 1
            path.rename(aside)
        elif ".orbax-checkpoint-tmp" in path.name:
            shutil.rmtree(path)


def latest_complete_step(directory: str | Path, step: int | None) -> Path:
    """As `find`, of steps that are not damaged. The first process looks, for all."""
    path = checkpoint_path(directory, step)
    if jax.process_count() == 1:
        return path.with_name(str(_whole(path, step)))
    # Imported here: it brings in much that a single process never needs.
    from jax.experimental import multihost_utils

    error, number = None, -1
    if jax.process_index() == 0:
        try:
            number = _whole(path, step)
        except ValueError as found:
            error = found
    number = int(multihost_utils.broadcast_one_to_all(np.int32(number)))
    if number < 0:
        raise error or ValueError(f"{path.parent} is damaged; the first process says where")
    return path.with_name(str(number))


def _whole(path: Path, step: int | None) -> int:
    for number in reversed(steps(path.parent)) if step is None else (step,):
        folder = path.with_name(str(number))
        if not storage.has_manifest(folder):  # not even listed, nor is any other
            return number
        if (problem := storage.verify_manifest(folder)) is None:
            return number
        message = f"checkpoint {folder} is damaged: {problem}"
        if step is not None:
            raise ValueError(f"{message}; choose another step")
        print(f"{message}; looking at the step before it", file=sys.stderr, flush=True)
    raise ValueError(f"every checkpoint in {path.parent} is damaged, first {message}; restore them "
                     "from a copy, or start again in another folder")


def check_disk_space(root: Path, step: int, arrays: Iterable[Any]) -> None:
    """Raises SaveError if the disk has less room than the arrays take."""
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    needed, free = sum(x.nbytes for x in arrays), shutil.disk_usage(there).free
    if free < needed:
        raise SaveError(
            f"step {step} needs {needed / 2**20:,.0f} MiB in {root}, which has "
            f"{free / 2**20:,.0f} MiB left; make room, keep fewer checkpoints (keep), or choose "
            "another folder")


def checkpoint_path(directory: str | Path, step: int | None) -> Path:
    root = Path(directory).absolute()
    if not root.is_dir():
        raise FileNotFoundError(
            f"there is no checkpoint directory {root}; check the path, or train and save there"
        )
    saved = steps(root)
    if not saved:
        raise FileNotFoundError(f"{root} holds no checkpoint; check the path, or save one there")
    if step is not None and step not in saved:
        raise FileNotFoundError(
            f"{root} has no step {step}; it has {', '.join(map(str, saved))}: choose one of them"
        )
    return root / str(saved[-1] if step is None else step)
