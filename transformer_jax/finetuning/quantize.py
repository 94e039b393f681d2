"""The frozen part of a model in fewer bytes: bfloat16, or int8 with a scale for each output.

Only what does not train is shrunk, so gradients and updates stay float32. Layers compute with
shrunk leaves as they find them (`nn.layers`): inputs are multiplied by an int8 kernel as it is, and
the outputs by their scales, so no float32 copy of the kernel is kept.
"""

import re

import jax
import jax.numpy as jnp

from transformer_jax.finetuning.peft import PEFT_PARAM
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

TYPES = ("float32", "bfloat16", "int8")
_MATRIX = re.compile(r"(^|/)(kernel|embedding)$")


def quantize_frozen(params: PyTree, mask: PyTree, dtype: str) -> tuple[PyTree, PyTree]:
    """(parameters, mask) in which frozen kernels and embeddings are of `dtype`.

    int8 rounds each column of a kernel (for an embedding each row) to 127 steps of its largest
    absolute value: leaves `kernel_int8` and `kernel_scale` in the place of `kernel`. Biases, norms
    and deltas stay float32.

    Raises:
        ValueError: an unknown type.
    """
    if dtype not in TYPES:
        raise ValueError(f"frozen parameters of type {dtype!r}; choose one of {', '.join(TYPES)}")
    trains = flatten_paths(mask)
    small: dict[str, jax.Array] = {}
    for path, leaf in flatten_paths(params).items():
        if dtype == "float32" or trains[path] or PEFT_PARAM.search(path) or not _MATRIX.search(path):
            small[path] = leaf
        elif dtype == "bfloat16":
            small[path] = leaf.astype(jnp.bfloat16)
        else:
            small[f"{path}_int8"], small[f"{path}_scale"] = _int8(path, leaf)
    return unflatten_paths(small), unflatten_paths(
        {path: trains.get(path, False) for path in small})


def _int8(path: str, leaf: jax.Array) -> tuple[jax.Array, jax.Array]:
    inputs, leaf = _input_axes(path, leaf.ndim), leaf.astype(jnp.float32)
    largest = jnp.abs(leaf).max(inputs, keepdims=True)
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(leaf / scale).astype(jnp.int8), scale.squeeze(inputs)


def _input_axes(path: str, ndim: int) -> tuple[int, ...]:
    """The axes that one scale spans: those a kernel contracts, or the width of an embedding."""
    if path.endswith("embedding"):
        return (1,)
    outputs = 2 if re.search(r"/(query|key|value)/kernel$", path) else 1
    return tuple(range(ndim - outputs))


def dequantize(params: PyTree) -> PyTree:
    """Float32 parameters again; what int8 rounded stays rounded."""
    leaves = flatten_paths(params)
    whole: dict[str, jax.Array] = {}
    for path, leaf in leaves.items():
        if path.endswith("_int8"):
            path = path.removesuffix("_int8")
            inputs = _input_axes(path, leaf.ndim)
            scale = jnp.expand_dims(leaves[f"{path}_scale"], inputs)
            whole[path] = leaf.astype(jnp.float32) * scale
        elif not path.endswith(("kernel_scale", "embedding_scale")):
            whole[path] = leaf.astype(jnp.float32)
    return unflatten_paths(whole)
