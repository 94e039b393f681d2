"""Answers as spans of a text: SQuAD (Rajpurkar et al. 2016; BERT paper, sections 4.2 and 4.3).

A context that is longer than a row is read through windows that overlap. `make_windows` makes them
and keeps where in the characters every token stands; `prepare` makes a window a row; `decode` finds
the best span of an example over all of its windows, as exact characters of the context.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.objectives.losses import Pair, correct, cross_entropy, dropout, weighted


class Window(NamedTuple):
    """A part of an example's context with its question.

    Attributes:
        example: number of the example.
        question, context: ids.
        offsets: first character of each token of `context` and the one after its last, `[n, 2]`.
        start, end: first and last token of the answer, counted in `context`; None where the window
            does not hold all of it.
    """

    example: int
    question: np.ndarray
    context: np.ndarray
    offsets: Int[np.ndarray, "n 2"]
    start: int | None
    end: int | None


def check_answer(example: dict) -> None:
    """Refuse an answer that is not where it should be in the context.

    Raises:
        ValueError: names the example.
    """
    for answer in example.get("answers", ()):
        text, start = answer["text"], answer["start"]
        found = example["context"][start : start + len(text)]
        if not text or start < 0 or found != text:
            raise ValueError(
                f"question {example.get('id', example['question'])!r}: the context has {found!r} "
                f"at character {start}, not the answer {text!r}; mend the start, or leave the "
                "question out")


def make_windows(
    examples: Sequence[dict], tokenizer: Any, *, length: int, specials: int = 3, stride: int = 128,
    max_question: int = 64,
) -> list[Window]:
    """All windows of all examples, in order.

    Args:
        examples: {"question", "context", "answers": [{"text", "start"}]}; the first answer counts.
        length: of a row, `specials` special tokens included.
        stride: how far a window begins after the one before (`doc_stride` of BERT's release).
        max_question: longer questions are cut to so many tokens.

    Raises:
        ValueError: no room for the context, an answer that is not in its context, or an empty
            question or context.
    """
    if length - specials - max_question < 8 or stride < 1:
        raise ValueError(f"rows of {length} tokens leave {length - specials - max_question} for "
                         f"the context beside {max_question} of a question, and the stride is "
                         f"{stride}; raise the length, or lower max_question")
    contexts = list(dict.fromkeys(e["context"] for e in examples))
    encoded = dict(zip(contexts, tokenizer.backend.encode_batch(
        contexts, add_special_tokens=False)))
    read = {text: (np.asarray(e.ids, np.int32), np.asarray(e.offsets, np.int64).reshape(-1, 2))
            for text, e in encoded.items()}
    questions = tokenizer.encode_batch([e["question"].strip() for e in examples])
    windows = []
    for i, (example, question) in enumerate(zip(examples, questions)):
        check_answer(example)
        ids, offsets = read[example["context"]]
        if not question or not len(ids):
            raise ValueError(f"question {example.get('id', i)!r} has "
                             f"{'no tokens' if not question else 'a context without tokens'}")
        question = np.asarray(question[:max_question], np.int32)
        first, last = _token_span(example, offsets)
        room = length - specials - len(question)
        begin = 0
        while True:
            stop = min(begin + room, len(ids))
            inside = first is not None and begin <= first and last < stop
            windows.append(Window(i, question, ids[begin:stop], offsets[begin:stop],
                                  first - begin if inside else None,
                                  last - begin if inside else None))
            if stop == len(ids):
                break
            begin += min(stride, room)
    return windows


def _token_span(example: dict, offsets: np.ndarray) -> tuple[int | None, int | None]:
    """First and last token that share a character with the first answer."""
    answers = example.get("answers", ())
    if not answers:
        return None, None
    start = answers[0]["start"]
    stop = start + len(answers[0]["text"])
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
    return (int(inside[0]), int(inside[-1])) if len(inside) else (None, None)


def prepare(
    window: Window, rng: np.random.Generator | None = None, *, row: Callable, last: bool = False
) -> dict[str, np.ndarray]:
    """A window as one row of a batch.

    Args:
        row: `layout.bert_row` or `layout.gpt_row` with length and special tokens filled in: the
            question, then the context.
        last: the row's last token stands for no answer, the one that has seen all in a causal
            model; else its first.

    Returns:
        The row, with "context_mask" bool `[T]`, where an answer may be; "none" int32, the place
        that stands for no answer; "starts" and "ends" int32, that place too where the window does
        not hold the answer; "weights".
    """
    del rng
    made = row(window.question, window.context)
    # The special token at the row's end stands after the context in every family.
    end = int(made["padding_mask"].sum()) - 1
    begin = end - len(window.context)
    places = np.arange(len(made["tokens"]))
    none = np.int32(end if last else 0)
    held = window.start is not None
    return {**made, "context_mask": (places >= begin) & (places < end), "none": none,
            "starts": np.int32(begin + window.start) if held else none,
            "ends": np.int32(begin + window.end) if held else none, "weights": np.float32(1)}


_LOW = float(jnp.finfo(jnp.float32).min) / 4  # two of them add up to a finite number


def _scores(apply, params, batch, rng) -> Float[Array, "2 B T"]:
    """Scores of start and end; far below all others where no answer may be."""
    inputs = {name: batch[name] for name in ("segment_ids", "padding_mask") if name in batch}
    scores = _tag(apply, params, batch["tokens"], inputs, rng)
    none = jnp.arange(scores.shape[1]) == batch["none"][:, None]
    scores = jnp.where((batch["context_mask"] | none)[..., None], scores, _LOW)
    return jnp.moveaxis(scores, -1, 0)


def _tag(apply, params, tokens, inputs, rng):
    def tag(model, tokens, deterministic):
        # Only BERT reads segments.
        known = inputs if hasattr(model.config, "num_segments") else {
            name: x for name, x in inputs.items() if name != "segment_ids"}
        return model.tag(tokens, deterministic=deterministic, **known)

    return apply({"params": params}, tokens, method=tag, **dropout(rng))


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Pair]]:
    """Sum over windows of the mean of -log P(start) and -log P(end), in nats (BERT paper, section
    4.2); its weight is the number of windows."""
    starts, ends = _scores(apply, params, batch, rng)
    nats = (cross_entropy(starts, batch["starts"]) + cross_entropy(ends, batch["ends"])) / 2
    total, weight = weighted(nats, batch["weights"])
    both = correct(starts, batch["starts"]) * correct(ends, batch["ends"])
    return total, weight, {"exact": weighted(both, batch["weights"])}


def predict(apply: Callable, params: dict, batch: dict[str, Array], *, top: int = 20) -> dict:
    """The `top` best tokens of each window to start and to end, and the score of no answer.

    Returns:
        start_scores, start_places, end_scores, end_places `[B, top]`, places counted in the
        window's context; none `[B]`, the sum of start and end score at the place standing for it.
    """
    scores = _scores(apply, params, batch, None)
    none = jnp.take_along_axis(scores, batch["none"][None, :, None], axis=2).sum((0, 2))
    inside = jnp.where(batch["context_mask"], scores, _LOW)
    begin = batch["context_mask"].argmax(-1)
    found = {"none": none}
    for name, side in zip(("start", "end"), inside):
        # Short rows have fewer places than are asked for.
        side = jnp.pad(side, ((0, 0), (0, max(top - side.shape[1], 0))), constant_values=_LOW)
        best, places = jax.lax.top_k(side, top)
        found |= {f"{name}_scores": best, f"{name}_places": places - begin[:, None]}
    return found


class Answer(NamedTuple):
    """What a model answers to one question.

    Attributes:
        text: exact characters `context[start:stop]`; "" for no answer.
        score: start score plus end score of the best span; `none` is that of no answer, the lowest
            over windows.
        probability: of `text` among the `best`.
        best: (text, start, stop, score, probability) of the n best, in order.
    """

    text: str
    start: int
    stop: int
    score: float
    none: float
    probability: float
    best: list[tuple[str, int, int, float, float]]


def decode(
    examples: Sequence[dict], windows: Sequence[Window], predictions: dict[str, np.ndarray], *,
    max_answer: int = 30, n_best: int = 20, no_answer: bool = False, threshold: float = 0.0,
) -> list[Answer]:
    """The best span of each example, over its windows.

    Args:
        predictions: of `predict`, for all windows in order.
        max_answer: tokens of a span, at most.
        no_answer: answer "" where `none` is above the best span's score by more than `threshold`
            (BERT paper, section 4.3: SQuAD 2.0).
    """
    candidates: list[list[tuple[float, int, int]]] = [[] for _ in examples]
    none = np.full(len(examples), np.inf)
    p = {name: np.asarray(value) for name, value in predictions.items()}
    for w, window in enumerate(windows):
        none[window.example] = min(none[window.example], float(p["none"][w]))
        first, last = p["start_places"][w], p["end_places"][w]
        scores = p["start_scores"][w][:, None] + p["end_scores"][w][None]
        size = last[None] - first[:, None]
        scores = np.where((size >= 0) & (size < max_answer) & (scores > _LOW / 2), scores, -np.inf)
        for flat in np.argsort(-scores, axis=None)[:n_best]:
            s, e = np.unravel_index(flat, scores.shape)
            if np.isfinite(scores[s, e]):
                candidates[window.example].append(
                    (float(scores[s, e]), int(window.offsets[first[s], 0]),
                     int(window.offsets[last[e], 1])))
    return [_answer(example["context"], found, float(none[i]), n_best,
                    no_answer, threshold)
            for i, (example, found) in enumerate(zip(examples, candidates))]


def _answer(context, found, none, n_best, no_answer, threshold) -> Answer:
    spans: dict[tuple[int, int], float] = {}
    for score, start, stop in sorted(found, reverse=True):
        spans.setdefault((start, stop), score)  # windows overlap: the best of each span
    best = [(score, start, stop) for (start, stop), score in spans.items()][:n_best]
    if no_answer or not best:
        best = sorted([*best, (none, 0, 0)], reverse=True)
    shares = np.exp(np.array([score for score, *_ in best]) - best[0][0])
    shares = shares / shares.sum()
    ranked = [(context[start:stop], start, stop, score, float(share))
              for (score, start, stop), share in zip(best, shares)]
    real = [entry for entry in ranked if entry[2] > entry[1]]
    empty = next((entry for entry in ranked if entry[2] == entry[1]), None)
    chosen = real[0] if real else empty
    if empty is not None and (not real or none - real[0][3] > threshold):
        chosen = empty
    text, start, stop, score, share = chosen
    return Answer(text, start, stop, score, none, share, ranked)
