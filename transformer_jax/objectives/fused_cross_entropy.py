"""Cross-entropy of rows of logits and its gradient in one go, for GPUs (Pallas on Triton).

Left to XLA, logits are read three times (greatest, sum, gradient), and they are the largest array
of a step: 9.2 of 74 ms of GPT-2's, 32 x 1024 tokens on an H100. Here a row is read twice, the
second time in part from the cache: once for the sums, with a running maximum (Milakov & Gimelshein
2018, "Online normalizer calculation for softmax", algorithm 3), once for the gradient. It takes
5.7 ms.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

BLOCK, WARPS = 8192, 16  # columns at a time, and who shares them; 4096 and 8 are as fast


class Scores(NamedTuple):
    """Of each token, in float32; and the gradient of the weighted sum of `loss`."""

    loss: Float[Array, "C"]  # with label smoothing
    nll: Float[Array, "C"]  # without
    correct: Float[Array, "C"]
    gradient: Float[Array, "C W"]  # with respect to logits; 0 from V on


def fused_softmax_cross_entropy(
    logits: Float[Array, "C W"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "C"],
    weights: Float[Array, "C"],
    *,
    num_classes: int,
    smoothing: float,
    dtype: jnp.dtype,
    interpret: bool = False,
) -> Scores:
    """What `projection` wants to know of a chunk of tokens.

    Args:
        logits: float32, without `bias`; columns from V = `num_classes` on are padding.
        dtype: of the gradient.
        interpret: run as plain JAX, for tests where there is no GPU.
    """
    # Imported here: Pallas takes a second to import, and only GPUs need it.
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (tokens, width), V = logits.shape, num_classes
    block = min(BLOCK, 2 ** (width.bit_length() - 1))  # Triton's are powers of two; none wider
    has_bias = bias is not None

    def kernel(logits_ref, bias_ref, target_ref, weight_ref, loss_ref, nll_ref, correct_ref,
               gradient_ref):
        target, low = target_ref[...], jnp.finfo(jnp.float32).min
        chosen = logits_ref[target] + (bias_ref[target] if has_bias else 0.0)

        def load(i, policy):
            """Masked by the width, which whole vectors divide: by V, each number is a load."""
            here, column = pl.ds(i * block, block), i * block + jnp.arange(block)
            x = triton.load(logits_ref.at[here], mask=column < width, other=low,
                            eviction_policy=policy)
            if has_bias:
                x = x + triton.load(bias_ref.at[here], mask=column < V, other=0.0)
            return x

        def columns(i, x):
            """Their numbers, which are classes, and the logits with none for the others."""
            column = i * block + jnp.arange(block)
            return column, column < V, jnp.where(column < V, x, low)

        def add(i, carry):
            most, total, beaten, plain, x = carry
            following = load(i + 1, "evict_last")  # on its way meanwhile
            column, real, x = columns(i, x)
            more = jnp.maximum(most, x)
            total = total * jnp.exp(most - more) + jnp.exp(x - more)
            # Of equal scores the first counts.
            ahead = (x > chosen) | ((x == chosen) & (column < target))
            plain = plain + jnp.where(real, x, 0) if smoothing else plain
            return more, total, beaten | ahead.astype(jnp.int32), plain, following

        zeros, parts = jnp.zeros(block, jnp.float32), pl.cdiv(width, block)
        start = (zeros + low, zeros, zeros.astype(jnp.int32), zeros if smoothing else 0.0,
                 load(0, "evict_last"))
        most, total, beaten, plain, _ = jax.lax.fori_loop(0, parts, add, start)
        top = jnp.max(most)
        normalizer = top + jnp.log(jnp.sum(total * jnp.exp(most - top)))
        nll_ref[...] = normalizer - chosen
        mean = jnp.sum(plain) / V
        loss_ref[...] = normalizer - (1 - smoothing) * chosen - smoothing * mean
        correct_ref[...] = 1.0 - jnp.max(beaten).astype(jnp.float32)
        weight = weight_ref[...]

        def write(i, x):
            following = load(i + 1, "evict_first")
            column, real, x = columns(i, x)
            expected = jnp.where(column == target, 1 - smoothing, 0.0)
            if smoothing:
                expected = expected + jnp.where(real, smoothing / V, 0.0)
            g = (jnp.exp(x - normalizer) - expected) * weight
            triton.store(gradient_ref.at[pl.ds(i * block, block)], g.astype(dtype),
                         mask=column < width, eviction_policy="evict_first")
            return following

        jax.lax.fori_loop(0, parts, write, load(0, "evict_first"))

    one = pl.BlockSpec((None,), lambda i: (i,))
    row = pl.BlockSpec((None, width), lambda i: (i, 0))
    if not has_bias:
        bias = jnp.zeros(1, jnp.float32)
    every = pl.BlockSpec(bias.shape, lambda i: (0,))
    value = jax.ShapeDtypeStruct((tokens,), jnp.float32)
    return Scores(*pl.pallas_call(
        kernel, grid=(tokens,), in_specs=[row, every, one, one], out_specs=[one, one, one, row],
        out_shape=[value, value, value, jax.ShapeDtypeStruct((tokens, width), dtype)],
        compiler_params=triton.CompilerParams(num_warps=WARPS), interpret=interpret,
        name="score_tokens")(logits, bias, targets, weights))
