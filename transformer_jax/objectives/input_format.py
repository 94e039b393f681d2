"""How text becomes a row of ids: each paper's special tokens, truncation and padding. NumPy."""

from collections.abc import Sequence

import numpy as np

Ids = Sequence[int] | np.ndarray


def pad(ids: Ids, length: int, fill: int = 0) -> np.ndarray:
    """int32 row of `length`: `ids`, then `fill`."""
    row = np.full(length, fill, np.int32)
    row[: len(ids)] = ids
    return row


def truncate_pair(
    a: Ids, b: Ids, max_tokens: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Shorten the longer of two sequences until both fit (`truncate_seq_pair` of BERT's release).

    With `rng`, tokens leave from the front or the back at random, to avoid biases; without, from
    the back.
    """
    a, b = np.asarray(a, np.int32), np.asarray(b, np.int32)
    while len(a) + len(b) > max_tokens:
        front = rng is not None and rng.random() < 0.5
        cut = slice(1, None) if front else slice(None, -1)
        if len(a) > len(b):
            a = a[cut]
        else:
            b = b[cut]
    return a, b


def pack_bert_input(
    a: Ids,
    b: Ids | None = None,
    *,
    length: int,
    cls_id: int,
    sep_id: int,
    pad_id: int = 0,
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """[CLS] a [SEP], or [CLS] a [SEP] b [SEP] with segment 1 over b (BERT paper, section 3).

    Longer text is cut to fit (`truncate_pair`).

    Returns:
        tokens, segment_ids int32 `[length]`; padding_mask bool `[length]`, True at tokens.

    Raises:
        ValueError: no room for text, or for a token of each text.
    """
    specials = 2 if b is None else 3
    _check_room(length, specials, a, b)
    a, b_cut = truncate_pair(a, [] if b is None else b, length - specials, rng)
    first = [cls_id, *a, sep_id]
    second = [] if b is None else [*b_cut, sep_id]
    tokens = pad(first + second, length, pad_id)
    segment_ids = pad([0] * len(first) + [1] * len(second), length)
    return {"tokens": tokens, "segment_ids": segment_ids,
            "padding_mask": np.arange(length) < len(first) + len(second)}


def pack_gpt_input(
    a: Ids,
    b: Ids | None = None,
    *,
    length: int,
    extract_id: int,
    delimiter_id: int | None = None,
    start_id: int | None = None,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """start a extract, or start a delimiter b extract (GPT paper, section 3.3), without start where
    `start_id` is None.

    The hidden state of the extract token is classified; GPT-2's end-of-text token serves. Longer
    text is cut at the end (`truncate_pair`).

    Returns:
        tokens, segment_ids (all 0) int32 `[length]`; padding_mask bool `[length]`, True at tokens.

    Raises:
        ValueError: a pair without `delimiter_id`, or no room for text, or for a token of each text.
    """
    if b is not None and delimiter_id is None:
        raise ValueError("a second text is given but delimiter_id is None; pass the id of the "
                         "token that parts the two texts")
    front = [] if start_id is None else [start_id]
    room = length - len(front) - (1 if b is None else 2)
    _check_room(length, length - room, a, b)
    if b is None:
        ids = [*front, *a[:room], extract_id]
    else:
        a_cut, b_cut = truncate_pair(a, b, room)
        ids = [*front, *a_cut, delimiter_id, *b_cut, extract_id]
    return {"tokens": pad(ids, length, pad_id), "segment_ids": np.zeros(length, np.int32),
            "padding_mask": np.arange(length) < len(ids)}


def num_truncated(a: Ids, b: Ids | None, length: int, specials: int) -> int:
    """How many tokens of a text, or of a pair, a row of `length` with so many special tokens has no
    room for.

    Raises:
        ValueError: no room for text, or for a token of each text.
    """
    _check_room(length, specials, a, b)
    return max(len(a) + (0 if b is None else len(b)) + specials - length, 0)


def _check_room(length: int, specials: int, a: Ids, b: Ids | None) -> None:
    least = specials + (2 if b is not None and len(a) and len(b) else 1)
    if length < least:
        text = "text" if least == specials + 1 else "both texts"
        raise ValueError(f"length {length} leaves no room for {text} beside {specials} special "
                         f"tokens; use at least {least}")
