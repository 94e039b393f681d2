"""Tokenized corpora, and packing them into rows without padding for causal language modeling."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from transformer_jax.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]  # as `batching.Batch`; importing `batching` would import Grain
DOCUMENTS_PER_CALL = 256  # number of documents that are passed to the tokenizer at a time


@dataclass(frozen=True, eq=False)
class Corpus:
    """A tokenized corpus: the concatenated tokens of all documents, and the offsets of its parts.

    Attributes:
        tokens: [num_tokens], uint16 if the vocabulary size allows it, else int32.
        document_starts: int64 [num_documents + 1], the offset of each document's first token; the
            last entry is num_tokens.
        sentence_starts: int64 [num_sentences + 1], the same for sentences, of which a document
            start is one.
    """

    tokens: np.ndarray
    document_starts: np.ndarray
    sentence_starts: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)


def split_sentences(text: str) -> list[str]:
    r"""Splits a document that has one sentence per line and blank lines between paragraphs.

    Each sentence but the first begins with the white space that separates it from the previous one:
    a space, or a newline for a new paragraph. The concatenated sentences are therefore running
    text, as needed by tokenizers that preserve white space.

    Example:
        >>> split_sentences("One.\nTwo.\n\nThree.")
        ['One.', ' Two.', '\nThree.']
    """
    sentences, separator = [], ""
    for line in map(str.strip, text.split("\n")):
        if line:
            sentences.append(separator + line)
        separator = " " if line else "\n"
    return [sentence.lstrip() if i == 0 else sentence for i, sentence in enumerate(sentences)]


def tokenize_corpus(
    source: Sequence[Mapping],
    tokenizer: Tokenizer,
    *,
    text_key: str = "text",
    eos_id: int | None = None,
    one_sentence_per_line: bool = True,
    allow_empty: bool = False,
) -> Corpus:
    """Tokenizes the texts of a source, one document per example, without special tokens.

    Documents without tokens are left out.

    Args:
        source: sequence of examples, dicts with the text under `text_key`.
        eos_id: id that is appended to the last sentence of every document; None for no such token.
        one_sentence_per_line: whether each line is a sentence and blank lines separate paragraphs
            (see `split_sentences`). If False, the text is tokenized exactly as it is, and each
            document counts as one sentence.
        allow_empty: whether the corpus may have no token.

    Raises:
        ValueError: no example contains a token, or an example has no `text_key`.

    Example:
        >>> from transformer_jax.data import tokenizers
        >>> source = [{"text": "ab"}, {"text": "bab"}]
        >>> corpus = tokenize_corpus(source, tokenizers.train_chars(["ab"]))
        >>> corpus.tokens.tolist(), corpus.document_starts.tolist()
        ([2, 3, 3, 2, 3], [0, 2, 5])
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    suffix = [] if eos_id is None else [eos_id]
    arrays, lengths = [np.zeros(0, dtype)], []  # tokens, and number of tokens of each sentence
    first_sentences = [0]  # index of the first sentence of each document
    for begin in range(0, len(source), DOCUMENTS_PER_CALL):
        documents = []
        for i in range(begin, min(begin + DOCUMENTS_PER_CALL, len(source))):
            if text_key not in source[i]:
                raise ValueError(f"example {i} has no {text_key!r}; it has {', '.join(source[i])}: "
                                 "name one of them as text_key")
            text = source[i][text_key]
            documents.append(split_sentences(text) if one_sentence_per_line else [text])
        encoded = iter(tokenizer.encode_batch(list(itertools.chain.from_iterable(documents))))
        for document in documents:
            sentences = [ids for ids in itertools.islice(encoded, len(document)) if ids]
            if sentences:
                sentences[-1] = sentences[-1] + suffix
                arrays.extend(np.asarray(ids, dtype) for ids in sentences)
                lengths.extend(map(len, sentences))
                first_sentences.append(len(lengths))
    if not lengths and not allow_empty:
        raise ValueError(f"the {len(source)} examples contain 0 tokens; give at least one with "
                         "text")
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return Corpus(np.concatenate(arrays), starts[first_sentences], starts)


class PackedTokens:
    """The tokens of a corpus as rows of equal length, without gaps, for causal language modeling.

    The inputs of row i are the tokens [i T, (i + 1) T) of the corpus, and the target of each input
    is the next token. Every token except the first of its document is therefore a target with
    weight 1 exactly once. A row is a dict of

        tokens, targets: int32 [T]
        positions: int32 [T], counted from 0 at each document's first token in the row
        document_ids: int32 [T], counted from 1 in each row, 0 for padding; they restrict attention
            to the same document
        weights: float32 [T], 0 where the target belongs to another document, and for padding

    Example:
        >>> corpus = Corpus(np.arange(1, 8), np.array([0, 3, 7]), np.array([0, 3, 7]))
        >>> row = PackedTokens(corpus, length=4)[0]
        >>> row["tokens"].tolist(), row["targets"].tolist()
        ([1, 2, 3, 4], [2, 3, 4, 5])
        >>> row["document_ids"].tolist(), row["weights"].tolist()
        ([1, 1, 1, 2], [1.0, 1.0, 0.0, 1.0])
    """

    def __init__(self, corpus: Corpus, length: int):
        if length < 1:
            raise ValueError(f"the row length is {length}; it must be at least 1")
        if len(corpus.tokens) < 2 or np.diff(corpus.document_starts).max() < 2:
            raise ValueError(f"no document of the corpus of {len(corpus.tokens)} tokens has a "
                             "token to predict; give a document of at least 2 tokens")
        self.corpus, self.length = corpus, length

    def __len__(self) -> int:
        return -(-(len(self.corpus.tokens) - 1) // self.length)

    def __getitem__(self, i: int) -> Batch:
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} is out of range; there are {len(self)} rows, counted from 0")
        return {name: rows[0] for name, rows in self.take([i % len(self)]).items()}

    def take(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """Returns several rows as one batch [B, T], which is much faster than one row at a time.

        An index past the last row gives a row of padding.
        """
        tokens, starts = self.corpus.tokens, self.corpus.document_starts
        offsets = np.asarray(indices, np.int64)[:, None] * self.length + np.arange(self.length + 1)
        in_corpus = offsets < len(tokens)
        windows = np.where(in_corpus, tokens[np.minimum(offsets, len(tokens) - 1)], 0)
        documents = np.searchsorted(starts, offsets, side="right")  # counted from 1 in the corpus
        return shift_tokens(windows, np.where(in_corpus, documents - documents[:, :1] + 1, 0))


def shift_tokens(
    tokens: Int[np.ndarray, "... T+1"], document_ids: Int[np.ndarray, "... T+1"]
) -> Batch:
    """Makes inputs and targets, as in a row of `PackedTokens`, from windows of T + 1 tokens.

    The target of a token is the next token. Its weight is 0 if the next token belongs to another
    document or is padding (document 0). Positions restart at the beginning of each document.

    Example:
        >>> batch = shift_tokens(np.array([5, 6, 7, 8]), np.array([1, 1, 2, 2]))
        >>> batch["tokens"].tolist(), batch["targets"].tolist()
        ([5, 6, 7], [6, 7, 8])
        >>> batch["positions"].tolist(), batch["weights"].tolist()
        ([0, 1, 0], [1.0, 0.0, 1.0])
    """
    documents, next_documents = document_ids[..., :-1], document_ids[..., 1:]
    indices = np.broadcast_to(np.arange(documents.shape[-1]), documents.shape)
    is_start = np.ones(documents.shape, bool)
    is_start[..., 1:] = documents[..., 1:] != documents[..., :-1]
    start_of_document = np.maximum.accumulate(np.where(is_start, indices, 0), axis=-1)
    return {
        "tokens": tokens[..., :-1].astype(np.int32),
        "targets": tokens[..., 1:].astype(np.int32),
        "positions": np.where(documents > 0, indices - start_of_document, 0).astype(np.int32),
        "document_ids": documents.astype(np.int32),
        "weights": ((documents == next_documents) & (documents > 0)).astype(np.float32),
    }
