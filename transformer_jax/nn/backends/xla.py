"""Variants that help XLA on every backend.

Shape suffixes: B batch, T target length (queries), S source length (keys and values), N heads,
H head_dim, D input features, F output features, M the product of all leading axes.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float

from transformer_jax.nn.dropout import keep_mask


def supports_all(*args, **kwargs) -> bool:
    """Returns True: the variant supports all arguments."""
    return True


def has_no_mesh(*args, **kwargs) -> bool:
    """Returns whether there is no mesh, so that merging axes does not merge sharded axes."""
    return jax.sharding.get_abstract_mesh().empty


def attention(
    query_BTNH, key_BSNH, value_BSNH, mask: Any, *, attention_impl: str = "auto",
    dropout_rate: float = 0.0, dropout_rng: Array | None = None, return_weights: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"] | None]:
    """`attention.dot_product_attention`, with the axis N before T and S, and a smaller division.

    The denominator of the softmax divides the weighted sum instead of the weights, which saves one
    write and one read of an array `[T, S]`.
    """
    T, S = query_BTNH.shape[1], key_BSNH.shape[1]
    mask_BNTS = mask.to_dense(T, S)
    query_BNTH, key_BNSH, value_BNSH = (
        x.swapaxes(1, 2) for x in (query_BTNH, key_BSNH, value_BSNH))
    dropout_BNTS = dropout_factors((*query_BNTH.shape[:3], S), dropout_rate, dropout_rng)
    out_BNTH, exp_BNTS, sum_BNT1 = softmax_weighted_sum(
        query_BNTH, key_BNSH, value_BNSH, mask_BNTS, dropout_BNTS)
    return out_BNTH.swapaxes(1, 2), exp_BNTS / sum_BNT1 if return_weights else None


def dropout_factors(
    shape: tuple[int, int, int, int], rate: float, rng: Array | None
) -> Float[Array, "B N T S"] | None:
    """Returns the factors of dropout on attention weights, 0 or 1 / (1 - rate); None if off."""
    if rng is None or not rate:
        return None
    return jnp.where(keep_mask(rng, shape, rate), 1 / (1 - rate), 0)


def softmax_weighted_sum(
    query_BNTH: Float[Array, "B N T H"],
    key_BNSH: Float[Array, "B N S H"],
    value_BNSH: Float[Array, "B N S H"],
    mask_BNTS: Bool[Array, "..."] | None,
    dropout_BNTS: Float[Array, "B N T S"] | None,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N T S"], Float[Array, "B N T 1"]]:
    """Returns the output of attention, and numerator and denominator of the softmax."""
    scores_BNTS = _batched_matmul(query_BNTH, key_BNSH, 3) * (query_BNTH.shape[-1] ** -0.5)
    if mask_BNTS is not None:
        scores_BNTS = jnp.where(mask_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)
    max_BNT1 = jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True))
    exp_BNTS = jnp.exp(scores_BNTS - max_BNT1)
    sum_BNT1 = exp_BNTS.sum(-1, keepdims=True)
    dropped_BNTS = exp_BNTS if dropout_BNTS is None else exp_BNTS * dropout_BNTS
    out_BNTH = _batched_matmul(dropped_BNTS.astype(value_BNSH.dtype), value_BNSH, 2) / sum_BNT1
    return out_BNTH.astype(value_BNSH.dtype), exp_BNTS, sum_BNT1


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
    """`matmul.matmul` of operands that are reshaped to matrices.

    Otherwise XLA on CPU transposes the operands of both gradient matmuls in memory, which takes 2 %
    of the time of GPT-2's training step. On a mesh the operands keep their axes, because the
    reshape would merge axes that may be sharded.
    """
    fan_in = math.prod(kernel.shape[:num_contracted_axes])
    y = x.reshape(-1, fan_in) @ kernel.reshape(fan_in, -1)
    return y.reshape(*x.shape[: x.ndim - num_contracted_axes], *kernel.shape[num_contracted_axes:])


def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """`matmul.matmul_transposed` of operands that are reshaped to matrices, as in `matmul`."""
    x_MD = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    y_MF = jnp.einsum("MD,FD->MF", x_MD, matrix, preferred_element_type=dtype)
    return y_MF.reshape(*x.shape[:-1], -1)


def closed_form_standardize(process_statistics: Callable = lambda statistics: statistics):
    """Returns `layers.standardize` with a derivative in closed form.

    The derivative is self-adjoint, so the backward pass is the same formula, and needs only two
    saved arrays. For the derivative that autodiff would produce, XLA creates strided copies.

    Args:
        process_statistics: applied to mean and inverse standard deviation.
    """
    def with_statistics(x, epsilon):
        mean = x.mean(-1, keepdims=True)
        inv_std = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)
        mean, inv_std = process_statistics((mean, inv_std))
        return (x - mean) * inv_std, inv_std

    @functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
    def standardize(x, epsilon):
        return with_statistics(x, epsilon)[0]

    @standardize.defjvp
    def _(epsilon, primals, tangents):
        (x,), (t,) = primals, tangents
        y, inv_std = with_statistics(x, epsilon)
        return y, inv_std * (t - t.mean(-1, keepdims=True) - y * (y * t).mean(-1, keepdims=True))

    return standardize


standardize = closed_form_standardize()
