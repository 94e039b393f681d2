"""Answers as spans of a text: SQuAD (Rajpurkar et al. 2016; BERT paper, sections 4.2 and 4.3).

A context that is longer than a row is read through windows that overlap. `make_windows` makes them
and keeps where in the characters every token stands; `prepare` makes a window a row; `decode` finds
the best span of an example over all of its windows, as exact characters of the context.
"""

import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.objectives.cross_entropy import (
    SumAndWeight,
    cross_entropy,
    dropout,
    top1_correct,
    weighted_sum,
)


class Window(NamedTuple):
    """A part of an example's context with its question.

    Attributes:
        example: number of the example.
        question, context: ids.
        offsets: first character of each token of `context` and the one after its last, `[n, 2]`,
            without white space around it.
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
    max_question: int = 64, check: bool = True, without_answer: bool = True,
) -> list[Window]:
    """All windows of all examples, in order.

    Args:
        examples: {"question", "context", "answers": [{"text", "start"}]}; the first answer counts.
        length: of a row, `specials` special tokens included.
        stride: how far a window begins after the one before (`doc_stride` of BERT's release).
        max_question: longer questions are cut to so many tokens.
        check: refuse an example whose answer is not where it should be; False makes no windows of
            it, so that `{w.example for w in windows}` tells which were used.
        without_answer: keep the windows that do not hold the answer of their example. Examples
            without an answer keep theirs in any case.

    Raises:
        ValueError: no room for the context, an answer that is not in its context, or an empty
            question or context.
    """
    if length - specials - max_question < 8 or stride < 1:
        raise ValueError(f"rows of {length} tokens leave {length - specials - max_question} for "
                         f"the context beside {max_question} of a question, and the stride is "
                         f"{stride}; raise the length, or lower max_question")
    contexts = list(dict.fromkeys(e["context"] for e in examples))
    try:
        encoded = tokenizer.backend.encode_batch(contexts, add_special_tokens=False)
    except TypeError:
        tokenizer.encode_batch(contexts)  # says which is no text
        raise
    read = {text: (np.asarray(e.ids, np.int32), _exact(text, e.offsets))
            for text, e in zip(contexts, encoded)}
    questions = tokenizer.encode_batch([e["question"].strip() for e in examples])
    windows = []
    for i, (example, question) in enumerate(zip(examples, questions)):
        ids, offsets = read[example["context"]]
        if not question or not len(ids):
            raise ValueError(f"question {example.get('id', i)!r} has "
                             f"{'no tokens' if not question else 'a context without tokens'}")
        question = np.asarray(question[:max_question], np.int32)
        try:
            first, last = _token_span(example, offsets)
        except ValueError:
            if check:
                raise
            continue
        room = length - specials - len(question)
        begin = 0
        while True:
            stop = min(begin + room, len(ids))
            inside = first is not None and begin <= first and last < stop
            if inside or without_answer or first is None:
                windows.append(Window(i, question, ids[begin:stop], offsets[begin:stop],
                                      first - begin if inside else None,
                                      last - begin if inside else None))
            if stop == len(ids):
                break
            begin += min(stride, room)
    return windows


def _exact(text: str, offsets: Sequence[tuple[int, int]]) -> Int[np.ndarray, "n 2"]:
    """Offsets without the white space that byte-level BPE counts to its tokens, and with the marks
    on a letter that WordPiece drops where they are characters of their own."""
    found = np.asarray(offsets, np.int64).reshape(-1, 2)
    n = len(text)
    place = np.arange(n + 1)
    space = np.fromiter(map(str.isspace, text), bool, n)
    # The first character from each place on that is no space; one past the last before it.
    first = np.minimum.accumulate(np.append(np.where(space, n, place[:n]), n)[::-1])[::-1]
    past = np.maximum.accumulate(np.append(0, np.where(space, 0, place[1:])))
    start = np.minimum(first[found[:, 0]], found[:, 1])
    stop = np.maximum(past[found[:, 1]], start)
    if not text.isascii():
        accent = np.fromiter((unicodedata.category(c) == "Mn" for c in text), bool, n)
        letter = np.minimum.accumulate(np.append(np.where(accent, n, place[:n]), n)[::-1])[::-1]
        stop = np.where(stop > start, letter[stop], stop)
    return np.stack([start, stop], axis=1)


def _token_span(example: dict, offsets: np.ndarray) -> tuple[int | None, int | None]:
    """First and last token that share a character with the first answer; None without answers."""
    check_answer(example)
    answers = example.get("answers", ())
    if not answers:
        return None, None
    start = answers[0]["start"]
    stop = start + len(answers[0]["text"])
    inside = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < stop))
    if not len(inside):
        raise ValueError(f"question {example.get('id', example['question'])!r}: no token has a "
                         f"character of the answer {answers[0]['text']!r}; leave the question out")
    return int(inside[0]), int(inside[-1])


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

    Raises:
        ValueError: the row is too short for the window.
    """
    del rng
    made = row(window.question, window.context)
    # The special token at the row's end stands after the context in every family.
    end = int(made["padding_mask"].sum()) - 1
    begin = end - len(window.context)
    if begin < 0 or not np.array_equal(made["tokens"][begin:end], window.context):
        raise ValueError(f"a window of {len(window.question)} and {len(window.context)} tokens "
                         f"does not fit into a row of {len(made['tokens'])}; make windows for rows "
                         "of that length")
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
        return model.token_classification_logits(tokens, deterministic=deterministic, **known)

    return apply({"params": params}, tokens, method=tag, **dropout(rng))


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """Sum over windows of the mean of -log P(start) and -log P(end), in nats (BERT paper, section
    4.2); its weight is the number of windows."""
    starts, ends = _scores(apply, params, batch, rng)
    nats = (cross_entropy(starts, batch["starts"]) + cross_entropy(ends, batch["ends"])) / 2
    total, weight = weighted_sum(nats, batch["weights"])
    both = top1_correct(starts, batch["starts"]) * top1_correct(ends, batch["ends"])
    return total, weight, {"exact": weighted_sum(both, batch["weights"])}


def predict(
    apply: Callable, params: dict, batch: dict[str, Array], *, top: int = 20, max_answer: int = 30
) -> dict:
    """The `top` best spans of each window, of 1 to `max_answer` tokens, from the best.

    Returns:
        scores `[B, top]`, start score plus end score; firsts and lasts int32 `[B, top]`, their
        tokens, counted in the window's context; none `[B]`, start plus end score of the place that
        stands for no answer.
    """
    scores = _scores(apply, params, batch, None)
    none = jnp.take_along_axis(scores, batch["none"][None, :, None], axis=2).sum((0, 2))
    starts, ends = jnp.where(batch["context_mask"], scores, _LOW)
    begin = batch["context_mask"].argmax(-1)[:, None]
    B, T = starts.shape
    ends = jnp.pad(ends, ((0, 0), (0, max_answer)), constant_values=_LOW)
    reach = jnp.arange(T)[:, None] + jnp.arange(max_answer)
    spans = (starts[..., None] + ends[:, reach]).reshape(B, -1)
    # Short rows have fewer spans than are asked for.
    spans = jnp.pad(spans, ((0, 0), (0, top)), constant_values=2 * _LOW)
    best, place = jax.lax.top_k(spans, top)
    firsts = place // max_answer - begin
    return {"scores": best, "firsts": firsts, "lasts": firsts + place % max_answer, "none": none}


class Answer(NamedTuple):
    """What a model answers to one question.

    Attributes:
        text: exact characters `context[start:stop]`; "" for no answer.
        score: start score plus end score of what is answered; `none` is that of no answer, the
            lowest over windows.
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
    n_best: int = 20, no_answer: bool = False, threshold: float = 0.0,
) -> list[Answer]:
    """The best span of each example, over its windows; of equal ones the first and shortest.

    Args:
        predictions: of `predict`, for all windows in order.
        n_best: spans to keep, at most the `top` of `predict`.
        no_answer: answer "" where `none` is above the best span's score by more than `threshold`
            (BERT paper, section 4.3: SQuAD 2.0).

    Raises:
        ValueError: an example without windows, or other windows than were predicted.
    """
    p = {name: np.asarray(value) for name, value in predictions.items()}
    number = np.array([window.example for window in windows], np.int64)
    if n_best < 1 or len(p["none"]) != len(windows):
        raise ValueError(f"n_best is {n_best}, at least 1, and {len(p['none'])} windows were "
                         f"predicted of {len(windows)}; give the predictions of all of them")
    count = np.bincount(number, minlength=len(examples))
    if len(count) > len(examples) or not count.all():
        raise ValueError(f"{np.sum(count == 0)} of {len(examples)} examples have no window; make "
                         "the windows of these examples, without answers if those are wrong")
    none = np.full(len(examples), np.inf)
    np.minimum.at(none, number, p["none"])
    row, rank = np.nonzero(p["scores"] > _LOW / 2)
    offsets = np.concatenate([window.offsets for window in windows])
    base = np.cumsum([0, *(len(window.offsets) for window in windows[:-1])])[row]
    start = offsets[base + p["firsts"][row, rank], 0]
    stop = offsets[base + p["lasts"][row, rank], 1]
    score, example = p["scores"][row, rank], number[row]
    order = np.lexsort((stop, start, -score, example))
    order = order[stop[order] > start[order]]
    found = list(zip(score[order].tolist(), start[order].tolist(), stop[order].tolist()))
    ends = np.searchsorted(example[order], np.arange(len(examples) + 1))
    return [_answer(e["context"], found[ends[i] : ends[i + 1]], float(none[i]), n_best, no_answer,
                    threshold) for i, e in enumerate(examples)]


def _answer(context, found, none, n_best, no_answer, threshold) -> Answer:
    spans: dict[tuple[int, int], float] = {}
    for score, start, stop in found:
        spans.setdefault((start, stop), score)  # windows overlap: the best of each span
    best = [(score, start, stop) for (start, stop), score in spans.items()][:n_best]
    empty = not best or (no_answer and none - best[0][0] > threshold)
    if no_answer or not best:
        best = sorted([*best, (none, 0, 0)], key=lambda span: -span[0])
    shares = np.exp(np.array([score for score, *_ in best]) - best[0][0])
    shares = (shares / shares.sum()).tolist()
    ranked = [(context[start:stop], start, stop, score, share)
              for (score, start, stop), share in zip(best, shares)]
    text, start, stop, score, share = next(span for span in ranked if (span[2] == 0) == empty)
    return Answer(text, start, stop, score, none, share, ranked)
