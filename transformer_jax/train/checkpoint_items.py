"""Conversion of train states to and from the items of an Orbax checkpoint."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

JSON_ITEMS = ("step", "rng", "data", "metadata")


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
