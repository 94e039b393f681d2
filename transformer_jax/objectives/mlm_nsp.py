"""BERT's two objectives: masked words and next sentence (Devlin et al. 2018, section 3.1).

A corpus here is anything with `tokens [N]`, `document_starts` and `sentence_starts`: offsets into
`tokens`, each ending with N (`data.Corpus`).
"""

import itertools
from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout, token_losses
from transformer_jax.objectives.input_format import pack_bert_input, pad

MASK_RATE = 0.15  # of the tokens are predicted; of these
KEEP_MASK, KEEP_RANDOM = 0.8, 0.1  # 80 % become [MASK], 10 % a random token, 10 % stay


def mask_tokens(
    tokens: Int[np.ndarray, "T"],
    rng: np.random.Generator,
    *,
    maskable: Bool[np.ndarray, "T"],
    vocab_size: int,
    mask_id: int,
    max_predictions: int,
    rate: float = MASK_RATE,
    word_starts: Bool[np.ndarray, "V"] | None = None,
    first_ordinary_id: int = 0,
) -> dict[str, np.ndarray]:
    """Choose tokens to predict and hide them (BERT paper, section 3.1, task 1).

    Args:
        maskable: tokens that may be chosen: not padding, [CLS] or [SEP].
        max_predictions: width P of the result; at most this many are chosen, at least one.
        word_starts: for each id, whether it begins a word. Given, all pieces of a chosen word are
            hidden together (whole word masking, of the 2019 release).
        first_ordinary_id: random replacements are drawn from `[first_ordinary_id, vocab_size)`.

    Returns:
        tokens `[T]` with the choice hidden; masked_positions, masked_targets int32 `[P]` in order
        of position, masked_weights float32 `[P]`, 0 beyond the choice.
    """
    candidates = np.flatnonzero(maskable)
    wanted = min(max_predictions, max(1, round(len(candidates) * rate)), len(candidates))
    chosen = np.zeros(0, np.int64)
    if wanted and word_starts is None:
        chosen = rng.choice(candidates, wanted, replace=False)
    elif wanted:
        begins = word_starts[tokens[candidates]] | (np.diff(candidates, prepend=-2) != 1)
        words = np.split(candidates, np.flatnonzero(begins)[1:])
        room = wanted
        picked = []
        order = rng.permutation(len(words))
        for i in order:
            if len(words[i]) <= room:
                picked.append(words[i])
                room -= len(words[i])
            if not room:
                break
        # All words longer than the budget: hide the front of one, rather than predict nothing.
        chosen = np.concatenate(picked) if picked else words[order[0]][:wanted]
    chosen = np.sort(chosen)
    fate = rng.random(len(chosen))
    hidden = tokens.astype(np.int32)
    hidden[chosen[fate < KEEP_MASK]] = mask_id
    swapped = chosen[(fate >= KEEP_MASK) & (fate < KEEP_MASK + KEEP_RANDOM)]
    hidden[swapped] = rng.integers(first_ordinary_id, vocab_size, len(swapped))
    return {
        "tokens": hidden,
        "masked_positions": pad(chosen, max_predictions),
        "masked_targets": pad(tokens[chosen], max_predictions),
        "masked_weights": (np.arange(max_predictions) < len(chosen)).astype(np.float32),
    }


class SentencePairs:
    """Random access to runs of consecutive sentences, each at least two and about a row long.

    Item i is `{"first", "last", "document"}`: a half-open range of sentence numbers and its
    document. `prepare` makes the pair, so that every epoch draws other pairs from the same runs.
    Documents of a single sentence have no next one: they only serve as random sentences.

    Raises:
        ValueError: no document has two sentences, or there is only one document.
    """

    def __init__(self, corpus, max_tokens: int):
        self.corpus = corpus
        # `unique` passes over empty sentences and documents: they begin where the next one does.
        self.sentence_starts = starts = np.unique(corpus.sentence_starts)
        # First sentence of each document, and one past the last sentence of all.
        edges = np.searchsorted(starts, np.unique(corpus.document_starts))
        runs = []
        for document, (first, end) in enumerate(itertools.pairwise(edges)):
            while end - first >= 2:
                limit = np.searchsorted(starts, starts[first] + max_tokens, side="right") - 1
                last = min(max(limit, first + 2), end)
                last = end if end - last == 1 else last  # no sentence is left alone
                runs.append((first, last, document))
                first = last
        self.runs = np.asarray(runs, np.int64).reshape(-1, 3)
        self.document_sentences = edges
        if len(self.runs) == 0 or len(edges) < 3:
            raise ValueError(
                f"next-sentence prediction has {len(edges) - 1} documents with {len(self.runs)} "
                "runs of two sentences; it needs at least 2 documents and 1 run: separate "
                "documents by a blank line and write one sentence a line"
            )

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, i: int) -> dict[str, np.ndarray]:
        first, last, document = self.runs[i]
        return {"first": first, "last": last, "document": document}

    def text(self, first: int, last: int) -> np.ndarray:
        """Tokens of sentences first ... last-1."""
        starts = self.sentence_starts
        return np.asarray(self.corpus.tokens[starts[first] : starts[last]])


def sample_pair(
    pairs: SentencePairs, run: dict, rng: np.random.Generator, max_tokens: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Sentences A and B and the label: 0 where B follows A, 1 where it is from another document.

    Half of each (BERT paper, section 3.1, task 2). The run is split at a random sentence; the
    random B begins at any sentence of another document and fills the same room.
    """
    first, last, document = int(run["first"]), int(run["last"]), int(run["document"])
    split = int(rng.integers(first + 1, last))
    a = pairs.text(first, split)
    if rng.random() < 0.5:
        return a, pairs.text(split, last), 0
    edges = pairs.document_sentences
    other = int(rng.integers(len(edges) - 2))
    other += other >= document
    begin = int(rng.integers(edges[other], edges[other + 1]))
    room = max(max_tokens - len(a), 1)
    starts = pairs.sentence_starts
    end = int(np.searchsorted(starts, starts[begin] + room, side="right") - 1)
    return a, pairs.text(begin, min(max(end, begin + 1), int(edges[other + 1]))), 1


def prepare(
    run: dict,
    rng: np.random.Generator,
    *,
    pairs: SentencePairs,
    length: int,
    max_predictions: int,
    cls_id: int,
    sep_id: int,
    mask_id: int,
    vocab_size: int,
    pad_id: int = 0,
    short_rate: float = 0.1,
    **masking,
) -> dict[str, np.ndarray]:
    """One row for both objectives: pair, special tokens, segments, masking drawn anew each time.

    `short_rate` of the rows get a random smaller length, so that pre-training meets short inputs
    as fine-tuning will (appendix A.2). `masking` goes to `mask_tokens`.

    Raises:
        ValueError: `length` leaves no room for a token of each sentence.
    """
    max_tokens = length - 3
    if max_tokens < 2:
        raise ValueError(f"length {length} leaves no room for two sentences beside 3 special "
                         "tokens; use at least 5")
    if rng.random() < short_rate:
        max_tokens = int(rng.integers(2, max_tokens + 1))
    a, b, label = sample_pair(pairs, run, rng, max_tokens)
    row = pack_bert_input(
        a, b, length=max_tokens + 3, cls_id=cls_id, sep_id=sep_id, pad_id=pad_id, rng=rng
    )
    tokens = pad(row["tokens"], length, pad_id)
    padding_mask = pad(row["padding_mask"], length).astype(bool)
    maskable = padding_mask & (tokens != cls_id) & (tokens != sep_id)
    hidden = mask_tokens(
        tokens, rng, maskable=maskable, vocab_size=vocab_size, mask_id=mask_id,
        max_predictions=max_predictions, **masking,
    )
    return {
        **hidden,
        "segment_ids": pad(row["segment_ids"], length),
        "padding_mask": padding_mask,
        "nsp_labels": np.int32(label),
        "nsp_weights": np.float32(1),
    }


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    **options,
) -> tuple[dict[str, Float[Array, ""]], dict[str, Float[Array, ""]], dict[str, SumAndWeight]]:
    """Two terms, in nats: "mlm" over masked tokens and "nsp" over pairs.

    The loss is the sum of the two means (BERT paper, appendix A.2). A batch without nsp_labels
    has the first term only. `options` go to `losses.score_tokens`.
    """
    out = apply(
        {"params": params},
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        padding_mask=batch.get("padding_mask"),
        masked_positions=batch["masked_positions"],
        **dropout(rng),
    )
    scored = {"mlm": (out.mlm_logits, getattr(out, "lazy_mlm_logits", None),
                      batch["masked_targets"], batch["masked_weights"])}
    if "nsp_labels" in batch:
        scored["nsp"] = (out.nsp_logits, None, batch["nsp_labels"], batch["nsp_weights"])
    found = {name: token_losses(*args, **options) for name, args in scored.items()}
    terms = {name: loss for name, (loss, _) in found.items()}
    metrics = {f"{name}_accuracy": measured["accuracy"] for name, (_, measured) in found.items()}
    totals = {name: total for name, (total, _) in terms.items()}
    return totals, {name: weight for name, (_, weight) in terms.items()}, metrics
