"""Extractive question answering: the answer is a span of the context, or there is none.

SQuAD (Rajpurkar et al. 2016; BERT paper, sections 4.2 and 4.3). `make_windows` tokenizes examples
and splits contexts that are longer than a row into overlapping windows. `prepare` converts a window
to a row. `decode_answers` selects the best span of each example over all its windows, and returns
it as a substring of the context.
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
    dropout_kwargs,
    top1_correct,
    weighted_sum,
)

NUM_SPECIAL_TOKENS = 3  # of a row with question and context, in every input format


class Window(NamedTuple):
    """A question with a part of its context, as token ids.

    `offsets` are, for each context token, the offset of its first character in the context and the
    offset after its last one, without surrounding white space. `start` and `end` are the first and
    last token of the answer, as indices into `context_ids`; None if the window does not contain the
    entire answer.
    """

    example_index: int
    question_ids: np.ndarray
    context_ids: np.ndarray
    offsets: Int[np.ndarray, "n 2"]
    start: int | None
    end: int | None


def make_windows(
    examples: Sequence[dict], tokenizer: Any, *, length: int, stride: int = 128,
    max_question_length: int = 64, strict: bool = True, keep_windows_without_answer: bool = True,
) -> list[Window]:
    """Tokenizes examples and splits their contexts into windows.

    Args:
        examples: `{"question": str, "context": str, "answers": [{"text": str, "start": int}]}`.
            Only the first answer is used; a question without an answer has an empty list.
        tokenizer, length: a `data.Tokenizer`, and the length T of a row with 3 special tokens.
        stride: distance in tokens between the starts of windows (`doc_stride` of BERT's code).
        max_question_length: longer questions are truncated to this number of tokens.
        strict: raise an error for an answer that is not at its offset in the context. False skips
            such examples: no window has their index as `example_index`.
        keep_windows_without_answer: keep windows that do not contain the answer of their example.
            The windows of questions that have no answer are always kept.

    Raises:
        ValueError: `length` leaves fewer than 8 tokens for the context, `stride` is below 1, a
            question or context has no tokens, or, if `strict`, an answer is not at its offset.
    """
    num_context_tokens = length - NUM_SPECIAL_TOKENS - max_question_length
    if num_context_tokens < 8 or stride < 1:
        raise ValueError(
            f"rows of {length} tokens leave {num_context_tokens} for the context beside a question "
            f"of {max_question_length}, and the stride is {stride}; leave at least 8 tokens for "
            "the context, and use a stride of at least 1")
    contexts = list(dict.fromkeys(e["context"] for e in examples))
    try:
        encodings = tokenizer.backend.encode_batch(contexts, add_special_tokens=False)
    except TypeError:
        tokenizer.encode_batch(contexts)  # raises an error that names the context
        raise
    encoded = {text: (np.asarray(e.ids, np.int32), _trim_offsets(text, e.offsets))
               for text, e in zip(contexts, encodings)}
    questions = tokenizer.encode_batch([e["question"].strip() for e in examples])
    windows = []
    for i, (example, question) in enumerate(zip(examples, questions)):
        ids, offsets = encoded[example["context"]]
        if not question or not len(ids):
            raise ValueError(f"question {example.get('id', i)!r} has "
                             f"{'no tokens' if not question else 'a context without tokens'}")
        question_ids = np.asarray(question[:max_question_length], np.int32)
        try:
            start, end = _answer_token_span(example, offsets)
        except ValueError:
            if strict:
                raise
            continue
        window_length = length - NUM_SPECIAL_TOKENS - len(question_ids)
        step = min(stride, window_length)
        for first in range(0, max(len(ids) - window_length, 0) + step, step):
            stop = first + window_length
            has_answer = start is not None and first <= start and end < stop
            if has_answer or keep_windows_without_answer or start is None:
                span = (start - first, end - first) if has_answer else (None, None)
                windows.append(Window(i, question_ids, ids[first:stop], offsets[first:stop], *span))
    return windows


def _trim_offsets(text: str, offsets: Sequence[tuple[int, int]]) -> Int[np.ndarray, "n 2"]:
    """Corrects the character offsets of tokens: removes white space, adds combining marks.

    Byte-level BPE includes white space in its tokens. WordPiece drops accents that are separate
    characters (combining marks); they are added to the token of the letter before them.
    """
    offsets = np.asarray(offsets, np.int64).reshape(-1, 2)
    n = len(text)
    is_space = np.fromiter(map(str.isspace, text), bool, n)
    # For each position p: the first position from p on that is not a space, and the position
    # after the last character before p that is not a space.
    next_start = _next_position(~is_space)
    previous_end = np.maximum.accumulate(np.append(0, np.where(is_space, 0, np.arange(1, n + 1))))
    start = np.minimum(next_start[offsets[:, 0]], offsets[:, 1])
    stop = np.maximum(previous_end[offsets[:, 1]], start)
    if not text.isascii():
        is_mark = np.fromiter((unicodedata.category(c) == "Mn" for c in text), bool, n)
        stop = np.where(stop > start, _next_position(~is_mark)[stop], stop)
    return np.stack([start, stop], axis=1)


def _next_position(is_member: np.ndarray) -> np.ndarray:
    """For each position p from 0 to n, the first member at p or after it; n if there is none."""
    n = len(is_member)
    candidates = np.append(np.where(is_member, np.arange(n), n), n)
    return np.minimum.accumulate(candidates[::-1])[::-1]


def _answer_token_span(example: dict, offsets: np.ndarray) -> tuple[int | None, int | None]:
    """First and last token that overlap the first answer; (None, None) without answers."""
    answers, question = example.get("answers", ()), example.get("id", example["question"])
    for answer in answers:
        text, start = answer["text"], answer["start"]
        found = example["context"][start : start + len(text)]
        if not text or start < 0 or found != text:
            raise ValueError(
                f"question {question!r}: the context has {found!r} at character {start}, not the "
                f"answer {text!r}; fix the start, or leave the question out")
    if not answers:
        return None, None
    start, text = answers[0]["start"], answers[0]["text"]
    overlaps = np.flatnonzero((offsets[:, 1] > start) & (offsets[:, 0] < start + len(text)))
    if not len(overlaps):
        raise ValueError(f"question {question!r}: no token has a character of the answer {text!r}; "
                         "leave the question out")
    return int(overlaps[0]), int(overlaps[-1])


def prepare(
    window: Window, rng: np.random.Generator | None = None, *, pack_input: Callable,
    causal: bool = False,
) -> dict[str, np.ndarray]:
    """Converts a window to one row.

    `pack_input` formats question and context (`input_format.make_input_packer`). The no-answer
    position is the first token, [CLS]; for causal models, it is the last token of the row, which
    attends to all others. A row that is too short for the window raises ValueError.
    """
    row = pack_input(window.question_ids, window.context_ids)
    # In every input format, one special token follows the context.
    context_end = int(row["padding_mask"].sum()) - 1
    context_start = context_end - len(window.context_ids)
    packed_ids = row["tokens"][max(context_start, 0) : context_end]
    if not np.array_equal(packed_ids, window.context_ids):
        raise ValueError(f"a window of {len(window.question_ids)} and {len(window.context_ids)} "
                         f"tokens does not fit into a row of {len(row['tokens'])}; make windows "
                         "for rows of that length")
    position = np.arange(len(row["tokens"]))
    no_answer = np.int32(context_end if causal else 0)
    has_answer = window.start is not None
    return {**row, "context_mask": (position >= context_start) & (position < context_end),
            "no_answer_position": no_answer,
            "start_positions": np.int32(context_start + window.start) if has_answer else no_answer,
            "end_positions": np.int32(context_start + window.end) if has_answer else no_answer,
            "weights": np.float32(1)}


_MASKED_LOGIT = float(jnp.finfo(jnp.float32).min) / 4  # the sum of two is finite


def _span_logits(apply, params, batch, rng) -> Float[Array, "2 B T"]:
    """The logits of start and end; `_MASKED_LOGIT` where an answer cannot start or end."""
    def token_logits(model, tokens, deterministic):
        is_bert = hasattr(model.config, "num_segments")
        names = ("padding_mask", "segment_ids") if is_bert else ("padding_mask",)
        inputs = {name: batch[name] for name in names if name in batch}
        return model.token_classification_logits(tokens, deterministic=deterministic, **inputs)

    logits_BT2 = apply({"params": params}, batch["tokens"], method=token_logits,
                       **dropout_kwargs(rng))
    is_no_answer = jnp.arange(logits_BT2.shape[1]) == batch["no_answer_position"][:, None]
    allowed_BT = batch["context_mask"] | is_no_answer
    return jnp.moveaxis(jnp.where(allowed_BT[..., None], logits_BT2, _MASKED_LOGIT), -1, 0)


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The sum over windows of (-log P(start) - log P(end)) / 2, in nats, and the number of windows.

    BERT paper, section 4.2. The model has two classes: start and end. The metric "exact" is the
    fraction of windows whose start and end both have the highest logit.
    """
    starts_BT, ends_BT = _span_logits(apply, params, batch, rng)
    nll_B = (cross_entropy(starts_BT, batch["start_positions"])
             + cross_entropy(ends_BT, batch["end_positions"])) / 2
    total, weight = weighted_sum(nll_B, batch["weights"])
    exact_B = (top1_correct(starts_BT, batch["start_positions"])
               * top1_correct(ends_BT, batch["end_positions"]))
    return total, weight, {"exact": weighted_sum(exact_B, batch["weights"])}


def predict(
    apply: Callable, params: dict, batch: dict[str, Array], *, top: int = 20,
    max_answer_length: int = 30,
) -> dict:
    """The spans with the highest scores of each window, in descending order.

    The score of a span is the logit of its start plus the logit of its end. `top` (the number of
    spans) and `max_answer_length` (their maximum length in tokens) are static under `jax.jit`.
    Windows with fewer than `top` spans are padded with spans of very low score, which
    `decode_answers` ignores.

    Returns:
        scores, start_tokens and end_tokens (as indices into `context_ids`), each `[B, top]`;
        no_answer_score `[B]`, the score of the no-answer position.
    """
    logits_2BT = _span_logits(apply, params, batch, None)
    no_answer_score = jnp.take_along_axis(
        logits_2BT, batch["no_answer_position"][None, :, None], axis=2).sum((0, 2))
    starts_BT, ends_BT = jnp.where(batch["context_mask"], logits_2BT, _MASKED_LOGIT)
    context_start = batch["context_mask"].argmax(-1)[:, None]
    B, T = starts_BT.shape
    ends = jnp.pad(ends_BT, ((0, 0), (0, max_answer_length)), constant_values=_MASKED_LOGIT)
    end_index = jnp.arange(T)[:, None] + jnp.arange(max_answer_length)  # by start and length
    scores = (starts_BT[..., None] + ends[:, end_index]).reshape(B, -1)
    scores = jnp.pad(scores, ((0, 0), (0, top)), constant_values=2 * _MASKED_LOGIT)
    top_scores, index = jax.lax.top_k(scores, top)
    start_tokens = index // max_answer_length - context_start
    return {"scores": top_scores, "start_tokens": start_tokens,
            "end_tokens": start_tokens + index % max_answer_length,
            "no_answer_score": no_answer_score}


class AnswerCandidate(NamedTuple):
    """A span `text = context[start_char:end_char]`, or no answer ("" with offsets 0 and 0).

    The probability is the softmax of the scores (see `predict`) of the question's candidates.
    """

    text: str
    start_char: int
    end_char: int
    score: float
    probability: float


class Answer(NamedTuple):
    """The predicted answer to one question: the selected `AnswerCandidate`, the score of "no
    answer" (the lowest over the windows), and the best candidates in descending order of scores."""

    text: str
    start_char: int
    end_char: int
    score: float
    probability: float
    no_answer_score: float
    candidates: list[AnswerCandidate]


def decode_answers(
    examples: Sequence[dict], windows: Sequence[Window], predictions: dict[str, np.ndarray], *,
    n_best: int = 20, allow_no_answer: bool = False, no_answer_threshold: float = 0.0,
) -> list[Answer]:
    """Returns the answer to each example: the span with the highest score over all its windows.

    Of spans with equal scores, the one that starts first is selected, and then the shortest.

    Args:
        examples, windows: the examples of `make_windows`, and all their windows.
        predictions: the outputs of `predict` for the windows, concatenated in the same order.
        n_best: maximum number of candidates, at most `top` of `predict`.
        allow_no_answer, no_answer_threshold: if allowed, "" is selected where the score of "no
            answer" exceeds that of the best span by more than the threshold (SQuAD 2.0; BERT
            paper, section 4.3).

    Raises:
        ValueError: `n_best` is below 1, an example has no window, or the windows are not those of
            the predictions.
    """
    p = {name: np.asarray(value) for name, value in predictions.items()}
    example_index = np.array([window.example_index for window in windows], np.int64)
    if n_best < 1 or len(p["no_answer_score"]) != len(windows):
        raise ValueError(f"n_best is {n_best} (it must be at least 1), and there are "
                         f"{len(windows)} windows but predictions for "
                         f"{len(p['no_answer_score'])}; give one prediction for each window")
    num_windows = np.bincount(example_index, minlength=len(examples))
    if len(num_windows) > len(examples) or not num_windows.all():
        raise ValueError(
            f"{np.sum(num_windows == 0)} of {len(examples)} examples have no window; call "
            "make_windows for them too, and remove answers that are not in their contexts")
    no_answer_scores = np.full(len(examples), np.inf)
    np.minimum.at(no_answer_scores, example_index, p["no_answer_score"])
    window, rank = np.nonzero(p["scores"] > _MASKED_LOGIT / 2)
    offsets = np.concatenate([w.offsets for w in windows])
    first_token = np.cumsum([0, *(len(w.offsets) for w in windows[:-1])])[window]
    start = offsets[first_token + p["start_tokens"][window, rank], 0]
    stop = offsets[first_token + p["end_tokens"][window, rank], 1]
    score, example = p["scores"][window, rank], example_index[window]
    order = np.lexsort((stop, start, -score, example))
    order = order[stop[order] > start[order]]
    spans = list(zip(score[order].tolist(), start[order].tolist(), stop[order].tolist()))
    edges = np.searchsorted(example[order], np.arange(len(examples) + 1))
    return [_select_answer(e["context"], spans[edges[i] : edges[i + 1]],
                           float(no_answer_scores[i]), n_best, allow_no_answer,
                           no_answer_threshold) for i, e in enumerate(examples)]


def _select_answer(context, spans, no_answer_score, n_best, allow_no_answer,
                   no_answer_threshold) -> Answer:
    """The answer from the spans `(score, start, stop)` of one example, sorted by score."""
    best_scores: dict[tuple[int, int], float] = {}
    for score, start, stop in spans:
        best_scores.setdefault((start, stop), score)  # overlapping windows share spans
    best = [(score, start, stop) for (start, stop), score in best_scores.items()][:n_best]
    is_empty = not best or (allow_no_answer and no_answer_score - best[0][0] > no_answer_threshold)
    if allow_no_answer or not best:
        best = sorted([*best, (no_answer_score, 0, 0)], key=lambda span: -span[0])
    exponentials = np.exp(np.array([score for score, *_ in best]) - best[0][0])
    probabilities = (exponentials / exponentials.sum()).tolist()
    candidates = [AnswerCandidate(context[start:stop], start, stop, score, probability)
                  for (score, start, stop), probability in zip(best, probabilities)]
    selected = next(c for c in candidates if (c.end_char == 0) == is_empty)
    return Answer(*selected, no_answer_score, candidates)
