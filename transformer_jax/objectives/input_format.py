"""Rows in NumPy: special tokens, truncation and padding, as in the BERT and GPT papers, and the
sentences that they are made of."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.models import BERT, GPT, Transformer

TokenIds = Sequence[int] | np.ndarray


def pad(ids: TokenIds, length: int, fill: int = 0) -> np.ndarray:
    """Pads ids at the end to an int32 array of `length`."""
    row = np.full(length, fill, np.int32)
    row[: len(ids)] = ids
    return row


def stack_rows(rows: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def truncate_pair(
    a: TokenIds, b: TokenIds, max_tokens: int, rng: np.random.Generator | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Truncates the longer of two sequences, one token at a time, until both together fit.

    This is `truncate_seq_pair` of BERT's released code. Of two sequences of equal length, the
    second is truncated. With `rng`, each token is removed at random from the front or the end, as
    in BERT's pre-training, which avoids a bias towards the beginnings of texts; without, from the
    end.
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
    a: TokenIds, b: TokenIds | None = None, *, length: int, cls_id: int, sep_id: int,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """One row `[CLS] a [SEP]`, or for a pair `[CLS] a [SEP] b [SEP]` (BERT paper, section 3).

    Texts that are too long are truncated (`truncate_pair`); ValueError if `length` leaves no room
    for one token of each.

    Returns:
        tokens, segment_ids (1 at `b` and its [SEP]) int32 and padding_mask (True at tokens) bool.

    Example:
        >>> row = pack_bert_input([7, 8], [9], length=8, cls_id=1, sep_id=2)
        >>> row["tokens"].tolist(), row["segment_ids"].tolist()
        ([1, 7, 8, 2, 9, 2, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0])
    """
    num_special_tokens = 2 if b is None else 3
    _check_length(length, num_special_tokens, a, b)
    a, b_truncated = truncate_pair(a, [] if b is None else b, length - num_special_tokens)
    first = [cls_id, *a, sep_id]
    second = [] if b is None else [*b_truncated, sep_id]
    return {"tokens": pad(first + second, length, pad_id),
            "segment_ids": pad([0] * len(first) + [1] * len(second), length),
            "padding_mask": np.arange(length) < len(first) + len(second)}


def pack_gpt_input(
    a: TokenIds, b: TokenIds | None = None, *, length: int, extract_id: int,
    delimiter_id: int | None = None, start_id: int | None = None, pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """One row `start a extract`, or for a pair `start a delimiter b extract`.

    GPT paper, section 3.3. Classifiers are applied to the hidden state of the extract token; GPT-2,
    which has no such token, uses its end-of-text token. Without `start_id`, there is no start
    token. Arrays, truncation and errors as for `pack_bert_input`; segment_ids are all 0.

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


def _check_length(length: int, num_special_tokens: int, a: TokenIds, b: TokenIds | None) -> None:
    """Raises ValueError if a row has no room for one token of each text that is not empty."""
    min_length = num_special_tokens + (2 if b is not None and len(a) and len(b) else 1)
    if length < min_length:
        text = "text" if min_length == num_special_tokens + 1 else "both texts"
        raise ValueError(f"length {length} leaves no room for {text} beside {num_special_tokens} "
                         f"special tokens; use at least {min_length}")


class SpecialTokens(NamedTuple):
    """Ids of the special tokens of GPT's input format (`pack_gpt_input`).

    Ids of `vocab_size` or more refer to embeddings that `finetuning.peft.add_tokens` adds.
    """

    start_id: int | None
    delimiter_id: int | None
    extract_id: int

    @classmethod
    def append_to_vocab(cls, vocab_size: int) -> "SpecialTokens":
        """Three new tokens with the ids after the vocabulary, as in the GPT paper."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


def make_input_packer(
    model: GPT | BERT | Transformer, tokenizer: Any, length: int,
    special_tokens: SpecialTokens | None = None,
) -> Callable:
    """Returns `pack_input(a, b=None)`: `pack_gpt_input` or `pack_bert_input` with options bound.

    Without `special_tokens`, the only special token of GPT is the extract token, for which the
    tokenizer's end-of-text token is used.
    """
    if isinstance(model, GPT):
        s = special_tokens or SpecialTokens(None, None, tokenizer.eos_id)
        return functools.partial(pack_gpt_input, length=length, **s._asdict())
    return functools.partial(pack_bert_input, length=length, cls_id=tokenizer.cls_id,
                             sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id)


class SentenceRanges:
    """Ranges of consecutive sentences of one document, for random access to a corpus.

    Each has as many sentences as fit into `max_tokens`, but at least `min_sentences`; fewer
    sentences at the end of a document are added to the range before them, or left out. If
    `min_sentences` is 1, longer sentences are split. The corpus is a `data.Corpus`, or has its
    arrays `tokens`, `document_starts` and `sentence_starts`.
    """

    def __init__(self, corpus, max_tokens: int, min_sentences: int):
        self.corpus = corpus
        # Empty sentences and documents begin where the next one does; `unique` removes them.
        starts = np.unique(corpus.sentence_starts)
        if min_sentences == 1:
            parts = [np.arange(a, b, max_tokens) for a, b in itertools.pairwise(starts)]
            starts = np.concatenate([*parts, starts[-1:]])
        self.sentence_starts = starts
        # The index of each document's first sentence, and the number of all sentences.
        self.document_edges = np.searchsorted(starts, np.unique(corpus.document_starts))
        ranges = []
        for document, (first, end) in enumerate(itertools.pairwise(self.document_edges)):
            while end - first >= min_sentences:
                stop = min(max(self.last_stop(first, max_tokens), first + min_sentences), end)
                stop = end if end - stop < min_sentences else stop
                ranges.append((first, stop, document))
                first = stop
        self.ranges = np.asarray(ranges, np.int64).reshape(-1, 3)

    def last_stop(self, first: int, max_tokens: int) -> int:
        """The highest `stop` so that sentences `first` to `stop - 1` fit into `max_tokens`."""
        starts = self.sentence_starts
        return int(np.searchsorted(starts, starts[first] + max_tokens, side="right")) - 1

    def tokens(self, first: int, stop: int) -> np.ndarray:
        """The tokens of sentences `first` to `stop - 1`."""
        return np.asarray(
            self.corpus.tokens[self.sentence_starts[first] : self.sentence_starts[stop]])

    def __len__(self) -> int:
        return len(self.ranges)
