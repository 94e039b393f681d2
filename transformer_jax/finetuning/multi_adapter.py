"""Several tasks in one batch: each row by the delta of its own task, on one base in memory.

    stacked = stack_deltas([load_delta(folder, base) for folder in folders], base)
    serve = jax.jit(functools.partial(apply_each, model.apply, method="classification_logits"))
    logits = serve(base, stacked, task_ids, tokens, padding_mask=padding_mask)
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from transformer_jax.finetuning.adapter_io import SavedAdapter, apply_adapter, peft_param_paths
from transformer_jax.finetuning.peft import Leaves, column_norms, float_matrix
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths


class StackedAdapters(NamedTuple):
    """Deltas made alike: every leaf `[K, ...]` for K tasks."""

    params: PyTree
    classes: Int[Array, "K"] | None  # of each task's classifier; None where they do not differ


def stack_adapters(deltas: Sequence[SavedAdapter | PyTree], base: PyTree) -> StackedAdapters:
    """Deltas of several tasks made alike, for `apply_each`; a task's number is its place here.
    Whole parameters of a task will do as well: what is the base's is not stacked.

    Everything is exact: ranks, widths of adapters and classes are filled up with zeros; a missing
    LoRA or adapter is one of zeros, a missing IA3 of ones; DoRA becomes LoRA and a factor on the
    outputs; where one task trained a leaf of the base and another did not, that one has the
    base's. Dropout of LoRA is left out.

    Raises:
        ValueError: there are no deltas, none adds anything to the base, or they cannot be made
            alike: prefixes or prompts that some lack or that differ in length, or a task without a
            classifier.
    """
    if not deltas:
        raise ValueError("there are 0 deltas; give at least one")
    before = flatten_paths(base)
    tasks = [_without_dora(flatten_paths(apply_adapter(base, delta))) for delta in deltas]
    changed = {path for task in tasks for path, leaf in task.items()
               if not _same(leaf, before.get(path))}.union(*map(peft_param_paths, tasks))
    made = {}
    for path in sorted(changed):
        found = [_filled(path, i, tasks) for i in range(len(tasks))]
        shapes = {leaf.shape for leaf in found}
        if len(shapes) > 1:
            if not _PADDED.search(path):
                raise ValueError(f"{path} has the shapes {', '.join(map(str, sorted(shapes)))} in "
                                 "these deltas; tasks of one batch need one shape")
            largest = np.max([leaf.shape for leaf in found], axis=0)
            found = [jnp.pad(leaf, [(0, most - size) for most, size in zip(largest, leaf.shape)])
                     for leaf in found]
        made[path] = jnp.stack(found)
    if not made:
        raise ValueError(f"none of the {len(deltas)} deltas differs from the base; call the model "
                         "itself, or give the deltas that were trained")
    classes = [task["classifier/kernel"].shape[-1] for task in tasks
               if "classifier/kernel" in task]
    return StackedAdapters(unflatten_paths(made),
                   jnp.asarray(classes) if len(set(classes)) > 1 else None)


def _same(leaf: Array, before: Array | None) -> bool:
    return leaf is before or (before is not None and leaf.dtype == before.dtype
                              and np.array_equal(leaf, before))


_PADDED = re.compile(r"/lora_(a|b)$|_adapter/|(^|/)classifier/|/extra$")
_ZEROS = re.compile(r"/lora_\w+$|_adapter/|(^|/)classifier/bias$|/extra$")


def _filled(path: str, i: int, tasks: Sequence[Leaves]) -> Array:
    """The leaf of task i, or what is the same as not having it."""
    if path in tasks[i]:
        return tasks[i][path]
    if f"{path}_int8" in tasks[i]:
        layer, _, name = path.rpartition("/")
        return float_matrix(tasks[i], layer, name)
    like = next(task[path] for task in tasks if path in task)
    if _ZEROS.search(path):
        return jnp.zeros_like(like)
    if "/ia3_" in path:
        return jnp.ones_like(like)
    raise ValueError(f"task {i} has no {path}, and others do; no value of it would be the same as "
                     "none, so serve such tasks in batches of their own")


def _without_dora(leaves: Leaves) -> Leaves:
    """m (x W + s x A B) / |W + s A B| + b as IA3 writes it, (x W + s x A B + b / f) f, so that no
    row needs the norm. Dropout of LoRA is left out."""
    plain = {path: leaf for path, leaf in leaves.items()
             if not path.endswith(("/lora_magnitude", "/lora_dropout"))}
    for path, magnitude in leaves.items():
        layer, _, name = path.rpartition("/")
        if name != "lora_magnitude":
            continue
        a, b, scale = (leaves[f"{layer}/lora_{part}"] for part in ("a", "b", "scale"))
        whole = float_matrix(leaves, layer) + scale * jnp.tensordot(a, b, axes=1)
        factor = magnitude / column_norms(whole, whole.ndim - magnitude.ndim)
        factor = jnp.where(jnp.abs(factor) < 1e-30, 1e-30, factor)
        plain[f"{layer}/ia3_output"] = factor * plain.get(f"{layer}/ia3_output", 1.0)
        if f"{layer}/bias" in plain:
            plain[f"{layer}/bias"] = plain[f"{layer}/bias"] / factor
    return plain


_SCORES = ("classification_logits", "token_classification_logits", "logits_from_features", "class_logits")


def _method(apply: Callable, kwargs: dict[str, Any]) -> str | None:
    """The name of the model's method, whether it is given by name or not, here or in a partial."""
    found = kwargs.get("method", getattr(apply, "keywords", {}).get("method"))
    return getattr(found, "__name__", found)


def apply_per_row(
    apply: Callable, base: PyTree, stacked: StackedAdapters, task_ids: Int[Array, "B"], *inputs: Array,
    **kwargs: Any,
) -> Any:
    """`apply` of a model to a batch, each row with the delta of its own task.

    The base stays one: its kernels meet all rows in one product, and only edits go by row. A kernel
    that trained whole is by row too. Under jit, for use without dropout.

    Args:
        apply: of a model with as many classes as the task that has most.
        task_ids: places in `stack_deltas`.
        inputs, kwargs: as the model takes them; arrays have rows, whatever else is for all.

    Returns:
        As the model. Class scores of classes that a row's task lacks are -inf. Under jit, where it
        cannot be an error, a row whose task there is not is NaN.

    Raises:
        ValueError: a task's number that there is not, unequal numbers of rows, or tasks of unlike
            numbers of classes and no `method` by name.
    """
    count = jax.tree.leaves(stacked.params)[0].shape[0]
    if not isinstance(task_ids, jax.core.Tracer):
        wrong = [int(i) for i in np.asarray(task_ids) if not 0 <= i < count]
        if wrong:
            raise ValueError(f"task {wrong[0]} is outside the {count} tasks 0 to {count - 1}")
    task_ids = jnp.asarray(task_ids)
    rows = {name: value for name, value in kwargs.items()
            if isinstance(value, jax.Array | np.ndarray)}
    others = {name: value for name, value in kwargs.items() if name not in rows}
    for value in (*inputs, *rows.values()):
        if len(value) != len(task_ids):
            raise ValueError(f"an input has {len(value)} rows, and there are {len(task_ids)} task "
                             "numbers; give one for each row")

    def one(delta, row):
        inputs, named = jax.tree.map(lambda x: x[None], row)
        out = apply({"params": apply_adapter(base, delta)}, *inputs, **named, **others)
        return jax.tree.map(lambda x: x[0], out)

    method = _method(apply, kwargs)
    if stacked.classes is not None and method is None:
        raise ValueError("these tasks have unlike numbers of classes, and it is not known whether "
                         "the model gives class scores; name its method, such as method='classify'")
    own = jax.tree.map(lambda leaf: leaf[task_ids], stacked.params)
    out = jax.vmap(one)(own, (tuple(map(jnp.asarray, inputs)), jax.tree.map(jnp.asarray, rows)))
    there = (task_ids >= 0) & (task_ids < count)
    out = jax.tree.map(lambda x: jnp.where(there.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)
                       if jnp.issubdtype(x.dtype, jnp.floating) else x, out)
    if stacked.classes is None or method not in _SCORES:
        return out
    has = jnp.arange(out.shape[-1]) < stacked.classes[task_ids].reshape(-1, *[1] * (out.ndim - 1))
    return jnp.where(has | jnp.isnan(out), out, -jnp.inf)
