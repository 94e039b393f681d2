"""The files of a checkpoint directory: lookup, verification, quarantine, and the stored items."""

import difflib
import json
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from transformer_jax import storage
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

JSON_ITEMS = ("step", "rng", "data", "metadata")


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
    """Renames the checkpoints after a step, and deletes temporary files of aborted saves.

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
        ValueError: the checkpoint of that step is corrupted; or, if `step` is None, every
            checkpoint is.
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


# Items: conversion of train states to and from the contents of an Orbax checkpoint ----------------


def orbax_context() -> ocp.Context:
    """Returns an Orbax context in which the items in `JSON_ITEMS` are saved as JSON."""
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    for name in JSON_ITEMS:
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context.checkpointables.registry = registry
    return context


def nested_dict(tree: PyTree) -> dict[str, Any]:
    """Converts any pytree to nested dicts whose keys are the path components of the leaves.

    In this form, a saved optimizer state does not depend on the names of Optax's classes.
    """
    return unflatten_paths(flatten_paths(tree))


def make_items(state: Any, rng: jax.Array | None, data_state: Any, metadata: Any) -> dict[str, Any]:
    """Returns the items of a checkpoint; see `checkpointing`."""
    items = {
        "params": nested_dict(state.params),
        "opt_state": nested_dict(state.opt_state) or None,  # Orbax cannot save an empty tree
        "step": int(state.step),
        "rng": rng_to_json(rng),
        "data": to_json(data_state, "data_state"),
        "metadata": to_json(metadata, "metadata"),
    }
    return {name: item for name, item in items.items() if item is not None}


def target_sharding(leaf: Any) -> jax.sharding.Sharding:
    """Returns the sharding of a concrete or abstract array, or the first local device if None."""
    return getattr(leaf, "sharding", None) or SingleDeviceSharding(jax.local_devices()[0])


def abstract_arrays(tree: PyTree) -> PyTree:
    """Converts a pytree to nested dicts of abstract arrays, with `target_sharding` of each leaf."""
    def abstract(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=target_sharding(leaf))

    return jax.tree.map(abstract, nested_dict(tree))


def copy_structure(loaded: PyTree, like: PyTree) -> PyTree:
    """Returns a pytree with the structure of `like` and the leaves of `loaded`, matched by path."""
    leaves = flatten_paths(loaded)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[p] for p in flatten_paths(like)])


def saved_arrays(path: Path, item: str) -> dict[str, Any]:
    """Returns array path -> metadata (shape, dtype) of an item, without loading the arrays."""
    with orbax_context():
        found = ocp.checkpointables_metadata(path).metadata
    return flatten_paths(found.get(item) or {})


def load_items(path: Path, trees: Mapping[str, PyTree]) -> dict[str, Any]:
    """Loads the items in `trees`, and all JSON items, from a checkpoint.

    Args:
        path: the checkpoint.
        trees: item name -> nested dicts of abstract arrays, whose shapes, dtypes and shardings the
            loaded arrays get.

    Returns:
        Item name -> loaded value.

    Raises:
        ValueError: the saved arrays of an item have other paths or shapes than its abstract arrays.
    """
    for item, abstract in trees.items():
        _check_arrays(path, item, flatten_paths(abstract), saved_arrays(path, item))
    wanted = {item: abstract for item, abstract in trees.items() if abstract}
    wanted |= {item: None for item in JSON_ITEMS if (path / item).is_dir()}
    with orbax_context():
        loaded = ocp.load_checkpointables(path, wanted)
    return {item: {} for item in trees} | dict(loaded)


def _check_arrays(
    path: Path, item: str, expected: Mapping[str, Any], saved: Mapping[str, Any]
) -> None:
    """Raises ValueError if the saved arrays of an item differ from the expected ones."""
    where = f"checkpoint {path}: {item}"
    for name, leaf in expected.items():
        if name in saved and tuple(saved[name].shape) != tuple(leaf.shape):
            raise ValueError(
                f"{where}/{name} has shape {tuple(saved[name].shape)}, not {tuple(leaf.shape)}; "
                "build the model with the config in the checkpoint's metadata"
            )
    cause = "model config" if item == "params" else "optimizer and trainable mask"
    for names, difference, pool in (
        (expected.keys() - saved.keys(), "is missing {} arrays", saved),
        (saved.keys() - expected.keys(), "has {} additional arrays", expected),
    ):
        if names:
            name = min(names)
            near = difflib.get_close_matches(name, pool, n=1)
            hint = f" (nearest: {near[0]})" if near else ""
            raise ValueError(
                f"{where} {difference.format(len(names))} such as {name}{hint}; "
                f"use the {cause} that it was saved with"
            )


def to_json(value: Any, name: str) -> Any:
    """Converts a value to JSON values: NumPy scalars to Python numbers, and arrays to lists.

    Args:
        value: numbers, strings, lists and dicts.
        name: name of the value in the error message.

    Raises:
        ValueError: the value contains something that JSON cannot represent.

    Example:
        >>> to_json({"seed": np.int64(3), "betas": (0.9, 0.999)}, "metadata")
        {'seed': 3, 'betas': [0.9, 0.999]}
    """

    def convert(item: Any) -> Any:
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        raise ValueError(
            f"{name} contains a {type(item).__name__}, which JSON cannot represent; use numbers, "
            "strings, lists and dicts"
        )

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
    if values["impl"] is None:
        return data
    return jax.random.wrap_key_data(data, impl=values["impl"])
