"""Who may look at whom, and the look itself."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.nn import fused_attention
from transformer_jax.nn.dropout import keep_mask


@functools.partial(
    jax.tree_util.register_dataclass, meta_fields=("causal", "attention_window"),
    data_fields=("query_documents", "key_documents", "real", "allowed"))
@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys a query sees: those that all fields allow. It is said in words as far as it can
    be, since kernels skip what they are told in words, and `dense` says it in booleans.

    Attributes:
        causal: the keys up to the query's own place in the row.
        attention_window: of these, so many, itself included; all if None. In a language model position
            i - 1 predicts token i, so k is the k of P(w_i | w_{i-k} ... w_{i-1}) for one layer; a
            stack of L layers reaches L * (k - 1) + 1 back.
        query_documents, key_documents: packed rows: a token sees its own document only.
        real: the keys that are tokens; others are padding.
        allowed: anything else, such as what a cache holds.
    """

    causal: bool = False
    attention_window: int | None = None
    query_documents: Int[Array, "B T"] | None = None
    key_documents: Int[Array, "B S"] | None = None
    real: Bool[Array, "B S"] | None = None
    allowed: Bool[Array, "..."] | None = None

    def replace(self, **changes) -> "Mask":
        return dataclasses.replace(self, **changes)

    def after(self, P: int, T: int, S: int) -> "Mask":
        """For keys with P more in front, which every query sees."""
        mask = self.dense(T, S)
        if mask is None:
            return self
        return Mask(allowed=jnp.pad(mask, [(0, 0)] * 3 + [(P, 0)], constant_values=True))

    def dense(self, T: int, S: int) -> Bool[Array, "..."] | None:
        """Booleans that broadcast to `[B, N, T, S]`; None where all is seen."""
        parts = []
        if self.causal:
            parts.append(causal_mask(jnp.arange(T)[None], jnp.arange(S)[None], self.attention_window))
        if self.query_documents is not None:
            parts.append(self.query_documents[:, None, :, None]
                         == self.key_documents[:, None, None, :])
        if self.real is not None:
            parts.append(self.real[:, None, None, :].astype(bool))
        if self.allowed is not None:
            parts.append(self.allowed)
        return functools.reduce(jnp.logical_and, parts) if parts else None


UNMASKED = Mask()


def causal_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    attention_window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Each position sees itself and the `attention_window - 1` positions before it (all if None)."""
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    mask = distance >= 0
    return mask if attention_window is None else mask & (distance < attention_window)


def dot_product_attention(
    query_BTNH: Float[Array, "B T N H"],
    key_BSNH: Float[Array, "B S N H"],
    value_BSNH: Float[Array, "B S N H"],
    mask: Mask,
    *,
    attention_impl: str = "auto",
    dropout_rate: float = 0.0,
    dropout_rng: Key[Array, ""] | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
    """Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1).

    The softmax is computed in float32. A query that sees no key (padding) gives something finite
    that the loss throws away: here, the average of all values.

    Args:
        attention_impl: "xla" for the plain products, "cudnn" or "splash" for a kernel that never holds the
            weights `[T, S]` (Dao et al. 2022, "FlashAttention"), "auto" for that of the platform.
            What a kernel cannot do (see `kernels.choose`) is left to the plain products.
        dropout_rng: None means no dropout.

    Returns:
        The attended values, and the attention weights before dropout. Beside a kernel, or where
        queries are cut into parts, the weights are computed apart, if anything uses them.
    """
    dropped = dropout_rng is not None and dropout_rate > 0
    chosen = fused_attention.select_implementation(attention_impl, query_BTNH, key_BSNH, mask, dropped)
    T, S = query_BTNH.shape[1], key_BSNH.shape[1]
    mask_BNTS = mask.dense(T, S)
    query, key, value = (x.swapaxes(1, 2) for x in (query_BTNH, key_BSNH, value_BSNH))
    factor_BNTS = None
    if dropped:
        keep_BNTS = keep_mask(dropout_rng, (*query.shape[:3], S), dropout_rate)
        factor_BNTS = jnp.where(keep_BNTS, 1 / (1 - dropout_rate), 0)
    parts = _causal_parts(mask, T, S)
    if chosen == "xla" and parts == 1:
        out_BNTH, weights_BNTS = _look(query, key, value, mask_BNTS, factor_BNTS)
        return out_BNTH.swapaxes(1, 2), weights_BNTS
    weights_BNTS = jax.nn.softmax(_scores(query, key, mask_BNTS), axis=-1)
    if chosen != "xla":
        out_BTNH = fused_attention.IMPLEMENTATIONS[chosen](query_BTNH, key_BSNH, value_BSNH, mask)
        return out_BTNH, weights_BNTS
    out = []
    for first in range(0, T, T // parts):
        end = first + T // parts
        cut = [x if x is None else x[:, :, first:end, :end] for x in (mask_BNTS, factor_BNTS)]
        out.append(_look(query[:, :, first:end], key[:, :, :end], value[:, :, :end], *cut)[0])
    return jnp.concatenate(out, axis=2).swapaxes(1, 2), weights_BNTS


def _scores(query_BNTH, key_BNSH, mask_BNTS):
    """Scaled products; the least number there is, where a query does not see a key."""
    scores_BNTS = _products(query_BNTH, key_BNSH, 3) * (query_BNTH.shape[-1] ** -0.5)
    if mask_BNTS is None:
        return scores_BNTS
    return jnp.where(mask_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)


def _products(x, y, axis):
    """Of each row and head: x's last axis against an axis of y, in float32. The sides stay as they
    are: `einsum` exchanges them, and XLA for CPUs then transposes what it is given and what comes
    out."""
    numbers = ((3,), (axis,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(x, y, numbers, preferred_element_type=jnp.float32)


def _look(query_BNTH, key_BNSH, value_BNSH, mask_BNTS, factor_BNTS):
    """Values by the softmax of scores, and the softmax. The values are divided by its sum and not
    the weights: an array of `[T, S]` less to write and to read, where nothing uses these."""
    scores_BNTS = _scores(query_BNTH, key_BNSH, mask_BNTS)
    most_BNT1 = jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True))
    exp_BNTS = jnp.exp(scores_BNTS - most_BNT1)
    sum_BNT1 = exp_BNTS.sum(-1, keepdims=True)
    kept_BNTS = exp_BNTS if factor_BNTS is None else exp_BNTS * factor_BNTS
    out_BNTH = _products(kept_BNTS.astype(value_BNSH.dtype), value_BNSH, 2) / sum_BNT1
    return out_BNTH.astype(value_BNSH.dtype), exp_BNTS / sum_BNT1


def _causal_parts(mask: Mask, T: int, S: int) -> int:
    """Into how many parts queries are cut, each of which is compared only with the keys up to its
    end. On an accelerator one: there a kernel leaves out what is hidden."""
    parts = min(4, T // 128)
    alone = jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty
    return parts if alone and mask.causal and T == S and parts and T % parts == 0 else 1


class KVCache(NamedTuple):
    """Keys and values of one layer. Slot `s` holds the token at position `s` of its row, so rows
    of unequal length need no bookkeeping: the causal mask hides what is not yet written.

    Heads come before slots, as the products want them: otherwise XLA for CPUs copies all of the
    cache for each token.
    """

    key: Float[Array, "B N S H"]
    value: Float[Array, "B N S H"]

    @property
    def length(self) -> int:
        """How many slots there are."""
        return self.key.shape[2]

    @classmethod
    def of(cls, key: Float[Array, "B S N H"], value: Float[Array, "B S N H"]) -> "KVCache":
        """A cache that these fill."""
        return cls(key.swapaxes(1, 2), value.swapaxes(1, 2))

    def rows(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Keys and values as `attend` takes them."""
        return self.key.swapaxes(1, 2), self.value.swapaxes(1, 2)

    def write(
        self,
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
    ) -> "KVCache":
        """A cache in which `positions` hold `key` and `value`; slots outside are dropped."""
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            self.key.at[rows, :, positions].set(key, mode="drop"),
            self.value.at[rows, :, positions].set(value, mode="drop"),
        )


def init_cache(
    num_layers: int, batch_size: int, length: int, num_heads: int, head_dim: int, dtype
) -> dict[str, KVCache]:
    """An empty cache for a stack: `layer_i` -> zeros `[B, N, length, H]`."""
    shape = (batch_size, num_heads, length, head_dim)
    return {
        f"layer_{i}": KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for i in range(num_layers)
    }
