"""Variants for NVIDIA GPUs.

Shape suffixes: K tokens of a chunk, V classes, W columns of the logits (V and padding).
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.sharding import BATCH_AXES, axis_size, constraint_spec

# Columns that the cross-entropy kernel processes at a time; 4096 with 8 warps is as fast.
CROSS_ENTROPY_BLOCK_SIZE = 8192
CROSS_ENTROPY_NUM_WARPS = 16  # warps that share a block


def is_ampere_or_newer_gpu() -> bool:
    """Returns whether the local devices are NVIDIA GPUs of compute capability 8.0 or higher.

    The flash attention of cuDNN and the library's Triton kernels require it.
    """
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    match = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD GPUs report names such as "gfx942"
    return bool(match) and int(match[1]) >= 8


def cudnn_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B S N H"], value: Float[Array, "B S N H"],
    mask: Any, **_,
) -> tuple[Float[Array, "B T N H"], None]:
    """`attention.dot_product_attention` by the flash attention of cuDNN (Dao et al. 2022).

    It never stores attention weights. The causal and sliding-window parts of `mask` are passed as
    flags, all other parts as booleans `[1 or B, 1 or N, T, S]`. Its gain was not measured.
    """
    T, S = query.shape[1], key.shape[1]
    dense_mask = mask.replace(causal=False, attention_window=None).to_dense(T, S)
    if dense_mask is not None:
        dense_mask = jnp.broadcast_to(dense_mask, (*dense_mask.shape[:-2], T, S))
    has_window = mask.causal and mask.attention_window is not None
    window = (mask.attention_window - 1, 0) if has_window else None
    return jax.nn.dot_product_attention(
        query, key, value, mask=dense_mask, is_causal=mask.causal, local_window_size=window,
        implementation="cudnn"), None


def supports_cudnn(
    query, key, value, mask: Any, *, attention_impl: str = "auto", dropout_rate: float = 0.0,
    dropout_rng: Array | None = None, return_weights: bool = False,
) -> bool:
    """Returns whether `cudnn_attention` applies: by default on GPUs since Ampere.

    It supports neither dropout nor `return_weights`. Inputs must be 16-bit, with a head_dim that is
    a multiple of 8 and at most 128, more than one query, even T and S, and queries that are not
    sharded over the sequence axis.
    """
    is_chosen = attention_impl == "cudnn" or (attention_impl == "auto" and is_ampere_or_newer_gpu())
    if not is_chosen or return_weights or (dropout_rng is not None and dropout_rate > 0):
        return False
    T, S, H = query.shape[1], key.shape[1], query.shape[-1]
    sequence_axes = constraint_spec((BATCH_AXES, "sequence", "tensor", None), query.shape)[1]
    return (query.dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128
            and T > 1 and T % 2 == S % 2 == 0 and not sequence_axes)


class CrossEntropyAndGrad(NamedTuple):
    """Unweighted float32 values of each token, and the gradient of the weighted sum of `loss`."""

    loss: Float[Array, "K"]  # cross-entropy with label smoothing, in nats
    nll: Float[Array, "K"]  # cross-entropy without label smoothing, in nats
    correct: Float[Array, "K"]  # 1.0 where the target has the highest logit, else 0.0
    # Of `(loss * weights).sum()` with respect to the logits, 0 at padding; None if not requested.
    logits_grad: Float[Array, "K W"] | None


def supports_fused_cross_entropy(*args, dtype: jnp.dtype | None, **_) -> bool:
    """Returns whether `softmax_cross_entropy_and_grad` applies.

    It requires a GPU that Triton supports, a vocabulary that is not sharded, and that the gradient
    is requested.
    """
    return dtype is not None and is_ampere_or_newer_gpu() and axis_size("tensor") == 1


def softmax_cross_entropy_and_grad(
    logits: Float[Array, "K W"], bias: Float[Array, "V"] | None, targets: Int[Array, "K"],
    weights: Float[Array, "K"], *, num_classes: int, label_smoothing: float, dtype: jnp.dtype,
    interpret: bool = False,
) -> CrossEntropyAndGrad:
    """`cross_entropy.softmax_cross_entropy_and_grad`, a Pallas kernel (Triton).

    XLA reads the logits three times (maximum, sum, gradient), and they are the largest array of a
    training step: for GPT-2 with 32 x 1024 tokens on an H100 this takes 9.2 of the 74 ms of a step.
    The kernel reads each row twice, the second time partly from the cache: once for the sums, with
    a running maximum (Milakov & Gimelshein 2018, "Online normalizer calculation for softmax",
    algorithm 3), and once for the gradient. This takes 5.7 ms: 5 % of the step, 2026-11-26.

    `interpret` runs the kernel in the interpreter of Pallas, for tests without a GPU.
    """
    # Imported here: importing Pallas takes a second, and only GPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_tokens, W = logits.shape
    kernel = functools.partial(
        _cross_entropy_kernel, V=num_classes, label_smoothing=label_smoothing,
        has_bias=bias is not None,
        block_size=min(CROSS_ENTROPY_BLOCK_SIZE, 2 ** (W.bit_length() - 1)))  # at most W
    scalar_spec = pl.BlockSpec((None,), lambda i: (i,))
    row_spec = pl.BlockSpec((None, W), lambda i: (i, 0))
    bias = jnp.zeros(1, jnp.float32) if bias is None else bias
    bias_spec = pl.BlockSpec(bias.shape, lambda i: (0,))
    scalar_shape = jax.ShapeDtypeStruct((num_tokens,), jnp.float32)
    return CrossEntropyAndGrad(*pl.pallas_call(
        kernel, grid=(num_tokens,), in_specs=[row_spec, bias_spec, scalar_spec, scalar_spec],
        out_specs=[scalar_spec, scalar_spec, scalar_spec, row_spec],
        out_shape=[scalar_shape, scalar_shape, scalar_shape,
                   jax.ShapeDtypeStruct((num_tokens, W), dtype)],
        compiler_params=triton.CompilerParams(num_warps=CROSS_ENTROPY_NUM_WARPS),
        interpret=interpret, name="fused_softmax_cross_entropy")(logits, bias, targets, weights))


def _cross_entropy_kernel(*refs, V, label_smoothing, has_bias, block_size):
    """Processes one row of the logits, in blocks of columns."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    logits_ref, bias_ref, target_ref, weight_ref, loss_ref, nll_ref, correct_ref, grad_ref = refs
    (W,), target, lowest = logits_ref.shape, target_ref[...], jnp.finfo(jnp.float32).min
    target_logit = logits_ref[target] + (bias_ref[target] if has_bias else 0.0)

    def block_columns(i):
        return i * block_size + jnp.arange(block_size)

    def load(i, eviction_policy):
        """Block i of the logits. The mask is `column < W`, which allows vector loads; with
        `column < V`, Triton would load one number at a time."""
        block, column = pl.ds(i * block_size, block_size), block_columns(i)
        x = triton.load(logits_ref.at[block], mask=column < W, other=lowest,
                        eviction_policy=eviction_policy)
        if has_bias:
            x = x + triton.load(bias_ref.at[block], mask=column < V, other=0.0)
        return x

    def mask_padding(i, x):
        """The class ids of block i, whether they are below V, and the masked logits."""
        column = block_columns(i)
        return column, column < V, jnp.where(column < V, x, lowest)

    def accumulate(i, carry):
        running_max, running_sum, exceeds_target, logit_sum, x = carry
        next_block = load(i + 1, "evict_last")  # prefetched during the arithmetic
        column, is_class, x = mask_padding(i, x)
        new_max = jnp.maximum(running_max, x)
        running_sum = running_sum * jnp.exp(running_max - new_max) + jnp.exp(x - new_max)
        # Of tied logits the lowest id wins.
        exceeds = (x > target_logit) | ((x == target_logit) & (column < target))
        logit_sum = logit_sum + jnp.where(is_class, x, 0) if label_smoothing else logit_sum
        return (new_max, running_sum, exceeds_target | exceeds.astype(jnp.int32), logit_sum,
                next_block)

    zeros, num_blocks = jnp.zeros(block_size, jnp.float32), pl.cdiv(W, block_size)
    init = (zeros + lowest, zeros, zeros.astype(jnp.int32), zeros if label_smoothing else 0.0,
            load(0, "evict_last"))
    running_max, running_sum, exceeds_target, logit_sum, _ = jax.lax.fori_loop(
        0, num_blocks, accumulate, init)
    row_max = jnp.max(running_max)
    log_normalizer = row_max + jnp.log(jnp.sum(running_sum * jnp.exp(running_max - row_max)))
    nll_ref[...] = log_normalizer - target_logit
    mean_logit = jnp.sum(logit_sum) / V
    loss_ref[...] = (log_normalizer - (1 - label_smoothing) * target_logit
                     - label_smoothing * mean_logit)
    correct_ref[...] = 1.0 - jnp.max(exceeds_target).astype(jnp.float32)
    weight = weight_ref[...]

    def store_grad(i, x):
        next_block = load(i + 1, "evict_first")
        column, is_class, x = mask_padding(i, x)
        target_probs = jnp.where(column == target, 1 - label_smoothing, 0.0)
        if label_smoothing:
            target_probs = target_probs + jnp.where(is_class, label_smoothing / V, 0.0)
        grad = (jnp.exp(x - log_normalizer) - target_probs) * weight
        triton.store(grad_ref.at[pl.ds(i * block_size, block_size)], grad.astype(grad_ref.dtype),
                     mask=column < W, eviction_policy="evict_first")
        return next_block

    jax.lax.fori_loop(0, num_blocks, store_grad, load(0, "evict_first"))
