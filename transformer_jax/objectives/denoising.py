"""BART's objective: restore a text from a noised one (Lewis et al. 2019, section 2.2). NumPy.

Five kinds of noise, alone or together, in this order where together:

  sentence permutation   sentences in random order
  text infilling         spans, of Poisson length, each become one mask; an empty one is put in
  token masking          tokens become masks
  token deletion         tokens go, and nothing tells where
  document rotation      the text begins at a random token, and its beginning follows its end

The loss is that of sequence to sequence: `seq2seq.loss`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from transformer_jax.objectives import seq2seq

Ids = Int[np.ndarray, "N"]


class Noise(NamedTuple):
    """What is done to a text. The default is BART-large's: sentence permutation and text infilling
    of 30 % (section 5). Shares are of 1."""

    permute: bool = True
    infill: float = 0.3  # of the tokens, or words, are in spans
    mean_span: float = 3.0  # lambda of the Poisson law of a span's length
    mask: float = 0.0  # of the tokens
    delete: float = 0.0  # of the tokens
    rotate: float = 0.0  # of the texts

    def check(self) -> None:
        """Raises ValueError where a share is outside 0 to 1, or a mean outside 0.1 to 1000."""
        for name in ("infill", "mask", "delete", "rotate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"noise {name} is {getattr(self, name)}; it is a share, from 0 "
                                 "to 1")
        if not 0.1 <= self.mean_span <= 1000:
            raise ValueError(f"noise mean_span is {self.mean_span}; it has to be from 0.1 to 1000")


def infill(
    tokens: Ids,
    rng: np.random.Generator,
    *,
    share: float,
    mean_span: float,
    mask_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> Ids:
    """Text infilling: spans of Poisson length are replaced by one mask each.

    Lengths are drawn until `share` of the tokens are in spans, the last one cut to fit. Every span,
    the empty ones too, gets a gap of its own between two tokens that stay, all gaps being equally
    likely; so no two masks are neighbours, and a text's first and last token are hidden less often
    than those between.

    Args:
        word_starts: for each id, whether it begins a word. Given, spans are of whole words, and
            lengths and the share are counted in words.
    """
    tokens = np.asarray(tokens, np.int32)
    if word_starts is None:
        edges = np.arange(len(tokens) + 1)
    else:
        inner = 1 + np.flatnonzero(word_starts[tokens[1:]])
        edges = np.unique(np.concatenate([[0], inner, [len(tokens)]]))
    units = len(edges) - 1
    lengths = _span_lengths(round(share * units), mean_span, rng)
    gaps = units - lengths.sum() + 1
    if len(lengths) > gaps:  # where hardly anything stays, the spans that are left over join
        lengths = np.append(lengths[: gaps - 1], lengths[gaps - 1 :].sum())
    lengths = rng.permutation(lengths)  # the one that was cut is not always the last
    # Spans in order: as many units stay in front of each as there are gaps before its own.
    first = np.sort(rng.choice(gaps, len(lengths), replace=False))
    first += np.cumsum(lengths) - lengths
    begins, ends = edges[first], edges[first + lengths]
    border = np.zeros(len(tokens) + 1, np.int64)
    border[begins] += 1
    border[ends] -= 1
    hidden = np.cumsum(border[:-1]) > 0
    hidden_before = np.cumsum(ends - begins) - (ends - begins)
    return np.insert(tokens[~hidden], begins - hidden_before, mask_id)


def _span_lengths(total: int, mean: float, rng: np.random.Generator) -> np.ndarray:
    """Poisson lengths until they sum up to `total`, the last one cut to fit."""
    lengths = np.zeros(0, np.int64)
    while lengths.sum() < total:
        lengths = np.append(lengths, rng.poisson(mean, total))
    before = np.cumsum(lengths) - lengths
    return np.minimum(lengths, total - before)[before < total]


def mask(tokens: Ids, rng: np.random.Generator, *, share: float, mask_id: int) -> Ids:
    """Token masking: `share` of the tokens, chosen at random, become `mask_id`."""
    out = np.array(tokens, np.int32)
    out[_choose(len(out), share, rng)] = mask_id
    return out


def delete(tokens: Ids, rng: np.random.Generator, *, share: float) -> Ids:
    """Token deletion: `share` of the tokens, chosen at random, are left out."""
    return np.delete(np.asarray(tokens, np.int32), _choose(len(tokens), share, rng))


def rotate(tokens: Ids, rng: np.random.Generator) -> Ids:
    """Document rotation: a token, chosen at random, comes first, and what was before it last."""
    return np.roll(np.asarray(tokens, np.int32), -int(rng.integers(max(len(tokens), 1))))


def _choose(count: int, share: float, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(count, round(share * count), replace=False)


def corrupt(
    sentences: Sequence[Ids],
    rng: np.random.Generator,
    noise: Noise,
    *,
    mask_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> Ids:
    """The noised text of these sentences, the same for the same seed."""
    order = rng.permutation(len(sentences)) if noise.permute else range(len(sentences))
    tokens = np.concatenate([np.asarray(sentences[i], np.int32) for i in order])
    if noise.infill:
        tokens = infill(tokens, rng, share=noise.infill, mean_span=noise.mean_span,
                        mask_id=mask_id, word_starts=word_starts)
    if noise.mask:
        tokens = mask(tokens, rng, share=noise.mask, mask_id=mask_id)
    if noise.delete:
        tokens = delete(tokens, rng, share=noise.delete)
    if rng.random() < noise.rotate:
        tokens = rotate(tokens, rng)
    return tokens


class Passages:
    """Random access to runs of whole sentences of one document, as many as fit `max_tokens`.

    Item i is a list of sentences, arrays of ids. A sentence that alone is longer is cut into
    several. `corpus` is anything with `tokens`, `document_starts` and `sentence_starts`
    (`data.Corpus`).

    Raises:
        ValueError: max_tokens is below 1, or the corpus is empty.
    """

    def __init__(self, corpus, max_tokens: int):
        if max_tokens < 1:
            raise ValueError(f"max_tokens of a passage is {max_tokens}; use at least 1")
        self.corpus = corpus
        # `unique` passes over empty sentences and documents: they begin where the next one does.
        starts = np.unique(corpus.sentence_starts)
        pieces = [np.arange(a, b, max_tokens) for a, b in itertools.pairwise(starts)]
        self.sentence_starts = starts = np.concatenate([*pieces, starts[-1:]])
        edges = np.searchsorted(starts, np.unique(corpus.document_starts))
        runs = []
        for first, end in itertools.pairwise(edges):
            while first < end:
                last = np.searchsorted(starts, starts[first] + max_tokens, side="right") - 1
                last = min(max(last, first + 1), end)
                runs.append((first, last))
                first = last
        if not runs:
            raise ValueError("the corpus has 0 sentences; give a text")
        self.runs = np.asarray(runs, np.int64)

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, i: int) -> list[np.ndarray]:
        first, last = self.runs[i]
        borders = itertools.pairwise(self.sentence_starts[first : last + 1])
        return [np.asarray(self.corpus.tokens[a:b]) for a, b in borders]


def prepare(
    sentences: Sequence[Ids],
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
    """One row: the noised text as source, the text as it was as target, noised anew each time.

    Both have `length` tokens with `bos_id` and `eos_id` around the text; the row is that of
    `seq2seq.prepare`.

    Raises:
        ValueError: a share of the noise is out of range, or `length` leaves no room for text.
    """
    noise.check()
    room = max(length - (1 if bos_id is None else 2), 0)
    target = np.concatenate([np.asarray(s, np.int32) for s in sentences])[:room]
    # What is cut off from the target is not in the source either.
    kept, left = [], len(target)
    for sentence in sentences:
        kept.append(np.asarray(sentence)[:left])
        left -= len(kept[-1])
    source = corrupt([s for s in kept if len(s)] or [target], rng, noise, mask_id=mask_id,
                     word_starts=word_starts)
    return seq2seq.prepare(
        {"source": source, "target": target}, source_length=length, target_length=length,
        start_id=start_id, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id)


loss = seq2seq.loss
