"""Products with weight matrices: as stored, in int8 with scales, and transposed for decoding.

A layer uses these parameters instead of `kernel` or `embedding` whenever they are present:

| parameters                       | from                        | meaning                         |
|----------------------------------|-----------------------------|---------------------------------|
| `kernel_int8`, `kernel_scale`    | `finetuning.frozen`         | int8, a scale for each output   |
| `embedding_int8`, `..._scale`    | `finetuning.frozen`         | int8, a scale for each row      |
| `kernel_t`, `kernel_t_scale`     | `generation.decoding`       | transposed to [out, in]         |
| `embedding_t`, `..._t_scale`     | `generation.decoding`       | as `embedding_int8`             |

If `kernel_t` is int8, its layer also rounds its inputs to int8; so does an output layer with
`embedding_t`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

from transformer_jax.nn import backends

KERNELS = ("kernel_int8", "kernel_t")  # parameters in the place of `kernel`


@backends.dispatched
def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_contracted_axes: int = 1
) -> Array:
    """Contracts the last axes of x with the first axes of a kernel."""
    return jnp.tensordot(x, kernel, axes=num_contracted_axes)


@backends.dispatched
def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """Computes x @ matrix.T, in `dtype`, for a weight matrix that is stored as [out, in]."""
    return jnp.einsum("...D,FD->...F", x, matrix, preferred_element_type=dtype)


@backends.dispatched
def int8_matmul_transposed(x_MD: Int8[Array, "M D"], matrix: Int8[Array, "F D"]) -> Array:
    """Computes x_MD @ matrix.T of int8 operands, in int32."""
    return jnp.einsum("MD,FD->MF", x_MD, matrix, preferred_element_type=jnp.int32)


def matmul_transposed_int8(
    x: Float[Array, "... D"], matrix: Int8[Array, "F D"], scale: Float[Array, "F"]
) -> Float[Array, "... F"]:
    """Computes x @ matrix.T * scale in float32, for an int8 weight matrix stored as [out, in].

    Each row of x is quantized to int8 by its largest absolute value (Dettmers et al. 2022,
    "LLM.int8()", section 3.1, vector-wise quantization). With int8 operands, CPUs use their int8
    instructions and load a quarter of the bytes. The function is not differentiable.
    """
    x_MD = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    absmax_M1 = jnp.abs(x_MD).max(-1, keepdims=True)
    x_scale_M1 = jnp.where(absmax_M1 > 0, absmax_M1 / 127, 1.0)
    y_MF = int8_matmul_transposed(jnp.round(x_MD / x_scale_M1).astype(jnp.int8), matrix)
    return (y_MF.astype(jnp.float32) * x_scale_M1 * scale).reshape(*x.shape[:-1], -1)


def optional_param(module: nn.Module, name: str) -> Array | None:
    """Returns a parameter that `init` does not create (PEFT, int8, transposed); None if absent."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def weight(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Returns (weight, None); or (int8 values, scale) if the weight is quantized."""
    if (quantized := optional_param(module, f"{name}_int8")) is not None:
        return quantized, optional_param(module, f"{name}_scale")
    return module.param(name, init, shape, jnp.float32), None


def dequantize(kernel: Array, scale: Array | None) -> Array:
    """Returns kernel * scale in float32; the scale of a kernel that is not int8 is None."""
    kernel = kernel.astype(jnp.float32)
    return kernel if scale is None else kernel * scale


def float32_kernel(module: nn.Module) -> Array:
    """Returns the kernel of a `Linear` in float32; int8 is dequantized."""
    kernel = optional_param(module, "kernel")
    return dequantize(optional_param(module, "kernel_int8") if kernel is None else kernel,
                      optional_param(module, "kernel_scale"))


def product(module: nn.Module, x: Float[Array, "..."], shape: tuple[int, ...]) -> Array:
    """Computes the product of x with the kernel, of any form and of this shape, of a `Linear`."""
    if (kernel_t := optional_param(module, "kernel_t")) is None:
        kernel, scale = weight(module, "kernel", module.init_kernel, shape)
        y = matmul(x, kernel.astype(module.dtype), module.num_contracted_axes)
        return y if scale is None else y * scale.astype(module.dtype)
    x = x.reshape(*x.shape[: x.ndim - module.num_contracted_axes], -1)
    matrix = kernel_t.reshape(-1, x.shape[-1])  # [out, in]
    if matrix.dtype == jnp.int8:
        scale = optional_param(module, "kernel_t_scale").reshape(-1)
        y = matmul_transposed_int8(x, matrix, scale).astype(module.dtype)
    else:
        y = matmul_transposed(x, matrix.astype(module.dtype))
    return y.reshape(*x.shape[:-1], *module.features)


class Table(NamedTuple):
    """The table of an embedding in any of its forms."""

    values: Float[Array, "V D"]
    scale: Float[Array, "V"] | None  # of each row of an int8 table
    quantize_activations: bool | None  # as in `layers.LazyLogits`


def table(module: nn.Module, init: Callable, shape: tuple[int, int]) -> Table:
    """Returns the table of a `layers.Embed`."""
    if (values := optional_param(module, "embedding_t")) is not None:
        return Table(values, optional_param(module, "embedding_t_scale"), True)
    return Table(*weight(module, "embedding", init, shape), None)


def lookup(table: Table, ids: Array, dtype: jnp.dtype) -> Float[Array, "... D"]:
    """Returns the rows of a table for ids."""
    rows = jnp.take(table.values, ids, axis=0).astype(dtype)
    if table.scale is None:
        return rows
    return rows * jnp.take(table.scale, ids, axis=0)[..., None].astype(dtype)
