"""Parameter trees by path.

Parameters are plain nested dicts of arrays. The *path* of a leaf is its keys joined by "/", for
example "encoder/layer_0/mlp/wi/kernel". Sharding, freezing, weight decay and conversion all speak
about leaves through such paths, and all through one mechanism, `first_match`.

Paths exist for every pytree, not only dicts: fields of a named tuple go by name and elements of a
sequence by index, so Adam's first moment of that kernel is "0/mu/encoder/layer_0/mlp/wi/kernel".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
T = TypeVar("T")

LAYERS = "layers"  # where `stack_layers` puts the stacked layer_0 ... layer_{n-1}
_LAYER = re.compile(r"layer_(\d+)")


def path_string(keys: Sequence[Any]) -> str:
    """The path of JAX's key path, `(DictKey("mlp"), DictKey("wi"))` -> "mlp/wi"."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def flatten_paths(tree: PyTree) -> dict[str, Any]:
    """All leaves by path, in JAX's order. None is an empty subtree, not a leaf.

    Raises:
      ValueError: a key of a dict contains "/", which would make paths ambiguous.
    """
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for key in keys:
            if "/" in path_string((key,)):
                raise ValueError(
                    f"the key {path_string((key,))!r} contains '/', which separates the keys of a "
                    "path; nest dicts instead"
                )
        leaves[path_string(keys)] = leaf
    return leaves


def unflatten_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict with these leaves: the inverse of `flatten_paths` for nested dicts.

    Raises:
      ValueError: one path continues another, so that it would be both a leaf and a subtree.
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path!r} continues another leaf's path; rename one of them")
        if name in node:
            raise ValueError(f"{path!r} is a leaf and also begins other paths; rename one of them")
        node[name] = leaf
    return tree


_REQUIRED: Any = object()


def first_match(rules: Sequence[tuple[str, T]], path: str, default: Any = _REQUIRED) -> T:
    r"""The value of the first rule whose regular expression is found in the path.

    Rules match by `re.search`: they say which *part* of a path matters, so that the same rule also
    finds the optimizer state of a parameter. Anchor them where it counts: `(^|/)bias$`.

    Raises:
      ValueError: no rule matches and there is no default.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    if default is _REQUIRED:
        raise ValueError(f"none of {len(rules)} rules matches {path!r}; add a last rule '' for it")
    return default


def map_paths(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """The tree of the same structure with `fn(path, leaf)` at each leaf."""
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: fn(path_string(keys), leaf), tree)


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """(selected, rest): the leaves where `mask` is true and where it is not.

    Both have the dicts of `tree`, with None in the gaps. To JAX None is an empty subtree, so
    `jax.grad` does not differentiate a gap and an optimizer keeps no state for it.
    """
    selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return selected, rest


def combine(selected: PyTree, rest: PyTree) -> PyTree:
    """The tree of which `selected` and `rest` are the parts: the inverse of `split`.

    Raises:
      ValueError: a leaf is in both.
    """

    def pick(keys: Sequence[Any], ours: Any, theirs: Any) -> Any:
        if ours is not None and theirs is not None:
            raise ValueError(f"{path_string(keys)!r} is in both trees; split them by one mask")
        return theirs if ours is None else ours

    return jax.tree_util.tree_map_with_path(pick, selected, rest, is_leaf=lambda x: x is None)


def count(tree: PyTree) -> int:
    """The number of elements in all leaves, of arrays or of abstract arrays."""
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


class LoadReport(NamedTuple):
    """What `load_into` did, as sorted paths."""

    loaded: list[str]
    new: list[str]  # in the target only: they keep their fresh values
    unused: list[str]  # in the source only: they were left out

    def __str__(self) -> str:
        def some(paths: list[str]) -> str:
            return f" ({', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''})" if paths else ""

        return (
            f"loaded {len(self.loaded)} parameters, "
            f"{len(self.new)} new{some(self.new)}, {len(self.unused)} unused{some(self.unused)}"
        )


def restore_partial(target: PyTree, source: PyTree) -> tuple[PyTree, LoadReport]:
    """`target` with every leaf that `source` has at the same path, and a report of what happened.

    Values take the target's dtype and, where the target's leaf is a JAX array, its sharding.

    Raises:
      ValueError: a shape differs (all such leaves are named with both shapes), or no path of the
        source is in the target.
    """
    ours, theirs = flatten_paths(target), flatten_paths(source)
    common = sorted(ours.keys() & theirs.keys())
    report = LoadReport(
        common, sorted(ours.keys() - theirs.keys()), sorted(theirs.keys() - ours.keys())
    )
    misfits = [
        f"{path} has shape {np.shape(theirs[path])}, not {np.shape(ours[path])}"
        for path in common
        if np.shape(theirs[path]) != np.shape(ours[path])
    ]
    if misfits:
        raise ValueError(
            f"{len(misfits)} of {len(common)} parameters do not fit: {'; '.join(misfits)}; "
            "build the model with the configuration of the source"
        )
    if not common:
        raise ValueError(
            f"none of the source's {len(theirs)} parameters is in the target, which has "
            f"{', '.join(sorted(ours)[:3])}, ...; load parameters of the same kind of model"
        )

    def copy(path: str, leaf: Any) -> Any:
        if path not in theirs:
            return leaf
        value = jnp.asarray(theirs[path], leaf.dtype)
        placed = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        return jax.device_put(value, leaf.sharding) if placed else value

    return map_paths(copy, target), report


def stack_layers(tree: PyTree) -> PyTree:
    """Every group layer_0 ... layer_{n-1} as one subtree "layers" with a leading axis of length n.

    This is the form that `jax.lax.scan` over layers takes; the tree of single layers is the one
    that is stored, frozen and converted. Siblings of the layers stay as they are.

    Raises:
      ValueError: the numbers have a gap, or the layers differ in structure or shape.
    """
    if not isinstance(tree, Mapping):
        return tree
    layers = {int(m[1]): tree[key] for key in tree if (m := _LAYER.fullmatch(str(key)))}
    rest = {key: stack_layers(sub) for key, sub in tree.items() if not _LAYER.fullmatch(str(key))}
    if not layers:
        return rest
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(
            f"the layers are numbered {sorted(layers)}; number them from 0 without a gap"
        )
    ordered = [layers[i] for i in range(len(layers))]
    shapes = [{p: np.shape(leaf) for p, leaf in flatten_paths(layer).items()} for layer in ordered]
    for i, found in enumerate(shapes):
        if found != shapes[0]:
            odd = sorted(dict(found.items() ^ shapes[0].items()))
            raise ValueError(
                f"layer_{i} differs from layer_0 in {', '.join(odd)}; only equal layers stack"
            )
    return {**rest, LAYERS: jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)}


def unstack_layers(tree: PyTree) -> PyTree:
    """The inverse of `stack_layers`: each subtree "layers" as layer_0 ... layer_{n-1}."""
    if not isinstance(tree, Mapping):
        return tree
    out = {key: unstack_layers(sub) for key, sub in tree.items() if key != LAYERS}
    if LAYERS in tree:
        leaves = jax.tree.leaves(tree[LAYERS])
        for i in range(leaves[0].shape[0] if leaves else 0):
            out[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], tree[LAYERS])
    return out
