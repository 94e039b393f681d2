"""Attention masks, scaled dot-product attention, and the key-value cache.

Shape suffixes: B batch, T target length (queries), S source length (keys and values), N heads,
H head_dim, P prefix length.
"""

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
    jax.tree_util.register_dataclass,
    meta_fields=("causal", "attention_window"),
    data_fields=("query_document_ids", "key_document_ids", "padding_mask", "dense_mask"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """A symbolic attention mask: a query attends to the keys that every field allows.

    Causal, sliding-window, document and padding masks are stored as flags and small arrays rather
    than as a boolean array `[B, N, T, S]`, because fused attention implementations skip blocks of
    scores that a symbolic mask excludes. `to_dense` converts the mask to booleans.

    Attributes:
        causal: whether a query attends only to keys at its own index in the row or before it.
        attention_window: with `causal`, the number of most recent keys that a query attends to,
            the key at its own index included; None for no limit. In a language model of one
            layer it is the k of P(w_i | w_{i-k} ... w_{i-1}), because the output at position
            i - 1 predicts token i. With L layers, that output depends on the last
            L * (k - 1) + 1 tokens.
        query_document_ids, key_document_ids: the document of each token in packed rows. A query
            attends only to keys of its own document.
        padding_mask: True for keys that are tokens, False for padding.
        dense_mask: a boolean array that broadcasts to `[B, N, T, S]`, for masks that the other
            fields cannot express, such as a causal mask over the slots of a cache.

    Example:
        >>> mask = Mask(causal=True, attention_window=2)
        >>> mask.to_dense(T=4, S=4)[0, 0].astype(int).tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    """

    causal: bool = False
    attention_window: int | None = None
    query_document_ids: Int[Array, "B T"] | None = None
    key_document_ids: Int[Array, "B S"] | None = None
    padding_mask: Bool[Array, "B S"] | None = None
    dense_mask: Bool[Array, "..."] | None = None

    def replace(self, **changes) -> "Mask":
        """Returns a copy of the mask with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_prefix(self, P: int, T: int, S: int) -> "Mask":
        """Returns the mask for P prefix keys followed by the S keys.

        Every query attends to all P prefix keys.
        """
        dense_mask = self.to_dense(T, S)
        if dense_mask is None:
            return self
        padding = [(0, 0)] * 3 + [(P, 0)]
        return Mask(dense_mask=jnp.pad(dense_mask, padding, constant_values=True))

    def to_dense(self, T: int, S: int) -> Bool[Array, "..."] | None:
        """Returns booleans that broadcast to `[B, N, T, S]`, or None if nothing is masked."""
        masks = []
        if self.causal:
            query_positions, key_positions = jnp.arange(T)[None], jnp.arange(S)[None]
            masks.append(causal_mask(query_positions, key_positions, self.attention_window))
        if self.query_document_ids is not None:
            masks.append(self.query_document_ids[:, None, :, None]
                         == self.key_document_ids[:, None, None, :])
        if self.padding_mask is not None:
            masks.append(self.padding_mask[:, None, None, :].astype(bool))
        if self.dense_mask is not None:
            masks.append(self.dense_mask)
        return functools.reduce(jnp.logical_and, masks) if masks else None


UNMASKED = Mask()


def causal_mask(
    query_positions: Int[Array, "B T"],
    key_positions: Int[Array, "B S"],
    attention_window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Computes a dense causal mask from the positions of queries and keys.

    A query at position p attends to the keys at positions p - attention_window + 1 to p, or to all
    keys up to position p if `attention_window` is None.

    Example:
        >>> positions = jnp.arange(3)[None]
        >>> causal_mask(positions, positions)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
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
    """Scaled dot-product attention: softmax(Q K^T / sqrt(H)) V.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1. The softmax is computed in
    float32. The output of a query with no allowed key, such as a padding token, is the mean of all
    values: it is finite, and losses exclude these queries by a loss weight of 0.

    Args:
        query_BTNH: queries.
        key_BSNH: keys.
        value_BSNH: values.
        mask: the keys that each query attends to.
        attention_impl: "xla" for matmuls and a softmax as written above; "cudnn" or "splash" for a
            fused implementation, which never stores the weights `[T, S]` (Dao et al. 2022,
            "FlashAttention"); "auto" for the default of the platform. For inputs that the fused
            implementation does not support, "xla" is used instead; see
            `fused_attention.select_implementation`.
        dropout_rate: the rate of dropout on attention weights.
        dropout_rng: the key for dropout; None disables dropout.

    Returns:
        The output, and the attention weights before dropout, in float32. Fused implementations,
        and "xla" where it splits the queries into blocks (long causal rows on a CPU), do not
        produce the weights; they are then computed separately. Under `jax.jit`, XLA removes this
        computation if the weights are unused.

    Example:
        >>> x = jnp.ones((2, 5, 4, 8))  # B, T, N, H
        >>> out, weights = dot_product_attention(x, x, x, Mask(causal=True))
        >>> out.shape, weights.shape
        ((2, 5, 4, 8), (2, 4, 5, 5))
    """
    has_dropout = dropout_rng is not None and dropout_rate > 0
    implementation = fused_attention.select_implementation(
        attention_impl, query_BTNH, key_BSNH, mask, has_dropout)
    T, S = query_BTNH.shape[1], key_BSNH.shape[1]
    mask_BNTS = mask.to_dense(T, S)
    query_BNTH, key_BNSH, value_BNSH = (
        x.swapaxes(1, 2) for x in (query_BTNH, key_BSNH, value_BSNH))
    dropout_BNTS = None
    if has_dropout:
        keep_BNTS = keep_mask(dropout_rng, (*query_BNTH.shape[:3], S), dropout_rate)
        dropout_BNTS = jnp.where(keep_BNTS, 1 / (1 - dropout_rate), 0)
    num_blocks = _num_query_blocks(mask, T, S)
    if implementation == "xla" and num_blocks == 1:
        out_BNTH, weights_BNTS = _softmax_weighted_sum(
            query_BNTH, key_BNSH, value_BNSH, mask_BNTS, dropout_BNTS)
        return out_BNTH.swapaxes(1, 2), weights_BNTS
    weights_BNTS = jax.nn.softmax(_scores(query_BNTH, key_BNSH, mask_BNTS), axis=-1)
    if implementation != "xla":
        fused = fused_attention.IMPLEMENTATIONS[implementation]
        return fused(query_BTNH, key_BSNH, value_BSNH, mask), weights_BNTS
    blocks = []
    for start in range(0, T, T // num_blocks):
        end = start + T // num_blocks
        block_mask, block_dropout = (
            x if x is None else x[:, :, start:end, :end] for x in (mask_BNTS, dropout_BNTS))
        blocks.append(_softmax_weighted_sum(
            query_BNTH[:, :, start:end], key_BNSH[:, :, :end], value_BNSH[:, :, :end],
            block_mask, block_dropout)[0])
    return jnp.concatenate(blocks, axis=2).swapaxes(1, 2), weights_BNTS


def _scores(query_BNTH, key_BNSH, mask_BNTS):
    """Computes Q K^T / sqrt(H) in float32, with the smallest finite number at masked keys."""
    scores_BNTS = _batched_matmul(query_BNTH, key_BNSH, 3) * (query_BNTH.shape[-1] ** -0.5)
    if mask_BNTS is None:
        return scores_BNTS
    return jnp.where(mask_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)


def _batched_matmul(x, y, axis):
    """Contracts the last axis of x with `axis` of y, batched over B and N, in float32.

    `dot_general` keeps the order of the operands. `einsum` swaps them, and XLA on CPU then
    transposes the operands and the result.
    """
    dimension_numbers = ((3,), (axis,)), ((0, 1), (0, 1))
    return jax.lax.dot_general(x, y, dimension_numbers, preferred_element_type=jnp.float32)


def _softmax_weighted_sum(query_BNTH, key_BNSH, value_BNSH, mask_BNTS, dropout_BNTS):
    """Returns the weighted sum of values and the softmax weights.

    The denominator of the softmax divides the weighted sum instead of the weights. This saves one
    write and one read of an array `[T, S]` where the weights are unused.
    """
    scores_BNTS = _scores(query_BNTH, key_BNSH, mask_BNTS)
    max_BNT1 = jax.lax.stop_gradient(scores_BNTS.max(-1, keepdims=True))
    exp_BNTS = jnp.exp(scores_BNTS - max_BNT1)
    sum_BNT1 = exp_BNTS.sum(-1, keepdims=True)
    dropped_BNTS = exp_BNTS if dropout_BNTS is None else exp_BNTS * dropout_BNTS
    out_BNTH = _batched_matmul(dropped_BNTS.astype(value_BNSH.dtype), value_BNSH, 2) / sum_BNT1
    return out_BNTH.astype(value_BNSH.dtype), exp_BNTS / sum_BNT1


def _num_query_blocks(mask: Mask, T: int, S: int) -> int:
    """Returns the number of query blocks of causal self-attention on a CPU; 1 in all other cases.

    The scores of a block are computed only for the keys up to the end of the block, so that part
    of the masked scores is never computed. On accelerators, fused implementations do the same.
    """
    num_blocks = min(4, T // 128)
    is_cpu_without_mesh = (
        jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty)
    is_divisible = num_blocks and T % num_blocks == 0
    return num_blocks if is_cpu_without_mesh and mask.causal and T == S and is_divisible else 1


class KVCache(NamedTuple):
    """Keys and values of the previous tokens in one attention layer, for cached decoding.

    Slot `s` holds the token at position `s` of its row, so rows of unequal length need no further
    bookkeeping: the causal mask excludes the slots that have not been filled yet.

    The head axis precedes the slot axis, as in the matmuls of attention. With the other order, XLA
    on CPU copies the entire cache for every generated token.
    """

    key: Float[Array, "B N S H"]
    value: Float[Array, "B N S H"]

    @property
    def length(self) -> int:
        """The number of slots."""
        return self.key.shape[2]

    @classmethod
    def from_bsnh(cls, key: Float[Array, "B S N H"], value: Float[Array, "B S N H"]) -> "KVCache":
        """Creates a full cache from the keys and values of S tokens."""
        return cls(key.swapaxes(1, 2), value.swapaxes(1, 2))

    def as_bsnh(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Returns keys and values with the axes that `dot_product_attention` takes."""
        return self.key.swapaxes(1, 2), self.value.swapaxes(1, 2)

    def update(
        self,
        key: Float[Array, "B T N H"],
        value: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
    ) -> "KVCache":
        """Returns a cache with `key` and `value` in the slots `positions`.

        Tokens at positions of S or more are dropped. Positions must not be negative: they would
        index the slots from the end.
        """
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(
            self.key.at[rows, :, positions].set(key, mode="drop"),
            self.value.at[rows, :, positions].set(value, mode="drop"),
        )


def init_cache(
    num_layers: int, batch_size: int, length: int, num_heads: int, head_dim: int, dtype: jnp.dtype
) -> dict[str, KVCache]:
    """Creates the empty caches of a stack: zeros of shape `[B, N, length, H]` for each layer.

    Example:
        >>> cache = init_cache(
        ...     num_layers=2, batch_size=3, length=5, num_heads=4, head_dim=6, dtype=jnp.float32)
        >>> list(cache), cache["layer_0"].key.shape
        (['layer_0', 'layer_1'], (3, 4, 5, 6))
    """
    shape = (batch_size, num_heads, length, head_dim)
    return {
        f"layer_{i}": KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))
        for i in range(num_layers)
    }
