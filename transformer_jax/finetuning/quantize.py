"""Frozen weights in bfloat16, or in int8 with a scale for each output feature.

Only frozen weights are converted, so gradients and updates stay float32. The layers (`nn.layers`)
accept both forms: they multiply the inputs by the int8 kernel and the outputs by the scales,
without a float32 copy of the kernel.
"""

import re

import jax
import jax.numpy as jnp

from transformer_jax.finetuning.peft import PEFT_PARAM, float32_matrix
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

DTYPES = ("float32", "bfloat16", "int8")
_WEIGHT = re.compile(r"(^|/)(kernel|embedding)$")


def quantize_frozen(params: PyTree, mask: PyTree, dtype: str) -> tuple[PyTree, PyTree]:
    """Converts frozen kernels and embeddings to `dtype`.

    int8 is symmetric: each column of a kernel (each row of an embedding) is divided by a scale,
    its largest absolute value / 127, and rounded. `kernel` is replaced by `kernel_int8` and
    `kernel_scale`. Biases, LayerNorms and PEFT parameters stay float32.

    Args:
        params: parameters.
        mask: True at trainable parameters, which are not converted.
        dtype: "float32" (no conversion), "bfloat16" or "int8".

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
        is_weight = _WEIGHT.search(path) and not PEFT_PARAM.search(path)
        if dtype == "float32" or is_trainable[path] or not is_weight:
            converted[path] = leaf
        elif dtype == "bfloat16":
            converted[path] = leaf.astype(jnp.bfloat16)
        else:
            converted[f"{path}_int8"], converted[f"{path}_scale"] = _quantize_int8(path, leaf)
    return unflatten_paths(converted), unflatten_paths(
        {path: is_trainable.get(path, False) for path in converted})


def _quantize_int8(path: str, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (int8 values, scale)."""
    axes, leaf = _reduced_axes(path, leaf.ndim), leaf.astype(jnp.float32)
    absmax = jnp.abs(leaf).max(axes, keepdims=True)
    scale = jnp.where(absmax > 0, absmax / 127, 1.0)
    return jnp.round(leaf / scale).astype(jnp.int8), scale.squeeze(axes)


def _reduced_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Returns the axes that share one scale: the input axes of a kernel, D of an embedding."""
    if path.endswith("embedding"):
        return (1,)
    num_output_axes = 2 if re.search(r"/(query|key|value)/kernel$", path) else 1
    return tuple(range(ndim - num_output_axes))


def dequantize(params: PyTree) -> PyTree:
    """Converts bfloat16 and int8 parameters to float32; the rounding errors remain.

    Args:
        params: parameters from `quantize_frozen`.

    Returns:
        float32 parameters under the original paths.
    """
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
