"""Attention masks, scaled dot-product attention, and the key-value cache."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.nn import backends
from transformer_jax.nn.dropout import dropout

ATTENTION_IMPLS = ("auto", "xla", "cudnn", "splash")


@functools.partial(
    jax.tree_util.register_dataclass,
    meta_fields=("causal", "attention_window"),
    data_fields=("query_document_ids", "key_document_ids", "padding_mask", "dense_mask"),
)
@dataclasses.dataclass(frozen=True)
class Mask:
    """A symbolic attention mask: a query attends to the keys that every field allows.

    Fused attention implementations skip blocks of scores that it excludes; they could not do so for
    an array `[B, N, T, S]`.

    Attributes:
        causal: whether a query attends only to keys at its own index in the row or before it.
        attention_window: with `causal`, the number k of most recent keys that a query attends to,
            the key at its own index included; None for no limit. In a language model of L layers,
            the prediction of a token depends on the L * (k - 1) + 1 tokens before it.
        query_document_ids, key_document_ids: the document of each token in packed rows. A query
            attends only to keys of its own document.
        padding_mask: True for keys that are tokens, False for padding.
        dense_mask: a boolean array that broadcasts to `[B, N, T, S]`, for other masks, such as a
            causal mask over the slots of a cache.

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
        """Returns the mask for P prefix keys, to which every query attends, before the S keys."""
        dense_mask = self.to_dense(T, S)
        if dense_mask is None:
            return self
        padding = [(0, 0)] * 3 + [(P, 0)]
        return Mask(dense_mask=jnp.pad(dense_mask, padding, constant_values=True))

    def with_prompt(self, P: int, T: int, causal: bool) -> "Mask":
        """Returns the mask for P prompt vectors followed by T tokens, which attend to the prompt.

        With `causal`, a prompt vector attends only to itself and those before it; otherwise to the
        prompt and to all tokens that any token attends to.
        """
        prefixed = self.with_prefix(P, T, T)
        rows = prefixed.dense_mask
        if not causal and (rows is None or rows.shape[2] == 1):
            return prefixed
        prompt_rows = jnp.tril(jnp.ones((P, P + T), bool)) if causal else rows.any(2, keepdims=True)
        prompt_rows, rows = (jnp.broadcast_to(x, (*rows.shape[:2], n, P + T))
                             for x, n in ((prompt_rows, P), (rows, T)))
        return Mask(dense_mask=jnp.concatenate([prompt_rows, rows], axis=2))

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
    query_positions: Int[Array, "B T"], key_positions: Int[Array, "B S"],
    attention_window: int | None = None,
) -> Bool[Array, "B 1 T S"]:
    """Computes a dense causal mask from the positions of queries and keys.

    A query at position p attends to the keys at positions p - attention_window + 1 to p; None for
    all keys up to p.

    Example:
        >>> positions = jnp.arange(3)[None]
        >>> causal_mask(positions, positions)[0, 0].astype(int).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    """
    distance = query_positions[:, None, :, None] - key_positions[:, None, None, :]
    mask = distance >= 0
    return mask if attention_window is None else mask & (distance < attention_window)


@backends.dispatched
def dot_product_attention(
    query_BTNH: Float[Array, "B T N H"], key_BSNH: Float[Array, "B S N H"],
    value_BSNH: Float[Array, "B S N H"], mask: Mask, *, attention_impl: str = "auto",
    dropout_rate: float = 0.0, dropout_rng: Key[Array, ""] | None = None,
    return_weights: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"] | None]:
    """Scaled dot-product attention: softmax(Q K^T / sqrt(H)) V.

    Vaswani et al. 2017, "Attention Is All You Need", section 3.2.1. The softmax is computed in
    float32. The output of a query with no allowed key, such as a padding token, is the mean of all
    values: it is finite, and losses exclude these queries by a loss weight of 0.

    Args:
        mask: the keys that each query attends to.
        attention_impl: "xla" for matmuls and a softmax; "cudnn" or "splash" for a fused
            implementation, which never stores the weights `[T, S]` (Dao et al. 2022,
            "FlashAttention"); "auto" for the default of the platform. For inputs that the fused
            implementation does not support, "xla" is used instead; see
            `backends.tpu.supports_splash` and `backends.gpu.supports_cudnn`.
        dropout_rate: the rate of dropout on attention weights.
        dropout_rng: the key for dropout; None disables dropout.
        return_weights: whether to return the attention weights.

    Returns:
        The output; and the float32 attention weights before dropout, or None if not requested.

    Example:
        >>> x = jnp.ones((2, 5, 4, 8))  # B, T, N, H
        >>> out, weights = dot_product_attention(x, x, x, Mask(causal=True), return_weights=True)
        >>> out.shape, weights.shape
        ((2, 5, 4, 8), (2, 4, 5, 5))
    """
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", query_BTNH, key_BSNH,
                             preferred_element_type=jnp.float32) / query_BTNH.shape[-1] ** 0.5
    mask_BNTS = mask.to_dense(*scores_BNTS.shape[2:])
    if mask_BNTS is not None:
        scores_BNTS = jnp.where(mask_BNTS, scores_BNTS, jnp.finfo(jnp.float32).min)
    weights_BNTS = dropped_BNTS = jax.nn.softmax(scores_BNTS, axis=-1)
    if dropout_rng is not None and dropout_rate > 0:
        dropped_BNTS = dropout(weights_BNTS, dropout_rate, dropout_rng)
    out_BTNH = jnp.einsum("BNTS,BSNH->BTNH", dropped_BNTS.astype(value_BSNH.dtype), value_BSNH)
    return out_BTNH, weights_BNTS if return_weights else None


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

    def as_bsnh(self) -> tuple[Float[Array, "B S N H"], Float[Array, "B S N H"]]:
        """Returns keys and values with the axes that `dot_product_attention` takes."""
        return self.key.swapaxes(1, 2), self.value.swapaxes(1, 2)

    def update(
        self, key: Float[Array, "B T N H"], value: Float[Array, "B T N H"],
        positions: Int[Array, "B T"],
    ) -> "KVCache":
        """Returns a cache with `key` and `value` in the slots `positions`.

        Tokens at positions of S or more are dropped. Negative positions would index from the end.
        """
        rows = jnp.arange(positions.shape[0])[:, None]
        return KVCache(*(slots.at[rows, :, positions].set(new, mode="drop")
                         for slots, new in zip(self, (key, value))))
