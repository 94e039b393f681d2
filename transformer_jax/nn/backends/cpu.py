"""Variants for CPUs.

Shape suffixes: B batch, T target length (queries), S source length (keys and values), N heads,
H head_dim, D input features, F output features, M the product of all leading axes.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

from transformer_jax.nn.backends import xla

# Up to this number of rows, `matmul_transposed` was measured to be faster than that of `xla`.
MATVEC_MAX_ROWS = 32


def is_default(*args, **kwargs) -> bool:
    """Returns whether CPUs are the default devices."""
    return jax.default_backend() == "cpu"


def blockwise_attention(
    query_BTNH, key_BSNH, value_BSNH, mask: Any, *, attention_impl: str = "auto",
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, return_weights: bool = False,
) -> tuple[Float[Array, "B T N H"], None]:
    """`attention.dot_product_attention` of causal rows, in blocks of queries.

    The scores of a block are computed only for the keys up to the end of the block, so that part
    of the masked scores is never computed. On accelerators, fused implementations do the same.
    """
    T, S = query_BTNH.shape[1], key_BSNH.shape[1]
    mask_BNTS = mask.to_dense(T, S)
    query_BNTH, key_BNSH, value_BNSH = (
        x.swapaxes(1, 2) for x in (query_BTNH, key_BSNH, value_BSNH))
    dropout_BNTS = xla.dropout_factors((*query_BNTH.shape[:3], S), dropout_rate, dropout_rng)
    blocks, block_length = [], T // num_query_blocks(mask, T, S)
    for start in range(0, T, block_length):
        end = start + block_length
        block_mask, block_dropout = (
            x if x is None else x[:, :, start:end, :end] for x in (mask_BNTS, dropout_BNTS))
        blocks.append(xla.softmax_weighted_sum(
            query_BNTH[:, :, start:end], key_BNSH[:, :, :end], value_BNSH[:, :, :end],
            block_mask, block_dropout)[0])
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2), None


def supports_blocks(query, key, value, mask: Any, *, return_weights: bool = False, **_) -> bool:
    """Returns whether `blockwise_attention` applies: on a CPU without a mesh, to causal rows.

    Rows must have at least 256 tokens, and a number of tokens that is divisible by the number of
    blocks. Weights must not be requested.
    """
    return (is_default() and xla.has_no_mesh() and not return_weights
            and num_query_blocks(mask, query.shape[1], key.shape[1]) > 1)


def num_query_blocks(mask: Any, T: int, S: int) -> int:
    """Returns the number of query blocks of `blockwise_attention`; 1 if it does not apply."""
    num_blocks = min(4, T // 128)
    return num_blocks if mask.causal and T == S and num_blocks and T % num_blocks == 0 else 1


def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """`matmul.matmul_transposed` for up to `MATVEC_MAX_ROWS` rows, as in a decoding step.

    XLA on CPU repacks the right operand of a matmul in every call. For few rows this takes as long
    as the matmul itself, so the weight matrix is the left operand. A single bfloat16 row would run
    in XLA's slowest loop, so it is duplicated.
    """
    num_rows = math.prod(x.shape[:-1])
    x_MD = x.reshape(num_rows, x.shape[-1])
    if num_rows == 1 and matrix.dtype != jnp.float32:
        x_MD = jnp.concatenate([x_MD, x_MD])
    y_FM = jnp.einsum("FD,MD->FM", matrix, x_MD, preferred_element_type=dtype)
    # Without the barrier, XLA rewrites the transposed product with its operands swapped.
    y_MF = jax.lax.optimization_barrier(y_FM)[:, :num_rows].T
    return y_MF.reshape(*x.shape[:-1], -1)


def supports_few_rows(x, *args, **kwargs) -> bool:
    """Returns whether `matmul_transposed` applies: on a CPU without a mesh, to few rows."""
    return is_default() and xla.has_no_mesh() and math.prod(x.shape[:-1]) <= MATVEC_MAX_ROWS


def int8_matmul_transposed(x_MD: Int8[Array, "M D"], matrix: Int8[Array, "F D"]) -> Array:
    """`quantized.int8_matmul_transposed` with the matrix as left operand, as `matmul_transposed`.

    A single row is duplicated.
    """
    num_rows = len(x_MD)
    if num_rows == 1:
        x_MD = jnp.concatenate([x_MD, x_MD])
    y_FM = jnp.einsum("FD,MD->FM", matrix, x_MD, preferred_element_type=jnp.int32)
    # As in `matmul_transposed`.
    return jax.lax.optimization_barrier(y_FM)[:, :num_rows].T


@jax.custom_jvp
def materialize_cotangent(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The identity function, whose cotangent is computed once and stored in memory.

    XLA on CPU fuses elementwise operations into each of their consumers, which repeats their
    computation. Two such repetitions each took a third of the time of a training step: the
    cotangent of the residual stream, a sum over all later layers that every layer recomputed (LoRA,
    12 layers), and the cotangent of an activation, which was recomputed for the gradients of a
    kernel, of its LoRA parameters and of its bias (trainable spec `lora:8:all`).

    XLA removes optimization barriers before fusion, but it does not fuse through a conditional, so
    the cotangent passes through one. A program that is compiled ahead of time for another platform
    does not contain it.
    """
    return x


@materialize_cotangent.defjvp
def _(primals, tangents):
    def through_conditional(x):
        always_true = jax.lax.optimization_barrier(jnp.array(True))
        return jax.lax.cond(always_true, lambda x: x, lambda x: x * jnp.nan, x)

    (x,), (t,) = primals, tangents
    return x, jax.lax.platform_dependent(t, cpu=through_conditional, default=lambda t: t)
