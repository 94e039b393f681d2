"""The words that BERT puts in the place of a mask."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from transformer_jax.generation.padding import check_prompt_ids, power_of_two_length
from transformer_jax.models.bert import BERT


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _mask_scores(model, params, tokens, padding_mask, positions, top_k):
    logits_BPV = model.apply(
        {"params": params}, tokens, padding_mask=padding_mask, masked_positions=positions,
        method="masked_lm_logits",
    )
    return jax.lax.top_k(jax.nn.softmax(logits_BPV, axis=-1), top_k)


class MaskPrediction(NamedTuple):
    """Candidates for one mask, best first."""

    position: int
    token_ids: Int[np.ndarray, "k"]
    probabilities: Float[np.ndarray, "k"]


def fill_mask(
    model: BERT, params: dict, tokens: Sequence[int], *, mask_id: int, top_k: int = 5
) -> list[MaskPrediction]:
    """The likeliest tokens at each [MASK] of one row of ids with its special tokens placed.

    Raises:
        ValueError: no mask, an id outside the vocabulary, more tokens than positions, or no
            candidate asked for.
    """
    c = model.config
    ids = np.asarray(tokens)
    check_prompt_ids([ids], c.vocab_size)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; ask for at least 1 candidate")
    masks = np.flatnonzero(ids == mask_id)
    if not len(masks):
        raise ValueError(f"no token of {len(ids)} is the mask {mask_id}; put [MASK] into the text")
    if len(ids) > c.max_length:
        raise ValueError(f"text of {len(ids)} tokens is longer than the model's {c.max_length} "
                         "positions; shorten it")
    length = power_of_two_length(len(ids), c.max_length)
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    positions = np.zeros((1, power_of_two_length(len(masks), length)), np.int32)
    positions[0, : len(masks)] = masks
    real = np.arange(length)[None] < len(ids)
    probabilities, candidates = _mask_scores(
        model, params, row, real, positions, min(top_k, c.vocab_size)
    )
    return [
        MaskPrediction(int(p), np.asarray(candidates)[0, i], np.asarray(probabilities)[0, i])
        for i, p in enumerate(masks)
    ]
