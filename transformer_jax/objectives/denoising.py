"""BART's denoising objective: reconstruct a text from a corrupted copy.

Lewis et al. 2019, "BART", section 2.2. There are five kinds of noise; those that are enabled
are applied in this order:

- sentence permutation: the sentences are put in random order.
- text infilling: spans of Poisson-distributed length are replaced by one mask token each; a span
  of length 0 inserts a mask token.
- token masking: random tokens are replaced by the mask token.
- token deletion: random tokens are removed.
- document rotation: the text is rotated so that it begins with a random token.

The corrupted text is the source and the original text is the target of `objectives.seq2seq`, whose
`loss` and batch keys this objective uses:

| key              | dtype   | shape    | meaning                                                |
|------------------|---------|----------|--------------------------------------------------------|
| `tokens`         | int32   | `[B, T]` | corrupted text, with special tokens                    |
| `padding_mask`   | bool    | `[B, T]` | True at tokens of the corrupted text, False at padding |
| `decoder_tokens` | int32   | `[B, T]` | the start token, then `targets` without the last one  |
| `targets`        | int32   | `[B, T]` | original text, with special tokens                     |
| `weights`        | float32 | `[B, T]` | 1 at targets, 0 at padding                             |
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool

from transformer_jax.objectives import seq2seq
from transformer_jax.objectives.input_format import TokenIds


class Noise(NamedTuple):
    """How a text is corrupted. The defaults are those of BART-large (section 5).

    Attributes:
        permute: whether sentences are permuted.
        infill: fraction of the tokens (or words) that text infilling replaces.
        mean_span: mean length of a span of text infilling, lambda of the Poisson distribution.
        mask: fraction of the tokens that token masking replaces.
        delete: fraction of the tokens that token deletion removes.
        rotate: probability of document rotation.
    """

    permute: bool = True
    infill: float = 0.3
    mean_span: float = 3.0
    mask: float = 0.0
    delete: float = 0.0
    rotate: float = 0.0

    def check(self) -> None:
        """Raises ValueError if a fraction is outside 0 to 1, or `mean_span` outside 0.1 to 1000."""
        for name in ("infill", "mask", "delete", "rotate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"noise {name} is {getattr(self, name)}; it must be a fraction "
                                 "from 0 to 1")
        if not 0.1 <= self.mean_span <= 1000:
            raise ValueError(f"noise mean_span is {self.mean_span}; it must be from 0.1 to 1000")


def text_infilling(
    tokens: TokenIds,
    rng: np.random.Generator,
    *,
    rate: float,
    mean_span: float,
    mask_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> np.ndarray:
    """Replaces spans of Poisson-distributed length by one mask token each.

    Lengths are sampled until `rate` of the tokens are in spans; the last length is reduced to fit.
    Each span (a span of length 0 too) is then assigned its own gap between two remaining tokens;
    all gaps are equally likely. Therefore no two mask tokens are adjacent, and the first and the
    last token of a text are replaced less often than the others.

    Args:
        tokens: token ids of a text.
        rng: random generator.
        rate: fraction of the tokens that is replaced.
        mean_span: mean length of a span.
        mask_id: id of the mask token.
        word_starts: for each id of the vocabulary, whether it begins a word. If given, spans
            consist of whole words, and `rate` and lengths count words.

    Returns:
        The corrupted token ids, int32.

    Example:
        >>> tokens = text_infilling(
        ...     range(10, 20), np.random.default_rng(0), rate=0.3, mean_span=3.0, mask_id=4)
        >>> len(tokens[tokens != 4])  # 3 of the 10 tokens are replaced
        7
    """
    tokens = np.asarray(tokens, np.int32)
    # A unit is a token or a word; unit i consists of tokens[edges[i] : edges[i + 1]].
    if word_starts is None:
        edges = np.arange(len(tokens) + 1)
    else:
        inner_edges = 1 + np.flatnonzero(word_starts[tokens[1:]])
        edges = np.unique(np.concatenate([[0], inner_edges, [len(tokens)]]))
    num_units = len(edges) - 1
    lengths = _sample_span_lengths(round(rate * num_units), mean_span, rng)
    num_gaps = num_units - lengths.sum() + 1
    if len(lengths) > num_gaps:  # very few units remain: join the surplus spans into one
        lengths = np.append(lengths[: num_gaps - 1], lengths[num_gaps - 1 :].sum())
    lengths = rng.permutation(lengths)  # so that the reduced length is not always the last
    # A span in gap g has g remaining units before it, and the units of all spans before it.
    start_units = np.sort(rng.choice(num_gaps, len(lengths), replace=False))
    start_units += np.cumsum(lengths) - lengths
    starts, ends = edges[start_units], edges[start_units + lengths]
    depth_changes = np.zeros(len(tokens) + 1, np.int64)
    depth_changes[starts] += 1
    depth_changes[ends] -= 1
    is_hidden = np.cumsum(depth_changes[:-1]) > 0
    num_hidden_before = np.cumsum(ends - starts) - (ends - starts)
    return np.insert(tokens[~is_hidden], starts - num_hidden_before, mask_id)


def _sample_span_lengths(total: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Samples Poisson-distributed lengths of sum `total`; the last one is reduced to fit."""
    lengths = np.zeros(0, np.int64)
    while lengths.sum() < total:
        lengths = np.append(lengths, rng.poisson(mean, total))
    sum_before = np.cumsum(lengths) - lengths
    return np.minimum(lengths, total - sum_before)[sum_before < total]


def token_masking(
    tokens: TokenIds, rng: np.random.Generator, *, rate: float, mask_id: int
) -> np.ndarray:
    """Replaces the fraction `rate` of the tokens, chosen at random, by `mask_id`."""
    masked = np.array(tokens, np.int32)
    masked[_sample_positions(len(masked), rate, rng)] = mask_id
    return masked


def token_deletion(tokens: TokenIds, rng: np.random.Generator, *, rate: float) -> np.ndarray:
    """Removes the fraction `rate` of the tokens, chosen at random."""
    return np.delete(np.asarray(tokens, np.int32), _sample_positions(len(tokens), rate, rng))


def document_rotation(tokens: TokenIds, rng: np.random.Generator) -> np.ndarray:
    """Rotates the tokens so that a random one comes first; the tokens before it come last."""
    return np.roll(np.asarray(tokens, np.int32), -int(rng.integers(max(len(tokens), 1))))


def _sample_positions(num_tokens: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(num_tokens, round(rate * num_tokens), replace=False)


def corrupt(
    sentences: Sequence[TokenIds],
    rng: np.random.Generator,
    noise: Noise,
    *,
    mask_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> np.ndarray:
    """Corrupts a text, given as the token ids of its sentences.

    Args:
        sentences: token ids of each sentence.
        rng: random generator; the same seed gives the same corrupted text.
        noise: kinds and rates of the noise.
        mask_id: id of the mask token.
        word_starts: see `text_infilling`.

    Returns:
        The corrupted token ids, int32.

    Example:
        >>> noise = Noise(permute=False, infill=0.0, mask=1.0)
        >>> corrupt([[10, 11], [20]], np.random.default_rng(0), noise, mask_id=4).tolist()
        [4, 4, 4]
    """
    order = rng.permutation(len(sentences)) if noise.permute else range(len(sentences))
    tokens = np.concatenate([np.asarray(sentences[i], np.int32) for i in order])
    if noise.infill:
        tokens = text_infilling(tokens, rng, rate=noise.infill, mean_span=noise.mean_span,
                                mask_id=mask_id, word_starts=word_starts)
    if noise.mask:
        tokens = token_masking(tokens, rng, rate=noise.mask, mask_id=mask_id)
    if noise.delete:
        tokens = token_deletion(tokens, rng, rate=noise.delete)
    if rng.random() < noise.rotate:
        tokens = document_rotation(tokens, rng)
    return tokens


class Passages:
    """Random access to the passages of a corpus: consecutive sentences of one document.

    Each passage contains as many sentences as fit into `max_tokens`; a sentence that is longer is
    split. Item i is the list of the passage's sentences, arrays of token ids.

    Args:
        corpus: a `data.Corpus`, or any object with its arrays `tokens`, `document_starts` and
            `sentence_starts`.
        max_tokens: maximum number of tokens of a passage.

    Raises:
        ValueError: `max_tokens` is below 1, or the corpus is empty.
    """

    def __init__(self, corpus, max_tokens: int):
        if max_tokens < 1:
            raise ValueError(f"max_tokens of a passage is {max_tokens}; use at least 1")
        self.corpus = corpus
        # Empty sentences and documents begin where the next one does; `unique` removes them.
        starts = np.unique(corpus.sentence_starts)
        split_starts = [np.arange(a, b, max_tokens) for a, b in itertools.pairwise(starts)]
        self.sentence_starts = starts = np.concatenate([*split_starts, starts[-1:]])
        document_edges = np.searchsorted(starts, np.unique(corpus.document_starts))
        passages = []
        for first, end in itertools.pairwise(document_edges):
            while first < end:
                stop = np.searchsorted(starts, starts[first] + max_tokens, side="right") - 1
                stop = min(max(stop, first + 1), end)
                passages.append((first, stop))
                first = stop
        if not passages:
            raise ValueError("the corpus has 0 sentences; it needs at least 1")
        self.passages = np.asarray(passages, np.int64)  # half-open ranges of sentence indices

    def __len__(self) -> int:
        return len(self.passages)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        first, stop = self.passages[i]
        edges = itertools.pairwise(self.sentence_starts[first : stop + 1])
        return [np.asarray(self.corpus.tokens[a:b]) for a, b in edges]


def prepare(
    sentences: Sequence[TokenIds],
    rng: np.random.Generator,
    *,
    noise: Noise,
    length: int,
    mask_id: int,
    start_id: int,
    bos_id: int | None,
    eos_id: int,
    pad_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> dict[str, np.ndarray]:
    """Converts a passage to one row: the corrupted text as source, the original text as target.

    Args:
        sentences: token ids of each sentence, without special tokens. Tokens that do not fit into
            the row are removed before the text is corrupted.
        rng: random generator of the noise.
        noise: kinds and rates of the noise.
        length: length T of source and target, with special tokens.
        mask_id: id of the mask token.
        start_id, bos_id, eos_id, pad_id: see `seq2seq.prepare`.
        word_starts: see `text_infilling`.

    Returns:
        A row, as returned by `seq2seq.prepare`.

    Raises:
        ValueError: a value of `noise` is out of range, or `length` leaves no room for text.

    Example:
        >>> row = prepare([[10, 11], [20]], np.random.default_rng(0), length=5,
        ...               noise=Noise(infill=1.0), mask_id=4, start_id=2, bos_id=0, eos_id=2,
        ...               pad_id=1)
        >>> row["tokens"].tolist(), row["targets"].tolist()  # all tokens in one span
        ([0, 4, 2, 1, 1], [0, 10, 11, 20, 2])
    """
    noise.check()
    max_tokens = max(length - (1 if bos_id is None else 2), 0)
    target = np.concatenate([np.asarray(s, np.int32) for s in sentences])[:max_tokens]
    truncated, num_left = [], len(target)
    for sentence in sentences:
        truncated.append(np.asarray(sentence)[:num_left])
        num_left -= len(truncated[-1])
    source = corrupt([s for s in truncated if len(s)] or [target], rng, noise, mask_id=mask_id,
                     word_starts=word_starts)
    return seq2seq.prepare(
        {"source": source, "target": target}, source_length=length, target_length=length,
        start_id=start_id, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


loss = seq2seq.loss
