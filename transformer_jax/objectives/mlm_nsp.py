"""BERT's pre-training: masked language modeling (MLM) and next-sentence prediction (NSP).

Devlin et al. 2018, "BERT", section 3.1. Without `nsp_labels` in a batch, only masked language
modeling is trained.
"""

from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout_kwargs, token_losses
from transformer_jax.objectives.input_format import (
    SentenceRanges,
    pack_bert_input,
    pad,
    truncate_pair,
)

MASK_RATE = 0.15  # fraction of the tokens that are predicted
# Fractions of the tokens to predict that are replaced by [MASK] and by a random token.
MASK_TOKEN_RATE, RANDOM_TOKEN_RATE = 0.8, 0.1


def mask_tokens(
    tokens: Int[np.ndarray, "T"], rng: np.random.Generator, *, maskable: Bool[np.ndarray, "T"],
    vocab_size: int, mask_id: int, max_predictions: int, mask_rate: float = MASK_RATE,
    word_starts: Bool[np.ndarray, "V"] | None = None, min_random_id: int = 0,
) -> dict[str, np.ndarray]:
    """Selects the tokens to predict, and masks them (BERT paper, section 3.1, task 1).

    Of the selected tokens, 80 % are replaced by [MASK], 10 % by a random token, and 10 % are kept.

    Args:
        tokens, rng: token ids of a row, and the random generator.
        maskable: True at tokens that may be selected: not [CLS], [SEP] or padding.
        vocab_size, min_random_id: random tokens are sampled from `[min_random_id, vocab_size)`.
        mask_id: id of [MASK].
        max_predictions: length P of the `masked_*` arrays. At most P tokens are selected, and at
            least one if any is maskable.
        mask_rate: fraction of the maskable tokens to select.
        word_starts: for each id of the vocabulary, whether it begins a word. If given, all subwords
            of a selected word are masked together (whole word masking of BERT's 2019 release).

    Returns:
        `tokens`, masked, `masked_positions` (ascending), `masked_targets` and `masked_weights`.

    Example:
        >>> row = mask_tokens(np.array([1, 7, 8, 9, 2]), np.random.default_rng(0), mask_id=4,
        ...                   maskable=np.array([False, True, True, True, False]),
        ...                   vocab_size=10, max_predictions=2)
        >>> row["masked_positions"].shape, row["masked_weights"].tolist()  # 1 selected, P = 2
        ((2,), [1.0, 0.0])
    """
    candidates = np.flatnonzero(maskable)
    num_selected = min(max_predictions, max(1, round(len(candidates) * mask_rate)), len(candidates))
    selected = np.zeros(0, np.int64)
    if num_selected and word_starts is None:
        selected = rng.choice(candidates, num_selected, replace=False)
    elif num_selected:
        is_start = word_starts[tokens[candidates]] | (np.diff(candidates, prepend=-2) != 1)
        words = np.split(candidates, np.flatnonzero(is_start)[1:])
        num_left = num_selected
        selected_words = []
        order = rng.permutation(len(words))
        for i in order:
            if len(words[i]) <= num_left:
                selected_words.append(words[i])
                num_left -= len(words[i])
            if not num_left:
                break
        # If every word is longer than allowed, mask the first subwords of one of them.
        selected = (np.concatenate(selected_words) if selected_words
                    else words[order[0]][:num_selected])
    selected = np.sort(selected)
    uniform = rng.random(len(selected))
    masked = tokens.astype(np.int32)
    masked[selected[uniform < MASK_TOKEN_RATE]] = mask_id
    randomized = selected[
        (uniform >= MASK_TOKEN_RATE) & (uniform < MASK_TOKEN_RATE + RANDOM_TOKEN_RATE)]
    masked[randomized] = rng.integers(min_random_id, vocab_size, len(randomized))
    return {
        "tokens": masked,
        "masked_positions": pad(selected, max_predictions),
        "masked_targets": pad(tokens[selected], max_predictions),
        "masked_weights": (np.arange(max_predictions) < len(selected)).astype(np.float32),
    }


class SentencePairs(SentenceRanges):
    """Random access to ranges of sentences (see `SentenceRanges`), to sample sentence pairs from.

    A range consists of at least two sentences of one document, and of about `max_tokens` tokens.
    Item i is `{"first", "stop", "document"}`: sentences `first` to `stop - 1` of the corpus, and
    the index of their document. `sample_pair` splits a range into sentences A and B, so every epoch
    has new pairs. Documents of one sentence have no range; they only provide random sentences B.
    """

    def __init__(self, corpus, max_tokens: int):
        super().__init__(corpus, max_tokens, min_sentences=2)
        num_documents = len(self.document_edges) - 1
        if not len(self) or num_documents < 2:
            raise ValueError(
                f"the corpus has {num_documents} documents and {len(self)} ranges "
                "of at least two sentences; next-sentence prediction needs at least 2 documents "
                "and 1 range: separate documents by a blank line and write one sentence per line")

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        return dict(zip(("first", "stop", "document"), self.ranges[i]))


def sample_pair(
    pairs: SentencePairs, sentence_range: dict, rng: np.random.Generator, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Samples a sentence pair for next-sentence prediction (BERT paper, section 3.1, task 2).

    The range is split after a random sentence; the first part is A. With probability one half, B is
    the second part. Otherwise B consists of consecutive sentences of another document: the first is
    random, and as many are added as fit into `max_tokens` together with A.

    Returns the tokens of A, the tokens of B, and the label: 0 if B follows A, else 1.
    """
    first, stop, document = (int(sentence_range[name]) for name in ("first", "stop", "document"))
    split = int(rng.integers(first + 1, stop))
    a = pairs.tokens(first, split)
    if rng.random() < 0.5:
        return a, pairs.tokens(split, stop), 0
    edges = pairs.document_edges
    other = int(rng.integers(len(edges) - 2))
    other += other >= document
    b_first = int(rng.integers(edges[other], edges[other + 1]))
    b_stop = max(pairs.last_stop(b_first, max(max_tokens - len(a), 1)), b_first + 1)
    return a, pairs.tokens(b_first, min(b_stop, int(edges[other + 1]))), 1


def prepare(
    sentence_range: dict, rng: np.random.Generator, *, pairs: SentencePairs, length: int,
    cls_id: int, sep_id: int, pad_id: int = 0, short_sequence_rate: float = 0.1, **options,
) -> dict[str, np.ndarray]:
    """Samples a sentence pair from a range, and converts it to one row with masked tokens.

    `sentence_range` is an item of `pairs`. The fraction `short_sequence_rate` of the rows is
    truncated to a random shorter length, so that pre-training includes short inputs, as fine-tuning
    does (appendix A.2). `options` are those of `mask_tokens`, of which `mask_id`, `vocab_size` and
    `max_predictions` are required.

    Raises:
        ValueError: `length` leaves no room for one token of each sentence.
    """
    max_tokens = length - 3
    if max_tokens < 2:
        raise ValueError(f"length {length} leaves no room for two sentences beside 3 special "
                         "tokens; use at least 5")
    if rng.random() < short_sequence_rate:
        max_tokens = int(rng.integers(2, max_tokens + 1))
    a, b, label = sample_pair(pairs, sentence_range, rng, max_tokens)
    row = pack_bert_input(*truncate_pair(a, b, max_tokens, rng), length=length, cls_id=cls_id,
                          sep_id=sep_id, pad_id=pad_id)
    tokens = row["tokens"]
    maskable = row["padding_mask"] & (tokens != cls_id) & (tokens != sep_id)
    return {**row, **mask_tokens(tokens, rng, maskable=maskable, **options),
            "nsp_labels": np.int32(label), "nsp_weights": np.float32(1)}


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    **options,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]], dict[str, SumAndWeight]]:
    """Two terms, in nats: "mlm" over masked tokens and "nsp" over sentence pairs.

    The loss is the sum of their means (BERT paper, appendix A.2). A batch without `nsp_labels` has
    only the term "mlm". Arguments as in `transformer_jax.objectives`; `options` are
    `label_smoothing` and `logits_per_chunk` of `cross_entropy.token_losses`. The metrics are
    "mlm_accuracy" and "nsp_accuracy".
    """
    out = apply({"params": params}, batch["tokens"], segment_ids=batch.get("segment_ids"),
                padding_mask=batch.get("padding_mask"), masked_positions=batch["masked_positions"],
                return_logits=False, **dropout_kwargs(rng))
    args = {"mlm": (getattr(out, "lazy_mlm_logits", None) or out.mlm_logits,
                    batch["masked_targets"], batch["masked_weights"])}
    if "nsp_labels" in batch:
        args["nsp"] = (out.nsp_logits, batch["nsp_labels"], batch["nsp_weights"])
    results = {term: token_losses(*term_args, **options) for term, term_args in args.items()}
    return ({term: total for term, (total, _, _) in results.items()},
            {term: weight for term, (_, weight, _) in results.items()},
            {f"{term}_accuracy": metrics["accuracy"] for term, (*_, metrics) in results.items()})
