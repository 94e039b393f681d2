"""Variants for CPUs, without a mesh.

Each docstring has the time of a training or decoding step without the variant, relative to that
with it: medians of interleaved runs on 2 cores of an Intel Xeon (Emerald Rapids), 2026-12-01, jax
0.10.2, float32, GPT-2 and BERT-base with 2 of their 12 layers and 1/6 of their vocabulary.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int8

from transformer_jax.nn.dropout import keep_mask

MATVEC_MAX_ROWS = 32  # up to this number, a weight matrix as left operand was measured to be faster


def is_default(*args, **kwargs) -> bool:
    """Returns whether CPUs are the default devices."""
    return jax.default_backend() == "cpu"


def has_no_mesh(*args, **kwargs) -> bool:
    """Returns whether a CPU is used without a mesh, so that no axes are sharded."""
    return is_default() and jax.sharding.get_abstract_mesh().empty


def attention(
    query_BTNH, key_BSNH, value_BSNH, mask: Any, *, attention_impl: str = "auto",
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, return_weights: bool = False,
) -> tuple[Float[Array, "B T N H"], None]:
    """`attention.dot_product_attention`, in blocks of queries if the mask is causal.

    The scores of a block are computed only for the keys up to the end of the block, so that part
    of the masked scores is never computed. The axis N precedes T and S, and the denominator of the
    softmax divides the weighted sum instead of the weights, which saves one write and one read of
    an array `[T, S]`. GPT-2, 1 x 1024 tokens: 1.33 (1.08 for the blocks alone); 2 x 256: 1.03.
    BERT-base, 1 x 512: 1.08.
    """
    T, S = query_BTNH.shape[1], key_BSNH.shape[1]
    mask_BNTS = mask.to_dense(T, S)
    query_BNTH, key_BNSH, value_BNSH = (
        x.swapaxes(1, 2) for x in (query_BTNH, key_BSNH, value_BSNH))
    dropout_BNTS = None
    if dropout_rng is not None and dropout_rate:
        kept = keep_mask(dropout_rng, (*query_BNTH.shape[:3], S), dropout_rate)
        dropout_BNTS = jnp.where(kept, 1 / (1 - dropout_rate), 0)
    if (num_blocks := num_query_blocks(mask, T, S)) == 1:
        out_BNTH = _weighted_sum(query_BNTH, key_BNSH, value_BNSH, mask_BNTS, dropout_BNTS)
        return out_BNTH.swapaxes(1, 2), None
    blocks, block_length = [], T // num_blocks
    for end in range(block_length, T + 1, block_length):
        rows = slice(end - block_length, end)
        block_mask, block_dropout = (
            x if x is None else x[:, :, rows, :end] for x in (mask_BNTS, dropout_BNTS))
        blocks.append(_weighted_sum(query_BNTH[:, :, rows], key_BNSH[:, :, :end],
                                    value_BNSH[:, :, :end], block_mask, block_dropout))
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2), None


def supports_attention(*args, return_weights: bool = False, **kwargs) -> bool:
    """Returns whether `attention` applies: on a CPU without a mesh, if weights are not needed."""
    return has_no_mesh() and not return_weights


def num_query_blocks(mask: Any, T: int, S: int) -> int:
    """Returns 2 to 4, for causal rows of at least 256 tokens that blocks divide; otherwise 1."""
    num_blocks = min(4, T // 128)
    return num_blocks if mask.causal and T == S and num_blocks and T % num_blocks == 0 else 1


def _weighted_sum(query_BNTH, key_BNSH, value_BNSH, mask_BNTS, dropout_BNTS):
    scores_BNTS = _batched_matmul(query_BNTH, key_BNSH, 3) * (query_BNTH.shape[-1] ** -0.5)
    if mask_BNTS is not None:
        scores_BNTS = jnp.where(mask_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)
    max_BNT1 = jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True))
    exp_BNTS = jnp.exp(scores_BNTS - max_BNT1)
    sum_BNT1 = exp_BNTS.sum(-1, keepdims=True)
    exp_BNTS = exp_BNTS if dropout_BNTS is None else exp_BNTS * dropout_BNTS
    out_BNTH = _batched_matmul(exp_BNTS.astype(value_BNSH.dtype), value_BNSH, 2) / sum_BNT1
    return out_BNTH.astype(value_BNSH.dtype)


def _batched_matmul(x, y, axis):
    """Contracts the last axis of x with `axis` of y, batched over B and N, in float32.

    `dot_general` keeps the order of the operands. `einsum` swaps them, and XLA on CPU then
    transposes the operands and the result.
    """
    dimension_numbers = ((3,), (axis,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=jnp.float32)


def matmul(
    x: Float[Array, "..."], kernel: Float[Array, "..."], num_contracted_axes: int = 1
) -> Array:
    """`quantized.matmul` of operands that are reshaped to matrices.

    Otherwise XLA on CPU transposes the operands of both gradient matmuls in memory. GPT-2, 2 x 256
    tokens: 1.09; BERT-base, 4 x 128: 1.09.
    """
    fan_in = math.prod(kernel.shape[:num_contracted_axes])
    y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1)
    return y.reshape(*x.shape[: x.ndim - num_contracted_axes], *kernel.shape[num_contracted_axes:])


def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """`quantized.matmul_transposed` of operands that are reshaped to matrices, as in `matmul`.

    XLA on CPU repacks the right operand of a matmul in every call. For up to `MATVEC_MAX_ROWS`
    rows, as in a decoding step, this takes as long as the matmul itself, so the weight matrix is
    the left operand. A single bfloat16 row would run in XLA's slowest loop, so it is duplicated.
    Decoding with GPT-2 (12 layers), 8 rows: 1.17; 32 rows: 1.05; 1 row: 1.02. More rows are only
    reshaped, as in the output layer of a training step; GPT-2, 2 x 256 tokens: 1.04. Without it,
    the variants that were removed would have slowed this step by more than 3 %.
    """
    num_rows = math.prod(x.shape[:-1])
    x_MD = x.reshape(num_rows, x.shape[-1])
    if num_rows > MATVEC_MAX_ROWS:
        y_MF = jnp.einsum("MD,FD->MF", x_MD, matrix, preferred_element_type=dtype)
        return y_MF.reshape(*x.shape[:-1], -1)
    if num_rows == 1 and matrix.dtype != jnp.float32:
        x_MD = jnp.concatenate([x_MD, x_MD])
    y_FM = jnp.einsum("FD,MD->FM", matrix, x_MD, preferred_element_type=dtype)
    # Without the barrier, XLA rewrites the transposed product with its operands swapped.
    y_MF = jax.lax.optimization_barrier(y_FM)[:, :num_rows].T
    return y_MF.reshape(*x.shape[:-1], -1)


def int8_matmul_transposed(x_MD: Int8[Array, "M D"], matrix: Int8[Array, "F D"]) -> Array:
    """`quantized.int8_matmul_transposed` with the matrix as left operand, as `matmul_transposed`.

    A single row is duplicated. Decoding with GPT-2 (12 layers), 1 row: 2.2.
    """
    num_rows = len(x_MD)
    if num_rows == 1:
        x_MD = jnp.concatenate([x_MD, x_MD])
    y_FM = jnp.einsum("FD,MD->FM", matrix, x_MD, preferred_element_type=jnp.int32)
    return jax.lax.optimization_barrier(y_FM)[:, :num_rows].T


@jax.custom_jvp
def materialize_cotangent(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The identity function, whose cotangent is computed once and stored in memory.

    XLA on CPU fuses elementwise operations into each of their consumers, which repeats their
    computation: that of the cotangent of the residual stream, a sum over all later layers, in every
    layer; and that of an activation's cotangent for the gradients of a kernel, of its LoRA
    parameters and of its bias. It applies with and without a mesh. A step of `lora:8:all` with a
    model of 6 layers of d_model 384, 64 x 16 tokens: 1.10.

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
