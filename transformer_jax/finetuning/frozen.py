"""Frozen parameters: kernels in bfloat16 or int8, and cached features of a frozen model."""

import functools
import re
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.finetuning.peft import PEFT_PARAM, float32_matrix
from transformer_jax.finetuning.select import EXTRA_TOKENS, new_param_patterns
from transformer_jax.models import Model
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

DTYPES = ("float32", "bfloat16", "int8")


def quantize_frozen(params: PyTree, mask: PyTree, dtype: str) -> tuple[PyTree, PyTree]:
    """Converts frozen kernels and embeddings to "bfloat16" or "int8"; "float32" changes nothing.

    Only frozen weights are converted, so gradients and updates stay float32, as do biases,
    LayerNorms and PEFT parameters. int8 is symmetric: each column of a kernel (each row of an
    embedding) is divided by a scale, its largest absolute value / 127, and rounded. `kernel` is
    replaced by `kernel_int8` and `kernel_scale`, which layers use without a float32 copy.

    Args:
        params: parameters.
        mask: True at trainable parameters, which are not converted.
        dtype: dtype of the frozen weights.

    Returns:
        (params, mask) after the conversion.

    Raises:
        ValueError: `dtype` is not supported.

    Example:
        >>> params = {"kernel": jnp.array([[0.5, 2.0], [-1.0, 1.0]]), "bias": jnp.zeros(2)}
        >>> params, _ = quantize_frozen(params, {"kernel": False, "bias": False}, "int8")
        >>> sorted(params), params["kernel_int8"].tolist()
        (['bias', 'kernel_int8', 'kernel_scale'], [[64, 127], [-127, 64]])
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"unsupported dtype {dtype!r} of frozen weights; supported: {', '.join(DTYPES)}")
    is_trainable = flatten_paths(mask)
    converted: dict[str, jax.Array] = {}
    for path, leaf in flatten_paths(params).items():
        is_weight = re.search(r"(^|/)(kernel|embedding)$", path) and not PEFT_PARAM.search(path)
        if dtype == "float32" or is_trainable[path] or not is_weight:
            converted[path] = leaf
        elif dtype == "bfloat16":
            converted[path] = leaf.astype(jnp.bfloat16)
        else:
            converted[f"{path}_int8"], converted[f"{path}_scale"] = _quantize_int8(path, leaf)
    return unflatten_paths(converted), unflatten_paths(
        {path: is_trainable.get(path, False) for path in converted})


def _quantize_int8(path: str, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (int8 values, scale). The input axes of a kernel, or D of an embedding, share it."""
    num_output_axes = 2 if re.search(r"/(query|key|value)/kernel$", path) else 1
    axes = (1,) if path.endswith("embedding") else tuple(range(leaf.ndim - num_output_axes))
    leaf = leaf.astype(jnp.float32)
    absmax = jnp.abs(leaf).max(axes, keepdims=True)
    scale = jnp.where(absmax > 0, absmax / 127, 1.0)
    return jnp.round(leaf / scale).astype(jnp.int8), scale.squeeze(axes)


def dequantize(params: PyTree) -> PyTree:
    """Converts bfloat16 and int8 parameters to float32 under their original paths; the rounding
    errors remain."""
    leaves = flatten_paths(params)
    converted: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        if path.endswith("_int8"):
            path = path.removesuffix("_int8")
            layer, _, name = path.rpartition("/")
            converted[path] = float32_matrix(leaves, layer, name)
        elif not path.endswith(("kernel_scale", "embedding_scale")):
            converted[path] = leaf.astype(jnp.float32)
    return unflatten_paths(converted)


# Cached features ----------------------------------------------------------------------------------

# If only the head is trained, the features that the frozen model computes for an example are the
# same in every epoch, and one forward pass over the data computes them all. Dropout in the frozen
# model is off, as the features would otherwise differ between epochs; in the classifier it stays.

_INPUTS = ("tokens", "segment_ids", "padding_mask", "last_positions")


def is_head_only(mask: PyTree) -> bool:
    """Whether only the classifier is trained (and the pooler of an encoder-decoder)."""
    is_trainable = flatten_paths(mask)
    patterns = [p for p in new_param_patterns(list(is_trainable)) if p != EXTRA_TOKENS]
    trainable = [path for path, value in is_trainable.items() if value]
    return bool(trainable) and all(
        any(re.search(pattern, path) for pattern in patterns) for path in trainable)


def compute_features(
    model: Model, params: PyTree, batches: Iterable[dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Computes the features of all examples; padding examples, of weight 0, are left out.

    Batches have "tokens" `[B, T]` (`[B, R, T]` for R choices, or for pairs in R = 2 orders),
    "weights" `[B]` and other arrays with B rows. A row has float32 features `[D]` or `[R, D]` as
    "tokens", and the labels and weights of its example.
    """
    rows: list[dict[str, np.ndarray]] = []
    for batch in batches:
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        columns = {name: value for name, value in batch.items() if name not in _INPUTS}
        columns["tokens"] = np.asarray(_features(model, params, inputs))
        rows += [{name: value[i] for name, value in columns.items()}
                 for i in np.flatnonzero(np.asarray(batch["weights"]) > 0)]
    return rows


@functools.partial(jax.jit, static_argnames="model")
def _features(model: Model, params: PyTree, inputs: dict[str, jax.Array]) -> jax.Array:
    batch_shape = inputs["tokens"].shape[:-1]
    flat = {name: value.reshape(-1, *value.shape[len(batch_shape):])
            for name, value in inputs.items()}
    tokens = flat.pop("tokens")
    features = model.apply({"params": params}, tokens, method="features", **flat)
    return features.reshape(*batch_shape, features.shape[-1]).astype("float32")


def make_features_apply(apply: Callable) -> Callable:
    """Returns a replacement for a model's `apply`, for batches whose "tokens" are cached features.

    Pass it to `objectives.classification.classification_loss`. It computes only the classification
    head, so it accepts only the method "classification_logits".
    """

    def features_apply(variables, features, *, method, deterministic=True, rngs=None, **inputs):
        if method != "classification_logits":
            raise ValueError(f"unsupported method {method!r} for cached features; supported: "
                             "classification_logits")
        return apply(variables, features, deterministic=deterministic,
                     method="logits_from_features", rngs=rngs)

    return features_apply
