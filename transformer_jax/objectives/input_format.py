"""Input formatting in NumPy: special tokens, truncation and padding, as in the BERT and GPT papers.
"""

from collections.abc import Sequence

import numpy as np

TokenIds = Sequence[int] | np.ndarray


def pad(ids: TokenIds, length: int, fill: int = 0) -> np.ndarray:
    """Pads ids at the end to an int32 array of `length`.

    Example:
        >>> pad([7, 8], 4).tolist()
        [7, 8, 0, 0]
    """
    row = np.full(length, fill, np.int32)
    row[: len(ids)] = ids
    return row


def truncate_pair(
    a: TokenIds, b: TokenIds, max_tokens: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Truncates the longer of two sequences, one token at a time, until both together fit.

    This is `truncate_seq_pair` of BERT's released code. Of two sequences of equal length, the
    second is truncated.

    Args:
        a, b: token ids.
        max_tokens: maximum total length.
        rng: if given, each token is removed at random from the front or the end, as in BERT's
            pre-training, which avoids a bias towards the beginnings of texts. If None, tokens are
            removed from the end.

    Returns:
        The truncated sequences, int32.

    Example:
        >>> a, b = truncate_pair([1, 2, 3, 4], [5, 6], max_tokens=4)
        >>> a.tolist(), b.tolist()
        ([1, 2], [5, 6])
    """
    a, b = np.asarray(a, np.int32), np.asarray(b, np.int32)
    while len(a) + len(b) > max_tokens:
        remove_first = rng is not None and rng.random() < 0.5
        kept = slice(1, None) if remove_first else slice(None, -1)
        if len(a) > len(b):
            a = a[kept]
        else:
            b = b[kept]
    return a, b


def pack_bert_input(
    a: TokenIds,
    b: TokenIds | None = None,
    *,
    length: int,
    cls_id: int,
    sep_id: int,
    pad_id: int = 0,
    rng: np.random.Generator | None = None,
) -> dict[str, np.ndarray]:
    """One row `[CLS] a [SEP]`, or for a pair `[CLS] a [SEP] b [SEP]` (BERT paper, section 3).

    Texts that are too long are truncated (`truncate_pair`).

    Args:
        a, b: token ids of the texts, without special tokens.
        length: length T of the row.
        cls_id, sep_id, pad_id: ids of the special tokens.
        rng: see `truncate_pair`.

    Returns:
        tokens int32 `[T]`; segment_ids int32 `[T]`, 1 at `b` and its [SEP], else 0; padding_mask
        bool `[T]`, True at tokens and False at padding.

    Raises:
        ValueError: `length` leaves no room for one token of each text.

    Example:
        >>> row = pack_bert_input([7, 8], [9], length=8, cls_id=1, sep_id=2)
        >>> row["tokens"].tolist(), row["segment_ids"].tolist()
        ([1, 7, 8, 2, 9, 2, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0])
    """
    num_special_tokens = 2 if b is None else 3
    _check_length(length, num_special_tokens, a, b)
    a, b_truncated = truncate_pair(a, [] if b is None else b, length - num_special_tokens, rng)
    first = [cls_id, *a, sep_id]
    second = [] if b is None else [*b_truncated, sep_id]
    tokens = pad(first + second, length, pad_id)
    segment_ids = pad([0] * len(first) + [1] * len(second), length)
    return {"tokens": tokens, "segment_ids": segment_ids,
            "padding_mask": np.arange(length) < len(first) + len(second)}


def pack_gpt_input(
    a: TokenIds,
    b: TokenIds | None = None,
    *,
    length: int,
    extract_id: int,
    delimiter_id: int | None = None,
    start_id: int | None = None,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """One row `start a extract`, or for a pair `start a delimiter b extract`.

    GPT paper, section 3.3. Classifiers are applied to the hidden state of the extract token. Texts
    that are too long are truncated at the end (`truncate_pair`).

    Args:
        a, b: token ids of the texts, without special tokens.
        length: length T of the row.
        extract_id: id of the extract token. GPT-2, which has no such token, uses its end-of-text
            token.
        delimiter_id: id of the token between two texts; required if `b` is given.
        start_id: id of the start token; None for no start token.
        pad_id: id at padding.

    Returns:
        tokens int32 `[T]`; segment_ids int32 `[T]`, all 0; padding_mask bool `[T]`, True at tokens
        and False at padding.

    Raises:
        ValueError: `delimiter_id` is missing, or `length` leaves no room for one token of each
            text.

    Example:
        >>> pack_gpt_input([7, 8], length=5, extract_id=3)["tokens"].tolist()
        [7, 8, 3, 0, 0]
    """
    if b is not None and delimiter_id is None:
        raise ValueError("a second text is given but delimiter_id is None; pass the id of the "
                         "token that separates the two texts")
    start = [] if start_id is None else [start_id]
    max_tokens = length - len(start) - (1 if b is None else 2)
    _check_length(length, length - max_tokens, a, b)
    if b is None:
        ids = [*start, *a[:max_tokens], extract_id]
    else:
        a_truncated, b_truncated = truncate_pair(a, b, max_tokens)
        ids = [*start, *a_truncated, delimiter_id, *b_truncated, extract_id]
    return {"tokens": pad(ids, length, pad_id), "segment_ids": np.zeros(length, np.int32),
            "padding_mask": np.arange(length) < len(ids)}


def num_truncated_tokens(
    a: TokenIds, b: TokenIds | None, length: int, num_special_tokens: int
) -> int:
    """The number of tokens of a text or pair that do not fit into a row of `length`.

    Raises:
        ValueError: `length` leaves no room for one token of each text.

    Example:
        >>> num_truncated_tokens([1, 2, 3, 4], None, length=5, num_special_tokens=2)
        1
    """
    _check_length(length, num_special_tokens, a, b)
    num_tokens = len(a) + (0 if b is None else len(b)) + num_special_tokens
    return max(num_tokens - length, 0)


def _check_length(length: int, num_special_tokens: int, a: TokenIds, b: TokenIds | None) -> None:
    """Raises ValueError if a row has no room for one token of each text that is not empty."""
    min_length = num_special_tokens + (2 if b is not None and len(a) and len(b) else 1)
    if length < min_length:
        text = "text" if min_length == num_special_tokens + 1 else "both texts"
        raise ValueError(f"length {length} leaves no room for {text} beside {num_special_tokens} "
                         f"special tokens; use at least {min_length}")
