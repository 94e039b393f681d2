"""Batches whose rows use different adapters, on one copy of the base parameters.

    adapters = [load_adapter(folder, base) for folder in folders]
    stacked = stack_adapters(adapters, base)
    serve = jax.jit(functools.partial(apply_per_row, model.apply, method="classification_logits"))
    logits = serve(base, stacked, adapter_ids, tokens, padding_mask=padding_mask)
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Int

from transformer_jax.finetuning.adapter_io import SavedAdapter, apply_adapter, peft_param_paths
from transformer_jax.finetuning.peft import Leaves, column_norms, float32_matrix
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths


class StackedAdapters(NamedTuple):
    """K adapters with a common structure, padded to common shapes; parameters are `[K, ...]`.

    `num_classes` is that of each adapter's classifier; None if all are equal.
    """

    params: PyTree
    num_classes: Int[Array, "K"] | None


def stack_adapters(adapters: Sequence[SavedAdapter | PyTree], base: PyTree) -> StackedAdapters:
    """Stacks adapters of the same base for `apply_per_row`; the id of an adapter is its index.

    The adapters may have different structures; stacking does not change their outputs. LoRA ranks,
    adapter widths, and numbers of classes and added tokens are padded with zeros. Where only some
    of the adapters have a LoRA or bottleneck adapter, the others get zeros; for IA3 they get ones;
    for a trained parameter of the base, they get the value of the base. DoRA is converted to LoRA
    and a scale of the outputs. LoRA dropout is removed. An element may also be the complete
    parameters of a fine-tuned model; parameters that no model has changed are not stacked.

    Raises:
        ValueError: there are no adapters, none differs from the base, or they cannot be stacked:
            only some of them have prefixes, a prompt or a classifier, or the lengths of prefixes or
            prompts differ.
    """
    if not adapters:
        raise ValueError("there are 0 adapters; give at least one")
    base_leaves = flatten_paths(base)
    models = [_replace_dora(flatten_paths(apply_adapter(base, adapter))) for adapter in adapters]
    changed = {path for leaves in models for path, leaf in leaves.items()
               if not _is_same(leaf, base_leaves.get(path))}.union(*map(peft_param_paths, models))
    stacked = {}
    for path in sorted(changed):
        values = [_leaf_or_neutral(path, i, models) for i in range(len(models))]
        shapes = {leaf.shape for leaf in values}
        if len(shapes) > 1:
            if not _PADDED.search(path):
                raise ValueError(f"{path} has the shapes {', '.join(map(str, sorted(shapes)))} in "
                                 "these adapters; adapters of one batch need one shape")
            max_shape = np.max([leaf.shape for leaf in values], axis=0)
            values = [jnp.pad(leaf, [(0, n) for n in max_shape - leaf.shape]) for leaf in values]
        stacked[path] = jnp.stack(values)
    if not stacked:
        raise ValueError(f"none of the {len(adapters)} adapters differs from the base; call the "
                         "base model, or give trained adapters")
    num_classes = [leaves["classifier/kernel"].shape[-1] for leaves in models
                   if "classifier/kernel" in leaves]
    return StackedAdapters(unflatten_paths(stacked),
                           jnp.asarray(num_classes) if len(set(num_classes)) > 1 else None)


def _is_same(leaf: Array, base_leaf: Array | None) -> bool:
    return leaf is base_leaf or (base_leaf is not None and leaf.dtype == base_leaf.dtype
                                 and np.array_equal(leaf, base_leaf))


_PADDED = re.compile(r"/lora_(a|b)$|_adapter/|(^|/)classifier/|/extra$")
_NEUTRAL_ZEROS = re.compile(r"/lora_\w+$|_adapter/|(^|/)classifier/bias$|/extra$")


def _leaf_or_neutral(path: str, i: int, models: Sequence[Leaves]) -> Array:
    """Returns a parameter of model i, or, if it has none, a value without effect."""
    if path in models[i]:
        return models[i][path]
    if f"{path}_int8" in models[i]:
        layer, _, name = path.rpartition("/")
        return float32_matrix(models[i], layer, name)
    other = next(leaves[path] for leaves in models if path in leaves)
    if _NEUTRAL_ZEROS.search(path):
        return jnp.zeros_like(other)
    if "/ia3_" in path:
        return jnp.ones_like(other)
    raise ValueError(f"adapter {i} has no {path}, but another adapter has; no default value would "
                     f"leave the outputs of adapter {i} unchanged, so use separate batches")


def _replace_dora(leaves: Leaves) -> Leaves:
    """Replaces DoRA by LoRA and an IA3 output scale, so that no row needs the column norms.

    With f = m / |W + s A B|, DoRA computes (x W + s x A B) f + b, which equals
    (x W + s x A B + b / f) f. LoRA dropout is removed.
    """
    replaced = {path: leaf for path, leaf in leaves.items()
                if not path.endswith(("/lora_magnitude", "/lora_dropout"))}
    for path, magnitude in leaves.items():
        layer, _, name = path.rpartition("/")
        if name != "lora_magnitude":
            continue
        a, b, scale = (leaves[f"{layer}/lora_{part}"] for part in ("a", "b", "scale"))
        kernel = float32_matrix(leaves, layer) + scale * jnp.tensordot(a, b, axes=1)
        factor = magnitude / column_norms(kernel, kernel.ndim - magnitude.ndim)
        factor = jnp.where(jnp.abs(factor) < 1e-30, 1e-30, factor)
        replaced[f"{layer}/ia3_output"] = factor * replaced.get(f"{layer}/ia3_output", 1.0)
        if f"{layer}/bias" in replaced:
            replaced[f"{layer}/bias"] = replaced[f"{layer}/bias"] / factor
    return replaced


_CLASS_LOGITS_METHODS = ("classification_logits", "token_classification_logits",
                         "logits_from_features", "class_logits")


def _method_name(apply: Callable, kwargs: dict[str, Any]) -> str | None:
    """Returns the name of the model's method, which may be a function or in a partial."""
    given = apply.keywords if isinstance(apply, functools.partial) else {}
    method = (given | kwargs).get("method")
    return method.__name__ if callable(method) else method


def apply_per_row(
    apply: Callable, base: PyTree, stacked: StackedAdapters, adapter_ids: Int[Array, "B"],
    *inputs: Array, **kwargs: Any,
) -> Any:
    """Applies a model to a batch, each row with its own adapter.

    The base is not copied: all rows share one matmul with its kernels, and only the parameters of
    the adapters are gathered for each row. (A kernel of the base that some adapter trained is also
    a parameter of the adapters.) For inference, without dropout; use it under `jit`.

    Args:
        apply: `apply` of a model with the largest number of classes of the adapters.
        base: parameters of the base model.
        stacked: the result of `stack_adapters`.
        adapter_ids: index of each row's adapter.
        inputs: positional arguments of `apply`, each with B rows.
        kwargs: keyword arguments of `apply`; arrays have B rows, other values are shared.

    Returns:
        The output of `apply`. Logits of classes that a row's adapter does not have are -inf. Rows
        with an invalid adapter id are NaN under `jit`, where no error can be raised.

    Raises:
        ValueError: an adapter id is out of range, numbers of rows differ, or numbers of classes
            differ and the method is unknown.
    """
    num_adapters = jax.tree.leaves(stacked.params)[0].shape[0]
    is_known = not isinstance(adapter_ids, jax.core.Tracer)  # also for constants under `jit`
    if is_known and (bad := [int(i) for i in np.asarray(adapter_ids) if not 0 <= i < num_adapters]):
        raise ValueError(f"adapter_ids contains {bad[0]}; it must be from 0 to {num_adapters - 1}")
    adapter_ids = jnp.asarray(adapter_ids)
    is_valid = (adapter_ids >= 0) & (adapter_ids < num_adapters)
    arrays = {name: value for name, value in kwargs.items()
              if isinstance(value, jax.Array | np.ndarray)}
    shared = {name: value for name, value in kwargs.items() if name not in arrays}
    for value in (*inputs, *arrays.values()):
        if len(value) != len(adapter_ids):
            raise ValueError(f"an input has {len(value)} rows but there are {len(adapter_ids)} "
                             "adapter_ids; give one for each row")

    def apply_row(adapter, row):
        args, named_args = jax.tree.map(lambda x: x[None], row)
        out = apply({"params": apply_adapter(base, adapter)}, *args, **named_args, **shared)
        return jax.tree.map(lambda x: x[0], out)

    method = _method_name(apply, kwargs)
    if stacked.num_classes is not None and method is None:
        raise ValueError("the adapters have different numbers of classes, and without a method it "
                         "is unknown whether the output is class logits; pass the method, such as "
                         "method='classification_logits'")
    row_adapters = jax.tree.map(lambda leaf: leaf[adapter_ids], stacked.params)
    rows = tuple(map(jnp.asarray, inputs)), jax.tree.map(jnp.asarray, arrays)
    out = jax.vmap(apply_row)(row_adapters, rows)
    out = jax.tree.map(
        lambda x: jnp.where(is_valid.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)
        if jnp.issubdtype(x.dtype, jnp.floating) else x, out)
    if stacked.num_classes is None or method not in _CLASS_LOGITS_METHODS:
        return out
    num_classes = stacked.num_classes[adapter_ids].reshape(-1, *[1] * (out.ndim - 1))
    has_class = jnp.arange(out.shape[-1]) < num_classes
    return jnp.where(has_class | jnp.isnan(out), out, -jnp.inf)
