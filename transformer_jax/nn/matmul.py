"""Products of activations with weight matrices.

Shape suffixes: D input features, F output features.
"""

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from transformer_jax.nn import backends


@backends.dispatched
def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_contracted_axes: int = 1
) -> Array:
    """Contracts the last axes of x with the first axes of a kernel.

    Args:
        x: inputs.
        kernel: the kernel; its first axes are the contracted ones.
        num_contracted_axes: the number of axes that are contracted.

    Example:
        >>> x, kernel = jnp.ones((2, 5, 4, 8)), jnp.ones((4, 8, 16))
        >>> matmul(x, kernel, num_contracted_axes=2).shape
        (2, 5, 16)
    """
    return jnp.tensordot(x, kernel, axes=num_contracted_axes)


@backends.dispatched
def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """Computes x @ matrix.T, for a weight matrix that is stored as [out, in].

    Args:
        x: inputs.
        matrix: the weight matrix.
        dtype: the dtype of the result; None for that of the operands.
    """
    return jnp.einsum("...D,FD->...F", x, matrix, preferred_element_type=dtype)
