"""Products of activations with weight matrices, in floating point or int8.

The results are the same on all platforms, up to rounding. The separate code paths for CPUs avoid
slow matmuls of XLA.

Shape suffixes: D input features, F output features, M the product of all leading axes.
"""

import math

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

# Up to this number of rows, the CPU path of `matmul_transposed` was measured to be faster.
MATVEC_MAX_ROWS = 32


def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_contracted_axes: int = 1
) -> Array:
    """Contracts the last axes of x with the first axes of a kernel.

    The operands are reshaped to matrices. Otherwise XLA on CPU transposes the operands of both
    gradient matmuls in memory, which takes 2 % of the time of GPT-2's training step. On a mesh the
    operands keep their axes, because the reshape would merge axes that may be sharded.

    Args:
        x: inputs.
        kernel: the kernel; its first axes are the contracted ones.
        num_contracted_axes: the number of axes that are contracted.

    Example:
        >>> x, kernel = jnp.ones((2, 5, 4, 8)), jnp.ones((4, 8, 16))
        >>> matmul(x, kernel, num_contracted_axes=2).shape
        (2, 5, 16)
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.tensordot(x, kernel, axes=num_contracted_axes)
    fan_in = math.prod(kernel.shape[:num_contracted_axes])
    y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1)
    return y.reshape(*x.shape[: x.ndim - num_contracted_axes], *kernel.shape[num_contracted_axes:])


def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """Computes x @ matrix.T, for a weight matrix that is stored as [out, in].

    XLA on CPU repacks the right operand of a matmul in every call. For the few rows of a decoding
    step this takes as long as the matmul itself, so for up to `MATVEC_MAX_ROWS` rows the weight
    matrix is the left operand. A single bfloat16 row would run in XLA's slowest loop, so it is
    duplicated.

    Args:
        x: inputs.
        matrix: the weight matrix.
        dtype: the dtype of the result; None for that of the operands.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.einsum("...D,FD->...F", x, matrix, preferred_element_type=dtype)
    num_rows = math.prod(x.shape[:-1])
    x_MD = x.reshape(num_rows, x.shape[-1])
    if num_rows > MATVEC_MAX_ROWS or jax.default_backend() != "cpu":
        y_MF = jnp.einsum("MD,FD->MF", x_MD, matrix, preferred_element_type=dtype)
        return y_MF.reshape(*x.shape[:-1], -1)
    if num_rows == 1 and matrix.dtype != jnp.float32:
        x_MD = jnp.concatenate([x_MD, x_MD])
    y_FM = jnp.einsum("FD,MD->FM", matrix, x_MD, preferred_element_type=dtype)
    # Without the barrier, XLA rewrites the transposed product with its operands swapped.
    y_MF = jax.lax.optimization_barrier(y_FM)[:, :num_rows].T
    return y_MF.reshape(*x.shape[:-1], -1)


def matmul_transposed_int8(
    x: Float[Array, "... D"], matrix: Int8[Array, "F D"], scale: Float[Array, "F"]
) -> Float[Array, "... F"]:
    """Computes x @ matrix.T * scale in float32, for an int8 weight matrix stored as [out, in].

    Each row of x is quantized to int8 by its largest absolute value (Dettmers et al. 2022,
    "LLM.int8()", section 2.2, vector-wise quantization). With int8 operands, CPUs use their int8
    instructions and load a quarter of the bytes. The function is not differentiable. A single row
    is duplicated, as in `matmul_transposed`.
    """
    x_MD = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    num_rows = len(x_MD)
    absmax_M1 = jnp.abs(x_MD).max(-1, keepdims=True)
    x_scale_M1 = jnp.where(absmax_M1 > 0, absmax_M1 / 127, 1.0)
    quantized_MD = jnp.round(x_MD / x_scale_M1).astype(jnp.int8)
    if num_rows == 1:
        quantized_MD = jnp.concatenate([quantized_MD, quantized_MD])
    y_FM = jnp.einsum("FD,MD->FM", matrix, quantized_MD, preferred_element_type=jnp.int32)
    # As in `matmul_transposed`.
    y_MF = jax.lax.optimization_barrier(y_FM)[:, :num_rows].T
    return (y_MF.astype(jnp.float32) * x_scale_M1 * scale).reshape(*x.shape[:-1], -1)
