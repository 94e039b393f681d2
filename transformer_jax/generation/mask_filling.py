"""Masked-token prediction with BERT."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from transformer_jax.generation.padding import check_token_ids, pad, power_of_two_length
from transformer_jax.models.bert import BERT


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _top_k_predictions(model, params, tokens, padding_mask, positions, top_k):
    logits_BPV = model.apply(
        {"params": params}, tokens, padding_mask=padding_mask, masked_positions=positions,
        method="masked_lm_logits",
    )
    return jax.lax.top_k(jax.nn.softmax(logits_BPV, axis=-1), top_k)


class MaskPrediction(NamedTuple):
    """The most probable tokens at one mask, in order of decreasing probability.

    Attributes:
        position: position of the mask in the row.
        token_ids: token ids.
        probabilities: their probabilities.
    """

    position: int
    token_ids: Int[np.ndarray, "k"]
    probabilities: Float[np.ndarray, "k"]


def fill_mask(
    model: BERT, params: dict, tokens: Sequence[int], *, mask_id: int, top_k: int = 5
) -> list[MaskPrediction]:
    """Predicts the tokens at the masks of one row.

    Args:
        model: BERT with a masked language modeling head.
        params: its parameters.
        tokens: token ids of the row, special tokens such as [CLS] and [SEP] included.
        mask_id: token id of [MASK].
        top_k: number of predictions for each mask.

    Returns:
        One `MaskPrediction` for each mask, in order of position.

    Raises:
        ValueError: there is no mask, an id is outside the vocabulary, the row is longer than the
            model's `max_length`, or `top_k` is below 1.

    Example:
        >>> import jax
        >>> from transformer_jax.models import BERT, BERTConfig, init_params
        >>> model = BERT(BERTConfig(vocab_size=11, max_length=8, num_layers=1, d_model=4,
        ...                         num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> [mask] = fill_mask(model, params, [1, 5, 4, 2], mask_id=4, top_k=3)
        >>> mask.position, mask.token_ids.shape
        (2, (3,))
    """
    max_length, vocab_size = model.config.max_length, model.config.vocab_size
    ids = np.asarray(tokens)
    check_token_ids([ids], vocab_size)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    masks = np.flatnonzero(ids == mask_id)
    if not len(masks):
        raise ValueError(f"none of {len(ids)} tokens is the mask token {mask_id}; put [MASK] into "
                         "the text")
    if len(ids) > max_length:
        raise ValueError(f"text of {len(ids)} tokens is longer than the model's max_length of "
                         f"{max_length}; shorten it")
    length = power_of_two_length(len(ids), max_length)
    row = pad([ids], length, 0)
    positions = pad([masks], power_of_two_length(len(masks), length), 0)
    padding_mask = np.arange(length)[None] < len(ids)
    probabilities, token_ids = map(np.asarray, _top_k_predictions(
        model, params, row, padding_mask, positions, min(top_k, vocab_size)))
    return [MaskPrediction(int(position), token_ids[0, i], probabilities[0, i])
            for i, position in enumerate(masks)]
