"""Who may look at whom, and the look itself.

A mask is a boolean array that broadcasts to `[B, N, T, S]`: True where query `t` sees key `s`.
Masks are built once per model call and combined by `&`; every layer shares the result.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.nn.dropout import dropout


def causal_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    context_size: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Each position sees itself and the `context_size - 1` positions before it (all if None).

    In a language model position i - 1 predicts token i, so `context_size` k is the k of
    P(w_i | w_{i-k} ... w_{i-1}) for one layer; a stack of L layers reaches L * (k - 1) + 1 back.
    """
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    mask = distance >= 0
    return mask if context_size is None else mask & (distance < context_size)


def padding_mask(real: Bool[Array, "B S"]) -> Bool[Array, "B 1 1 S"]:
    """Only keys that are real tokens are seen."""
    return real[:, None, None, :].astype(bool)


def document_mask(
    query_documents: Int[Array, "B T"], key_documents: Int[Array, "B S"]
) -> Bool[Array, "B 1 T S"]:
    """Packed sequences: a token sees its own document only."""
    return query_documents[:, None, :, None] == key_documents[:, None, None, :]


def attend(
    query_BTNH: Float[Array, "B T N H"],
    key_BSNH: Float[Array, "B S N H"],
    value_BSNH: Float[Array, "B S N H"],
    mask_BNTS: Bool[Array, "..."] | None,
    *,
    dropout_rate: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).

    The softmax is computed in float32. A query that sees no key (padding) averages all values:
    finite, and thrown away by the loss. `dropout_rng` None means no dropout.

    Returns:
        The attended values, and the attention weights before dropout.
    """
    scores_BNTS = jnp.einsum(
        "BTNH,BSNH->BNTS", query_BTNH, key_BSNH, preferred_element_type=jnp.float32
    ) * (query_BTNH.shape[-1] ** -0.5)
    if mask_BNTS is not None:
        scores_BNTS = jnp.where(mask_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    dropped_BNTS = weights_BNTS
    if dropout_rng is not None and dropout_rate > 0:
        dropped_BNTS = dropout(weights_BNTS, dropout_rate, dropout_rng)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", dropped_BNTS.astype(value_BSNH.dtype), value_BSNH)
    return out_BTNH, weights_BNTS


class KVCache(NamedTuple):
    """Keys and values of one layer. Slot `s` holds the token at position `s` of its row, so rows
    of unequal length need no bookkeeping: the causal mask hides what is not yet written."""

    key: Float[Array, "B S N H"]
    value: Float[Array, "B S N H"]

    def write(
        self,
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
    ) -> "KVCache":
        """A cache in which `positions` hold `key` and `value`; slots outside are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            self.key.at[rows, positions].set(key, mode="drop"),
            self.value.at[rows, positions].set(value, mode="drop"),
        )


def init_cache(
    num_layers: int, batch_size: int, length: int, num_heads: int, head_dim: int, dtype
) -> dict[str, KVCache]:
    """An empty cache for a stack: `layer_i` -> zeros `[B, length, N, H]`."""
    shape = (batch_size, length, num_heads, head_dim)
    return {
        f"layer_{i}": KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for i in range(num_layers)
    }
