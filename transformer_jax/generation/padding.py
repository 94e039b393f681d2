"""Rows of token ids on the host: what came in, checked and laid out for compiled code."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

SMALLEST_BUCKET = 16


def power_of_two_length(length: int, limit: int) -> int:
    """The next power of two from 16 up, at most `limit`: shapes that compiled code is kept for."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


def as_lists(input_ids, attention_mask=None, name: str = "prompt") -> list[np.ndarray]:
    """The real tokens of each row.

    Raises:
        ValueError: not a batch of rows, a mask of another shape, or a row without tokens.
    """
    rows = [np.asarray(row) for row in input_ids]
    shapes = [row.shape for row in rows]
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"{name}s have shapes {shapes}; give a batch of rows of ids: [{name}]")
    if attention_mask is not None:
        masks = [np.asarray(mask, bool) for mask in attention_mask]
        if [mask.shape for mask in masks] != shapes:
            raise ValueError(f"attention_mask has rows of shapes {[m.shape for m in masks]} and "
                             f"input_ids of {shapes}; give one mark for each token")
        rows = [row[mask] for row, mask in zip(rows, masks)]
    if not rows or not all(len(row) for row in rows):
        empty = [i for i, row in enumerate(rows) if not len(row)]
        raise ValueError(f"{name}s {empty} of {len(rows)} are empty; begin them with at least one "
                         "token, such as end-of-text")
    return rows


def check_prompt_ids(rows: Sequence[np.ndarray], vocab_size: int, name: str = "row {}") -> None:
    """Refuse ids that the device would look up without a word, as NaN or as another token."""
    for i, row in enumerate(rows):
        row = np.asarray(row)
        if row.size and row.dtype.kind not in "iu":
            raise ValueError(f"{name.format(i)} has token ids of type {row.dtype}; give integers")
        bad = row[(row < 0) | (row >= vocab_size)]
        if bad.size:
            raise ValueError(f"{name.format(i)} has token id {bad[0]}, outside the vocabulary of "
                             f"{vocab_size}; use the tokenizer the model was trained with")


def pad_right(rows: Sequence[np.ndarray], length: int, pad_id: int) -> Int[np.ndarray, "B length"]:
    out = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def pad_left(rows: Sequence[np.ndarray], length: int, pad_id: int) -> Int[np.ndarray, "B length"]:
    out = np.full((len(rows), length), pad_id, np.int32)
    for i, row in enumerate(rows):
        out[i, length - len(row) :] = row
    return out


def lengths_of(rows: Sequence[np.ndarray]) -> Int[np.ndarray, "B"]:
    return np.array([len(row) for row in rows], np.int32)
