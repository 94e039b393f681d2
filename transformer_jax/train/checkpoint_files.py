"""The files of a checkpoint directory: lookup, verification, quarantine, and the stored items."""

import contextlib
import json
import os
import platform
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from transformer_jax import storage
from transformer_jax.errors import similar_names
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

JSON_ITEMS = ("step", "rng", "data", "metadata")
LOCK_FILE = "lock"


class SaveError(OSError):
    """Raised if a checkpoint cannot be saved. Earlier checkpoints are unchanged."""


class DirectoryInUseError(OSError):
    """Another run holds the lock of a checkpoint directory."""


@contextlib.contextmanager
def directory_lock(directory: str | Path) -> Iterator[None]:
    """Holds an exclusive lock on a directory, which is created if missing.

    The operating system releases the lock when the process ends, even if it is killed. On network
    file systems without locks, `filelock` uses the existence of the lock file instead.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    owner = root / f"{LOCK_FILE}.owner"  # the lock file itself may be truncated by others
    try:
        with filelock.FileLock(root / LOCK_FILE, timeout=0):
            owner.write_text(f"process {os.getpid()} on {platform.node()}\n")
            try:
                yield
            finally:
                owner.unlink(missing_ok=True)
    except filelock.Timeout:
        name = owner.read_text().strip() if owner.is_file() else "an unknown process"
        raise DirectoryInUseError(
            f"{directory} is in use by another run ({name}); wait until it ends, stop it, or "
            "choose another directory") from None


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
    """Renames the checkpoints after step `after`, and deletes temporary files of aborted saves.

    When training resumes from that step, later checkpoints are corrupted or incomplete. They become
    "<step>.damaged", or "<step>.damaged-<n>" if that exists, so that the step can be saved again.
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
    """Returns the path of the checkpoint of `step`, by default of the latest step."""
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
            f"{root} has no checkpoint of step {step}; choose one of {', '.join(map(str, saved))}")
    return root / str(saved[-1] if step is None else step)


def verified_checkpoint_path(directory: str | Path, step: int | None) -> Path:
    """Like `checkpoint_path`, but verified; by default the latest step that is not corrupted.

    With several processes, process 0 verifies the files and broadcasts the step.
    """
    path = checkpoint_path(directory, step)
    error, number = None, -1
    if jax.process_index() == 0:
        try:
            number = _verified_step(path, step)
        except ValueError as found:
            error = found
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # slow to import

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


class PendingSave:
    """A save whose files are written in the background; `result` waits until it is complete."""

    def __init__(self, root: Path, step: int, checkpointer: ocp.training.Checkpointer, response):
        self._root, self._step, self._error = root, step, None
        self._thread = threading.Thread(target=self._finish, args=(checkpointer, response))
        self._thread.start()

    def _finish(self, checkpointer: ocp.training.Checkpointer, response) -> None:
        try:
            with checkpointer:
                response.result()
            if jax.process_index() == 0:
                storage.write_manifest(self._root / str(self._step))
        except Exception as error:  # raised by `check` in the calling thread
            self._error = error

    def check(self) -> None:
        """Raises `SaveError` once if the save has failed, without waiting for it to finish."""
        if self._error is None or self._thread.is_alive():
            return
        error, self._error = self._error, None
        last = max(saved_steps(self._root), default=None)
        raise SaveError(
            f"step {self._step} could not be saved in {self._root}: {first_line(error)}; "
            + ("no earlier checkpoint exists" if last is None
               else f"the last complete checkpoint is step {last}")
            + ". Fix the problem and run the same command again to resume") from error

    def result(self) -> None:
        """Waits until the checkpoint is complete, and raises `SaveError` if the save has failed."""
        self._thread.join()
        self.check()


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# Items: conversion of train states to and from the contents of an Orbax checkpoint ----------------


def orbax_context() -> ocp.Context:
    """Returns an Orbax context in which the items in `JSON_ITEMS` are saved as JSON."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    return context


def _nested_dict(tree: PyTree) -> dict[str, Any]:
    """Converts a pytree to nested dicts, which do not depend on the names of Optax's classes."""
    return unflatten_paths(flatten_paths(tree))


def make_items(state: Any, rng: jax.Array | None, data_state: Any, metadata: Any) -> dict[str, Any]:
    """Returns the items of a checkpoint; see `checkpointing`."""
    items = {
        "params": _nested_dict(state.params),
        "opt_state": _nested_dict(state.opt_state) or None,  # Orbax cannot save an empty tree
        "step": int(state.step),
        "rng": rng_to_json(rng),
        "data": to_json(data_state, "data_state"),
        "metadata": to_json(metadata, "metadata"),
    }
    return {name: item for name, item in items.items() if item is not None}


def target_sharding(leaf: Any) -> jax.sharding.Sharding:
    """Returns the sharding of a concrete or abstract array, or the first local device if None."""
    return getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])


def abstract_array(leaf: Any) -> jax.ShapeDtypeStruct:
    """Returns an abstract array with the shape, dtype and `target_sharding` of a leaf."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target_sharding(leaf))


def saved_arrays(path: Path, item: str) -> dict[str, Any]:
    """Returns array path -> metadata (shape, dtype) of an item, without loading the arrays."""
    with orbax_context():
        found = ocp.checkpointables_metadata(path).metadata
    return flatten_paths(found.get(item) or {})


def load_items(path: Path, trees: Mapping[str, PyTree]) -> dict[str, Any]:
    """Loads all JSON items of a checkpoint, and the items in `trees`.

    The latter get the structure, dtypes and shardings of `trees`, which are real or abstract.
    Raises ValueError if the saved paths or shapes differ from them.
    """
    wanted: dict[str, Any] = {item: None for item in JSON_ITEMS if (path / item).is_dir()}
    for item, like in trees.items():
        _check_arrays(path, item, flatten_paths(like), saved_arrays(path, item))
        if abstract := jax.tree.map(abstract_array, _nested_dict(like)):
            wanted[item] = abstract
    with orbax_context():
        loaded = dict(ocp.load_checkpointables(path, wanted))
    for item, like in trees.items():
        leaves = flatten_paths(loaded.get(item, {}))
        loaded[item] = jax.tree.unflatten(
            jax.tree.structure(like), [leaves[name] for name in flatten_paths(like)])
    return loaded


def _check_arrays(
    path: Path, item: str, expected: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raises ValueError if the saved arrays of an item differ from the expected ones."""
    where = f"checkpoint {path}: {item}"
    for name, leaf in expected.items():
        if name in saved and tuple(saved[name].shape) != tuple(leaf.shape):
            raise ValueError(
                f"{where}/{name} has shape {tuple(saved[name].shape)}, not {tuple(leaf.shape)}; "
                "build the model with the config in the checkpoint's metadata")
    cause = "model config" if item == "params" else "optimizer and trainable mask"
    for names, difference, pool in (
        (expected.keys() - saved.keys(), "is missing {} arrays", saved),
        (saved.keys() - expected.keys(), "has {} additional arrays", expected),
    ):
        if names:
            name = min(names)
            near = similar_names(name, pool, 1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(f"{where} {difference.format(len(names))} such as {name}{hint}; use "
                             f"the {cause} that it was saved with")


def to_json(value: Any, name: str) -> Any:
    """Converts a value to JSON values: NumPy scalars to Python numbers, and arrays to lists."""
    def convert(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        raise ValueError(f"{name} contains a {type(item).__name__}, which JSON cannot represent; "
                         "use numbers, strings, lists and dicts")

    return json.loads(json.dumps(value, default=convert))


def rng_to_json(rng: jax.Array | None) -> dict[str, Any] | None:
    """Converts a random key to JSON values: the name of its implementation and its uint32 data.

    `impl` is None for a legacy key (`jax.random.PRNGKey`), which is a plain uint32 array.
    """
    if rng is None:
        return None
    is_typed = jax.dtypes.issubdtype(rng.dtype, jax.dtypes.prng_key)
    data = np.asarray(jax.random.key_data(rng) if is_typed else rng)
    return {"impl": str(jax.random.key_impl(rng)) if is_typed else None, "data": data.tolist()}


def rng_from_json(values: Mapping[str, Any] | None) -> jax.Array | None:
    """Converts the result of `rng_to_json` back to a random key."""
    if values is None:
        return None
    data = jax.numpy.asarray(values["data"], jax.numpy.uint32)
    return data if values["impl"] is None else jax.random.wrap_key_data(data, impl=values["impl"])
