"""Tokenized corpora, and rows of fixed length packed from them without padding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from transformer_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized text: one flat stream with the borders of documents and sentences.

    Attributes:
        tokens: [N], uint16 where the vocabulary allows, else int32.
        document_starts: int64 [documents + 1] offsets into tokens, the last one is N.
        sentence_starts: int64 [sentences + 1] likewise; every document start is among them.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    sentence_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def split_sentences(text: str) -> list[str]:
    """The sentences of a document that has one a line and a blank line between paragraphs.

    All but the first begin with what parts them from the one before, a space or, for a new
    paragraph, a line end: joined they are the running text, for tokenizers that keep white space.
    """
    pieces, gap = [], ""
    for line in map(str.strip, text.split("\n")):
        if line:
            pieces.append(gap + line)
        gap = " " if line else "\n"
    return [piece.lstrip() if i == 0 else piece for i, piece in enumerate(pieces)]


def tokenize_corpus(
    source: Sequence[Mapping],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    eos_id: int | None = None,
    sentences: bool = True,
    chunk: int = 256,
) -> Corpus:
    """Encodes a source's texts, one document each, into one stream.

    Args:
        eos_id: appended to every document, as part of its last sentence.
        sentences: lines are sentences, and blank lines end paragraphs (see `sentence_pieces`).
            False keeps the text exactly as it is, each document one sentence.
        chunk: documents that are encoded at once.

    Raises:
        ValueError: no text gives a token, or an example has no such key.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    tail = [] if eos_id is None else [eos_id]
    streams, lengths, documents = [], [], [0]  # documents: number of sentences before each
    for begin in range(0, len(source), chunk):
        texts = []
        for i in range(begin, min(begin + chunk, len(source))):
            if text_key not in source[i]:
                raise ValueError(f"example {i} has no {text_key!r}; it has {', '.join(source[i])}: "
                                 "name one of them as text_key")
            texts.append(source[i][text_key])
        pieces = [split_sentences(text) if sentences else [text] for text in texts]
        rows = iter(tokenizer.encode_batch([piece for found in pieces for piece in found]))
        for found in pieces:
            encoded = [row for row in (next(rows) for _ in found) if row]
            if encoded:
                encoded[-1] = encoded[-1] + tail
                streams.extend(np.asarray(row, dtype) for row in encoded)
                lengths.extend(map(len, encoded))
                documents.append(len(lengths))
    if not lengths:
        raise ValueError(f"the {len(source)} examples give 0 tokens; give at least one with text")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Corpus(np.concatenate(streams), starts[documents], starts)


class PackedTokens:
    """Rows of `length` tokens of a corpus without gaps, for the causal language model.

    Row i is tokens [i T, i T + T) of the stream with the next ones as targets, so every token that
    has another before it in its document is a target exactly once:

        tokens, targets: int32 [T]
        positions: int32 [T], from 0 at each document's first token in the row
        document_ids: int32 [T], from 1 in each row, 0 at padding, for attention within documents
        weights: float32 [T], 0 where the next token is of another document, and at padding

    Raises:
        ValueError: no document has two tokens, or length is below 1.
    """

    def __init__(self, corpus: Corpus, length: int):
        if length < 1:
            raise ValueError(f"length {length} of a row is too short; use at least 1")
        if len(corpus.tokens) < 2 or np.diff(corpus.document_starts).max() < 2:
            raise ValueError(f"a corpus of {len(corpus.tokens)} tokens has nothing to predict; "
                             "give a document of at least 2 tokens")
        self.corpus, self.length = corpus, length

    def __len__(self) -> int:
        return -(-(len(self.corpus.tokens) - 1) // self.length)

    def __getitem__(self, i: int) -> Batch:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} is outside the {len(self)} rows; count from 0")
        return {name: rows[0] for name, rows in self.take([i % len(self)]).items()}

    def take(self, rows: Sequence[int] | np.ndarray) -> Batch:
        """Many rows as one batch, [B, T], far faster than one by one. Rows behind the last are
        all padding."""
        stream, starts = self.corpus.tokens, self.corpus.document_starts
        at = np.asarray(rows, np.int64)[:, None] * self.length + np.arange(self.length + 1)
        inside = at < len(stream)
        text = np.where(inside, stream[np.minimum(at, len(stream) - 1)], 0)
        document = np.searchsorted(starts, at, side="right")  # counted from 1 in the corpus
        return shift(text, np.where(inside, document - document[:, :1] + 1, 0))


def shift(
    tokens: Int[np.ndarray, "... T+1"], document_ids: Int[np.ndarray, "... T+1"]
) -> dict[str, np.ndarray]:
    """Inputs and targets from windows that are one token longer than the rows to train on.

    The target of a token is its successor; it has weight 0 where the successor belongs to another
    document or to padding (document 0). Positions restart with every document.

    Returns:
        tokens, targets, positions, document_ids int32 and weights float32, each `[..., T]`.
    """
    documents, following = document_ids[..., :-1], document_ids[..., 1:]
    place = np.broadcast_to(np.arange(documents.shape[-1]), documents.shape)
    begins = np.ones(documents.shape, bool)
    begins[..., 1:] = documents[..., 1:] != documents[..., :-1]
    start = np.maximum.accumulate(np.where(begins, place, 0), axis=-1)
    return {
        "tokens": tokens[..., :-1].astype(np.int32),
        "targets": tokens[..., 1:].astype(np.int32),
        "positions": np.where(documents > 0, place - start, 0).astype(np.int32),
        "document_ids": documents.astype(np.int32),
        "weights": ((documents == following) & (documents > 0)).astype(np.float32),
    }
