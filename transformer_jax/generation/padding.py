"""Host-side checks and padding of token ids before they reach compiled code."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def power_of_two_length(length: int, limit: int) -> int:
    """Rounds a length up to a power of two, at least 16 and at most `limit`.

    This bounds the number of shapes to compile for.
    """
    return min(max(16, 1 << (length - 1).bit_length()), limit)


def unpad_rows(input_ids, attention_mask=None, name: str = "prompt") -> list[np.ndarray]:
    """Returns the tokens of each row without padding; `name` is what errors call a row."""
    rows = [np.asarray(row) for row in input_ids]
    shapes = [row.shape for row in rows]
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"{name}s have shapes {shapes}; give a batch of rows of token ids, such "
                         f"as [{name}]")
    if attention_mask is not None:
        masks = [np.asarray(mask, bool) for mask in attention_mask]
        if [mask.shape for mask in masks] != shapes:
            raise ValueError(f"attention_mask has rows of shapes {[m.shape for m in masks]} and "
                             f"input_ids of {shapes}; give one mask value for each token")
        rows = [row[mask] for row, mask in zip(rows, masks)]
    if not rows or not all(len(row) for row in rows):
        empty = [i for i, row in enumerate(rows) if not len(row)]
        raise ValueError(f"{name}s {empty} of {len(rows)} are empty; give each at least one token, "
                         "such as end-of-text")
    return rows


def check_token_ids(rows: Sequence[np.ndarray], vocab_size: int, name: str = "row {}") -> None:
    """Checks that token ids are integers in the vocabulary.

    On the device, invalid ids raise no error: the embedding of an id that is too large is NaN, and
    a negative id selects another token. In `name`, "{}" stands for the index of the row.
    """
    for i, row in enumerate(rows):
        row = np.asarray(row)
        if row.size and row.dtype.kind not in "iu":
            raise ValueError(f"{name.format(i)} has token ids of type {row.dtype}; give integers")
        invalid = row[(row < 0) | (row >= vocab_size)]
        if invalid.size:
            raise ValueError(f"{name.format(i)} has token id {invalid[0]}, outside the vocabulary "
                             f"of {vocab_size}; use the tokenizer the model was trained with")


def pad(
    rows: Sequence[np.ndarray], length: int, pad_id: int, side: str = "right"
) -> Int[np.ndarray, "B length"]:
    """Pads rows on the left or right to `length`."""
    out = np.full((len(rows), length), pad_id, np.int32)
    for out_row, row in zip(out, rows):
        out_row[slice(len(row)) if side == "right" else slice(length - len(row), None)] = row
    return out


def bad_words_table(
    bad_words_ids: Sequence[Sequence[int]] | None, eos_token_ids, vocab_size: int
) -> np.ndarray:
    """Returns forbidden token sequences as rows, aligned on the right and padded with -1.

    Both sizes of the table are powers of two, to bound the number of shapes to compile for. A
    sequence that consists of one end-of-sequence token is ignored; use `min_new_tokens` instead.

    Example:
        >>> bad_words_table([[4], [1, 2]], [], 10)
        array([[-1,  4],
               [ 1,  2]], dtype=int32)
    """
    if bad_words_ids is None:
        return np.zeros((0, 1), np.int32)
    rows = [np.atleast_1d(np.asarray(word)) for word in bad_words_ids]
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise ValueError(f"bad_words_ids {empty} have no tokens; omit them")
    check_token_ids(rows, vocab_size, "bad_words_ids {}")
    rows = [row for row in rows if not (len(row) == 1 and row[0] in eos_token_ids)]
    if not rows:
        return np.zeros((0, 1), np.int32)
    height, width = (1 << (n - 1).bit_length() for n in (len(rows), max(map(len, rows))))
    return pad([*rows, *[[]] * (height - len(rows))], width, -1, side="left")
