"""Parameter trees, addressed by path: the keys of a leaf joined by "/".

An example is "encoder/layer_0/mlp/wi/kernel". Sharding, freezing, weight decay and conversion
select leaves by regular expressions on paths (`first_match`). Paths are defined for every pytree:
Adam's first moment of that kernel, a field of a named tuple in a tuple, has the path
"0/mu/encoder/layer_0/mlp/wi/kernel".
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any
T = TypeVar("T")

LAYERS = "layers"  # the key of the layers that `stack_layers` stacks
_LAYER = re.compile(r"layer_(\d+)")


def path_string(keys: Sequence[Any]) -> str:
    """Converts a JAX key path to a path."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def flatten_paths(tree: PyTree) -> dict[str, Any]:
    """Returns all leaves by path, in JAX's order. None is an empty subtree and not a leaf.

    Raises:
        ValueError: a key of a dict contains "/", which would make paths ambiguous.

    Example:
        >>> flatten_paths({"wi": {"kernel": 1, "bias": None}, "wo": (2, 3)})
        {'wi/kernel': 1, 'wo/0': 2, 'wo/1': 3}
    """
    leaves = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for key in keys:
            if "/" in path_string((key,)):
                raise ValueError(
                    f"the key {path_string((key,))!r} contains '/', which separates the keys of a "
                    "path; use nested dicts instead"
                )
        leaves[path_string(keys)] = leaf
    return leaves


def unflatten_paths(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten_paths` for nested dicts.

    Raises:
        ValueError: a path is both a leaf and the beginning of another path.

    Example:
        >>> unflatten_paths({"wi/kernel": 1, "wi/bias": 2})
        {'wi': {'kernel': 1, 'bias': 2}}
    """
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ValueError(f"the beginning of the path {path!r} is the path of another leaf; "
                                 "rename one of them")
        if name in node:
            raise ValueError(f"the path {path!r} of a leaf is also the beginning of another path; "
                             "rename one of them")
        node[name] = leaf
    return tree


_REQUIRED: Any = object()


def first_match(rules: Sequence[tuple[str, T]], path: str, default: Any = _REQUIRED) -> T:
    r"""Returns the value of the first rule whose regular expression is found in a path.

    Expressions are searched (`re.search`), so a rule for a parameter also matches its optimizer
    state. Anchor them where necessary, for example `(^|/)bias$`.

    Raises:
        ValueError: no rule matches and there is no default.

    Example:
        >>> first_match([("bias$", "replicated"), ("", "sharded")], "encoder/mlp/wi/bias")
        'replicated'
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    if default is _REQUIRED:
        raise ValueError(f"none of {len(rules)} rules matches the path {path!r}; add a last rule "
                         "with the empty expression '', which matches every path")
    return default


def map_paths(fn: Callable[[str, Any], Any], tree: PyTree) -> PyTree:
    """Replaces each leaf by `fn(path, leaf)`.

    Example:
        >>> map_paths(lambda path, leaf: "bias" in path, {"wi": {"kernel": 1, "bias": 2}})
        {'wi': {'bias': True, 'kernel': False}}
    """
    return jax.tree_util.tree_map_with_path(lambda keys, leaf: fn(path_string(keys), leaf), tree)


def partition(tree: PyTree, mask: PyTree) -> tuple[PyTree, PyTree]:
    """Splits a tree into (selected, rest): the leaves where a mask is true, and the others.

    Both have the nested dicts of `tree`, with None in place of the leaves of the other. None is an
    empty subtree in JAX: `jax.grad` does not differentiate it, and an optimizer has no state for
    it.

    Example:
        >>> partition({"kernel": 1, "bias": 2}, {"kernel": False, "bias": True})
        ({'bias': 2, 'kernel': None}, {'bias': None, 'kernel': 1})
    """
    selected = jax.tree.map(lambda keep, leaf: leaf if keep else None, mask, tree)
    rest = jax.tree.map(lambda keep, leaf: None if keep else leaf, mask, tree)
    return selected, rest


def combine(selected: PyTree, rest: PyTree) -> PyTree:
    """Joins two trees from `partition`.

    Raises:
        ValueError: a leaf is in both trees.

    Example:
        >>> combine({"bias": 2, "kernel": None}, {"bias": None, "kernel": 1})
        {'bias': 2, 'kernel': 1}
    """

    def pick(keys: Sequence[Any], a: Any, b: Any) -> Any:
        if a is not None and b is not None:
            raise ValueError(f"{path_string(keys)!r} is in both trees; combine trees that were "
                             "partitioned by the same mask")
        return b if a is None else a

    return jax.tree_util.tree_map_with_path(pick, selected, rest, is_leaf=lambda x: x is None)


def count(tree: PyTree) -> int:
    """Returns the number of elements of all leaves, which are real or abstract arrays.

    Example:
        >>> count({"kernel": np.ones((2, 3)), "bias": np.ones(3)})
        9
    """
    return sum(int(np.prod(np.shape(leaf))) for leaf in jax.tree.leaves(tree))


class LoadReport(NamedTuple):
    """Sorted paths: loaded from the source, new (in the target only), unused (in the source only).
    """

    loaded: list[str]
    new: list[str]
    unused: list[str]

    def __str__(self) -> str:
        def examples(paths: list[str]) -> str:
            return f" ({', '.join(paths[:4])}{', ...' if len(paths) > 4 else ''})" if paths else ""

        return (
            f"loaded {len(self.loaded)} parameters, {len(self.new)} new{examples(self.new)}, "
            f"{len(self.unused)} unused{examples(self.unused)}"
        )


def restore_partial(target: PyTree, source: PyTree) -> tuple[PyTree, LoadReport]:
    """Replaces the leaves of `target` by those of `source` with the same path.

    The new values get the dtypes of the leaves that they replace and, if these are JAX arrays,
    their shardings. Also returns a report of the loaded, new and unused paths.

    Raises:
        ValueError: shapes differ (the message lists all paths), or no path is in both trees.

    Example:
        >>> target = {"encoder": {"scale": jnp.zeros(2)}, "classifier": {"bias": jnp.zeros(3)}}
        >>> params, report = restore_partial(target, {"encoder": {"scale": np.ones(2)}})
        >>> print(report)
        loaded 1 parameters, 1 new (classifier/bias), 0 unused
    """
    target_leaves, source_leaves = flatten_paths(target), flatten_paths(source)
    common = sorted(target_leaves.keys() & source_leaves.keys())
    report = LoadReport(
        common,
        sorted(target_leaves.keys() - source_leaves.keys()),
        sorted(source_leaves.keys() - target_leaves.keys()),
    )
    mismatches = [
        f"{path} has shape {np.shape(source_leaves[path])}, not {np.shape(target_leaves[path])}"
        for path in common
        if np.shape(source_leaves[path]) != np.shape(target_leaves[path])
    ]
    if mismatches:
        raise ValueError(
            f"{len(mismatches)} of {len(common)} parameters do not fit: {'; '.join(mismatches)}; "
            "build the model with the config of the source"
        )
    if not common:
        raise ValueError(
            f"none of the {len(source_leaves)} parameters of the source is in the target, which "
            f"has {', '.join(sorted(target_leaves)[:3])}, ...; load parameters of the same model "
            "family"
        )

    def copy(path: str, leaf: Any) -> Any:
        if path not in source_leaves:
            return leaf
        value = jnp.asarray(source_leaves[path], leaf.dtype)
        has_sharding = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        return jax.device_put(value, leaf.sharding) if has_sharding else value

    return map_paths(copy, target), report


def stack_layers(tree: PyTree) -> PyTree:
    """Stacks the subtrees layer_0 ... layer_{n-1} into one subtree "layers" with a leading axis n.

    Layers are stacked at any depth. `jax.lax.scan` over layers and its checkpoints use the stacked
    form; fine-tuning and conversion need one subtree per layer (`unstack_layers`).

    Raises:
        ValueError: the layers are not numbered from 0 without a gap, or differ in structure or
            shape.

    Example:
        >>> layer = {"bias": np.ones(3)}
        >>> stack_layers({"layer_0": layer, "layer_1": layer})["layers"]["bias"].shape
        (2, 3)
    """
    if not isinstance(tree, Mapping):
        return tree
    layers = {int(m[1]): tree[key] for key in tree if (m := _LAYER.fullmatch(str(key)))}
    others = {key: stack_layers(sub) for key, sub in tree.items() if not _LAYER.fullmatch(str(key))}
    if not layers:
        return others
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(
            f"the layers are numbered {sorted(layers)}; number them from 0 without a gap"
        )
    ordered = [layers[i] for i in range(len(layers))]
    shapes = [{p: np.shape(leaf) for p, leaf in flatten_paths(layer).items()} for layer in ordered]
    for i, layer_shapes in enumerate(shapes):
        if layer_shapes != shapes[0]:
            different = sorted(dict(layer_shapes.items() ^ shapes[0].items()))
            raise ValueError(
                f"layer_{i} differs from layer_0 in {', '.join(different)}; only layers with the "
                "same parameters and shapes can be stacked"
            )
    return {**others, LAYERS: jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)}


def unstack_layers(tree: PyTree) -> PyTree:
    """The inverse of `stack_layers`: each subtree "layers" becomes layer_0 ... layer_{n-1}.

    Example:
        >>> sorted(unstack_layers({"layers": {"bias": np.ones((2, 3))}}))
        ['layer_0', 'layer_1']
    """
    if not isinstance(tree, Mapping):
        return tree
    out = {key: unstack_layers(sub) for key, sub in tree.items() if key != LAYERS}
    if LAYERS in tree:
        leaves = jax.tree.leaves(tree[LAYERS])
        for i in range(leaves[0].shape[0] if leaves else 0):
            out[f"layer_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], tree[LAYERS])
    return out
