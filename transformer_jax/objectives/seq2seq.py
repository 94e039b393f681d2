"""Sequence-to-sequence learning: predict each target token, given the source and the target tokens
before it (Vaswani et al. 2017, "Attention Is All You Need").

`prepare` is for translation and summarization. `prepare_denoising` is for BART's pre-training,
which reconstructs a text from a corrupted copy (Lewis et al. 2019, "BART", section 2.2): the
corrupted text is the source and the original text the target. Both have the same loss and batch
keys.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Key

from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout_kwargs, token_losses
from transformer_jax.objectives.input_format import SentenceRanges, TokenIds, pad


def prepare(
    example: dict[str, TokenIds], rng: np.random.Generator | None = None, *, source_length: int,
    target_length: int, start_id: int, eos_id: int, pad_id: int, bos_id: int | None = None,
) -> dict[str, np.ndarray]:
    """Converts a source and a target, `{"source": ids, "target": ids}`, to one row.

    Both texts end with `eos_id` and, if `bos_id` is given, begin with it; texts that are too long
    are truncated at the end. The decoder inputs are the targets shifted right, with `start_id` at
    the first position, so the input at a position never contains the token to predict there.
    ValueError if a length leaves no room for one token of text.

    Example:
        >>> row = prepare({"source": [7, 8], "target": [9]}, source_length=4, target_length=3,
        ...               start_id=2, eos_id=3, pad_id=1)
        >>> row["tokens"].tolist(), row["decoder_tokens"].tolist(), row["targets"].tolist()
        ([7, 8, 3, 1], [2, 9, 1], [9, 3, 1])
    """
    prefix = [] if bos_id is None else [bos_id]
    ids = {}
    for side, length in (("source", source_length), ("target", target_length)):
        max_tokens = length - len(prefix) - 1
        if max_tokens < 1:
            raise ValueError(f"{side}_length {length} leaves no room for text beside "
                             f"{len(prefix) + 1} special tokens; use at least {len(prefix) + 2}")
        ids[side] = [*prefix, *example[side][:max_tokens], eos_id]
    source, target = ids["source"], ids["target"]
    return {
        "tokens": pad(source, source_length, pad_id),
        "padding_mask": np.arange(source_length) < len(source),
        "decoder_tokens": pad([start_id, *target[:-1]], target_length, pad_id),
        "targets": pad(target, target_length, pad_id),
        "weights": (np.arange(target_length) < len(target)).astype(np.float32),
    }


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None, *,
    label_smoothing: float = 0.0, logits_per_chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The sum of the cross-entropy over target tokens, in nats, and the number of target tokens.

    Arguments as in `transformer_jax.objectives`. `label_smoothing`, the probability that is
    distributed over the vocabulary (section 5.4), is a regularizer: as dropout, it is applied only
    if `rng` is given, and not in evaluation. `logits_per_chunk`: see `cross_entropy.token_losses`.
    The metrics are "nll", the cross-entropy without label smoothing, and "accuracy".
    """
    out = apply({"params": params}, batch["tokens"], batch["decoder_tokens"],
                padding_mask=batch["padding_mask"], return_logits=False, **dropout_kwargs(rng))
    return token_losses(
        getattr(out, "lazy_logits", None) or out.logits, batch["targets"], batch["weights"],
        label_smoothing if rng is not None else 0.0, logits_per_chunk)


# Denoising ----------------------------------------------------------------------------------------


class Noise(NamedTuple):
    """How a text is corrupted, in this order. The defaults are those of BART-large (section 5).

    Attributes:
        permute: whether the sentences are put in random order.
        infill: fraction of the tokens (or words) that text infilling replaces: spans of
            Poisson-distributed length become one mask token each; a span of length 0 inserts one.
        mean_span: mean length of a span of text infilling, lambda of the Poisson distribution.
        mask: fraction of the tokens that are replaced by the mask token.
        delete: fraction of the tokens that are removed.
        rotate: probability that the text is rotated so that it begins with a random token.
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


def prepare_denoising(
    sentences: Sequence[TokenIds], rng: np.random.Generator, *, noise: Noise, length: int,
    mask_id: int, word_starts: Bool[np.ndarray, "V"] | None = None, **special_ids: int | None,
) -> dict[str, np.ndarray]:
    """Converts a passage to one row: the corrupted text as source, the original text as target.

    `sentences` are token ids without special tokens. Those that do not fit into a row of `length`,
    with special tokens, are removed before the text is corrupted. `word_starts`: see
    `text_infilling`. `special_ids`: start_id, bos_id, eos_id and pad_id of `prepare`.

    Raises:
        ValueError: a value of `noise` is out of range, or `length` leaves no room for text.

    Example:
        >>> row = prepare_denoising(
        ...     [[10, 11], [20]], np.random.default_rng(0), length=5, noise=Noise(infill=1.0),
        ...     mask_id=4, start_id=2, bos_id=0, eos_id=2, pad_id=1)
        >>> row["tokens"].tolist(), row["targets"].tolist()  # all tokens in one span
        ([0, 4, 2, 1, 1], [0, 10, 11, 20, 2])
    """
    noise.check()
    num_left = max(length - (1 if special_ids.get("bos_id") is None else 2), 0)
    truncated = []
    for sentence in sentences:
        truncated.append(np.asarray(sentence, np.int32)[:num_left])
        num_left -= len(truncated[-1])
    source = corrupt([s for s in truncated if len(s)] or truncated[:1], rng, noise, mask_id=mask_id,
                     word_starts=word_starts)
    return prepare({"source": source, "target": np.concatenate(truncated)}, source_length=length,
                   target_length=length, **special_ids)


def corrupt(
    sentences: Sequence[TokenIds], rng: np.random.Generator, noise: Noise, *, mask_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> np.ndarray:
    """Corrupts a text, given as the token ids of its sentences."""
    order = rng.permutation(len(sentences)) if noise.permute else range(len(sentences))
    tokens = np.concatenate([np.asarray(sentences[i], np.int32) for i in order])
    if noise.infill:
        tokens = text_infilling(tokens, rng, rate=noise.infill, mean_span=noise.mean_span,
                                mask_id=mask_id, word_starts=word_starts)
    if noise.mask:
        tokens[_sample_positions(len(tokens), noise.mask, rng)] = mask_id
    if noise.delete:
        tokens = np.delete(tokens, _sample_positions(len(tokens), noise.delete, rng))
    if rng.random() < noise.rotate:
        tokens = np.roll(tokens, -int(rng.integers(max(len(tokens), 1))))
    return tokens


def _sample_positions(num_tokens: int, rate: float, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(num_tokens, round(rate * num_tokens), replace=False)


def text_infilling(
    tokens: TokenIds, rng: np.random.Generator, *, rate: float, mean_span: float, mask_id: int,
    word_starts: Bool[np.ndarray, "V"] | None = None,
) -> np.ndarray:
    """Replaces spans of Poisson-distributed length by one mask token each.

    Lengths are sampled until `rate` of the tokens are in spans; the last length is reduced to fit.
    Each span (a span of length 0 too) is then assigned its own gap between two remaining tokens;
    all gaps are equally likely. Therefore no two mask tokens are adjacent, and the first and the
    last token of a text are replaced less often than the others. With `word_starts` (for each id of
    the vocabulary, whether it begins a word), spans consist of whole words, and `rate` and lengths
    count words.

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


class Passages(SentenceRanges):
    """Random access to the passages of a corpus: as many sentences of one document as fit into
    `max_tokens` (see `SentenceRanges`). An item is a list of sentences, arrays of token ids."""

    def __init__(self, corpus, max_tokens: int):
        if max_tokens < 1:
            raise ValueError(f"max_tokens of a passage is {max_tokens}; use at least 1")
        super().__init__(corpus, max_tokens, min_sentences=1)
        if not len(self):
            raise ValueError("the corpus has 0 sentences; it needs at least 1")

    def __getitem__(self, i: int) -> list[np.ndarray]:
        first, stop, _ = self.ranges[i]
        return [self.tokens(k, k + 1) for k in range(first, stop)]
