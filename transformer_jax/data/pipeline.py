"""From a corpus to batches of fixed shape: tokenize, pack, shuffle, batch (Grain, NumPy)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Int

from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.objectives.causal_lm import shift

_CHUNK = 4096  # texts encoded at a time: enough for all cores, little memory


class Corpus(NamedTuple):
    """Tokenized text: one flat array and where its parts begin; offsets end with N."""

    tokens: Int[np.ndarray, "N"]
    document_starts: Int[np.ndarray, "documents+1"]
    sentence_starts: Int[np.ndarray, "sentences+1"]


def tokenize_corpus(
    source: Sequence[dict], tokenizer: Tokenizer, *, text_key: str = "text",
    eos_id: int | None = None, sentences: bool = True,
) -> Corpus:
    """Documents as ids.

    Args:
        source: examples with a text, one a document.
        eos_id: put after each document.
        sentences: lines are sentences, blank lines and line ends are dropped; otherwise a document
            is one text, kept exactly.

    Raises:
        ValueError: there is no text.
    """
    texts, last_of_document = [], []
    for i in range(len(source)):
        text = source[i][text_key]
        parts = [line for line in text.splitlines() if line.strip()] if sentences else [text]
        texts += parts
        last_of_document += [False] * (len(parts) - 1) + [True] * bool(parts)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.int32
    pieces, lengths = [], []
    for begin in range(0, len(texts), _CHUNK):
        for ids in tokenizer.encode_batch(texts[begin : begin + _CHUNK]):
            if eos_id is not None and last_of_document[len(lengths)]:
                ids = [*ids, eos_id]
            pieces.append(np.asarray(ids, dtype))
            lengths.append(len(ids))
    if not sum(lengths):
        raise ValueError(f"{len(source)} documents hold no tokens; give text to train on")
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ends = np.flatnonzero(last_of_document) + 1
    documents = np.unique(np.concatenate([[0], starts[ends]]))
    return Corpus(np.concatenate(pieces), documents, np.unique(starts))


class PackedTokens(Sequence):
    """Windows of `length` tokens over a corpus, as rows for `causal_lm.loss`.

    Windows follow each other without a gap, so over all of them every token with a predecessor
    in its document is a target exactly once. Documents share windows without seeing each other;
    positions restart with each document and each window. The last window is padded.
    """

    def __init__(self, corpus: Corpus, length: int):
        if length < 1:
            raise ValueError(f"length is {length}; a row needs at least 1 token")
        self.corpus, self.length = corpus, length

    def __len__(self) -> int:
        # The last token of all is only ever a target.
        return max(-(-(len(self.corpus.tokens) - 1) // self.length), 1)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        starts = self.corpus.document_starts
        begin = i * self.length
        end = min(begin + self.length + 1, len(self.corpus.tokens))
        tokens = np.zeros(self.length + 1, np.int32)
        tokens[: end - begin] = self.corpus.tokens[begin:end]
        documents = np.zeros(self.length + 1, np.int32)
        first, last = np.searchsorted(starts, (begin, end - 1), side="right")
        borders = starts[first:last] - begin  # where a document begins inside the window
        documents[borders] = 1
        documents = np.cumsum(documents, dtype=np.int32) + 1
        documents[end - begin :] = 0
        return shift(tokens, documents)


class _Transform(grain.transforms.RandomMap):
    def __init__(self, function: Callable[[dict, np.random.Generator], dict]):
        self._function = function

    def random_map(self, element: dict, rng: np.random.Generator) -> dict:
        return self._function(element, rng)


class _PaddedBatch(grain.transforms.Map):
    """Rows stacked; a short last batch is filled with zero rows, which weigh nothing."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size

    def map(self, rows: Sequence[dict]) -> dict[str, np.ndarray]:
        batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
        missing = self._batch_size - len(rows)
        if missing:
            batch = {k: np.concatenate([v, np.zeros((missing, *v.shape[1:]), v.dtype)])
                     for k, v in batch.items()}
        return batch


def make_loader(
    source: Sequence[dict], batch_size: int, *,
    transform: Callable[[dict, np.random.Generator], dict] | None = None,
    seed: int = 0, shuffle: bool = True, num_epochs: int | None = None,
    drop_remainder: bool = True, prefetch: int = 16,
    process_index: int = 0, process_count: int = 1,
) -> grain.DatasetIterator:
    """An iterator of batches of NumPy arrays that knows where it stands (get_state, set_state).

    Each epoch is another shuffle, and `transform(example, rng)` gets another generator for each
    example and epoch, all from `seed`: batch n is the same whatever was read before it.

    Args:
        batch_size: rows a batch, of this process.
        num_epochs: None repeats without end; batches then run across epochs.
        drop_remainder: drop a short last batch; otherwise it is filled with zero rows, so that an
            evaluation sees every example exactly once at one shape.
        prefetch: rows prepared ahead in threads.
        process_index, process_count: this host's share is every process_count-th example.

    Raises:
        ValueError: an empty source, or one that is too small for a single batch.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; use at least 1")
    if len(source) == 0:
        raise ValueError("the source has 0 examples; give at least 1")
    mine = len(range(process_index, len(source), process_count))
    if not mine or (num_epochs is not None and drop_remainder and mine * num_epochs < batch_size):
        raise ValueError(f"{mine} examples for process {process_index} of {process_count} do not "
                         f"fill a batch of {batch_size}; lower batch_size or give more examples")
    data = grain.MapDataset.source(source).seed(seed)
    if shuffle:
        data = data.shuffle()
    data = data[process_index::process_count].repeat(num_epochs)
    if transform is not None:
        data = data.random_map(_Transform(transform))
    stacked = data.batch(batch_size, drop_remainder=drop_remainder, batch_fn=list)
    stacked = stacked.map(_PaddedBatch(batch_size))
    options = grain.ReadOptions(num_threads=2 if prefetch else 0, prefetch_buffer_size=prefetch or 1)
    return iter(stacked.to_iter_dataset(options))


def check_ids(batch: dict[str, np.ndarray], vocab_size: int, max_length: int) -> None:
    """Refuse a batch that XLA would clamp in silence. For the host, before training.

    Raises:
        ValueError: an id outside `[0, vocab_size)`, or rows longer than `max_length`.
    """
    for key in ("tokens", "targets", "masked_targets"):
        ids = np.asarray(batch.get(key, 0))
        bad = ids[(ids < 0) | (ids >= vocab_size)]
        if bad.size:
            raise ValueError(f"{key} hold id {bad[0]}, outside the vocabulary of {vocab_size}; use "
                             "the tokenizer the model was trained with")
    length = np.shape(batch["tokens"])[-1]
    if length > max_length:
        raise ValueError(f"rows of {length} tokens are longer than the model's {max_length} "
                         "positions; shorten them, or build the model with a larger max_length")
