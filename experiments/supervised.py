"""An annotated set as one model reads it: rows of ids, a loss, predictions, scores."""

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import metrics, sharding
from transformer_jax.data import LabeledDataset
from transformer_jax.data.length_buckets import LengthBucketedBatches, choose_buckets
from transformer_jax.finetuning import feature_cache
from transformer_jax.models import GPT, Model
from transformer_jax.objectives import classification, question_answering, token_classification

NEW_TOKENS = 3  # GPT's start, delimiter and extract tokens

Predictions = dict[str, np.ndarray]


class Reading(NamedTuple):
    """How a model reads: what is longer than `length` tokens is cut, or read through windows."""

    length: int
    new_tokens: bool = False  # GPT's own tokens around texts, as in its paper
    both_orders: bool = False
    stride: int = 128
    max_question: int = 64
    target_length: int = 64  # of a text to write, with num_beams
    num_beams: int = 4


class Task(NamedTuple):
    """A set, as one model reads it.

    Attributes:
        items: what becomes a row: an example in ids, or a window of a long context.
        make_row: `make_row(item, length)`.
        report: `report(predictions)` of all validation items: (scores, the main one first, and one
            line of the prediction file for each example).
    """

    data: LabeledDataset
    train: list
    validation: list
    lengths: Callable[[Sequence], list[int]]
    make_row: Callable[[Any, int], dict]
    report: Callable[[Predictions], tuple[dict[str, Any], list[dict]]]


def num_classes(data: LabeledDataset) -> int:
    """The width of the head that a set needs."""
    return {"regression": 1, "multiple_choice": 1, "question_answering": 2}.get(
        data.kind, len(data.label_names))


def read(data: LabeledDataset, model: Model, tokenizer, how: Reading) -> Task:
    """The set in ids, each text tokenized once.

    Raises:
        ValueError: the kind is not for a model with a classifier, a pair for a GPT without the
            tokens to part it, an option of GPT for another model, or an annotated text that may
            not be cut and is longer than a row.
    """
    if data.kind not in classification.TASK_TYPES:
        raise ValueError(f"data of the kind {data.kind} is not classified; that is one of "
                         f"{', '.join(classification.TASK_TYPES)}")
    specials = None
    if how.both_orders and data.kind not in ("classification", "regression"):
        raise ValueError(f"both_orders is for pairs of texts, and the data is {data.kind}; leave "
                         "it out")
    if isinstance(model, GPT):
        if not how.new_tokens and tokenizer.eos_id is None and data.kind != "token_classification":
            raise ValueError("the tokenizer has no end-of-text token for GPT to classify at; set "
                             "new_tokens")
        if not how.new_tokens and ("text_b" in data.train[0] or data.kind == "question_answering"):
            raise ValueError("GPT needs a token between two texts; set new_tokens (its paper's "
                             "start, delimiter and extract tokens)")
        if how.new_tokens:
            specials = classification.SpecialTokens.new(model.config.vocab_size)
    else:
        for name in ("both_orders", "new_tokens"):
            if getattr(how, name):
                raise ValueError(f"{name} is for GPT, and the model is a {type(model).__name__}; "
                                 "leave it out")
    make = {"token_classification": _tagging, "question_answering": _answering}.get(
        data.kind, _whole_texts)
    return make(data, model, tokenizer, how, specials)


# Whole texts --------------------------------------------------------------------------------------


def _whole_texts(data, model, tokenizer, how: Reading, specials) -> Task:
    prepare = classification.TASK_TYPES[data.kind].prepare
    options: dict[str, Any] = {
        "classification": {"num_classes": len(data.label_names), "both_orders": how.both_orders},
        "regression": {"label_range": data.label_range, "both_orders": how.both_orders},
        "multiple_choice": {"num_choices": max(len(e.get("choices", ())) for e in data.train)},
    }[data.kind]

    def make_row(item: dict, length: int) -> dict:
        return prepare(item, row=classification.make_input_packer(model, tokenizer, length, specials), **options)

    def lengths(items: Sequence[dict]) -> list[int]:
        return [len(e["tokens"]) + len(e.get("tokens_b", ())) + (3 if "tokens_b" in e else 2)
                + (max(map(len, e["choices"])) + 1 if "choices" in e else 0) for e in items]

    report = {"classification": _report_classes, "regression": _report_scores,
              "multiple_choice": _report_classes}[data.kind]
    return Task(data, _ids(data.train, tokenizer), _ids(data.validation, tokenizer), lengths,
                make_row, functools.partial(report, data))


def _ids(examples: Sequence[dict], tokenizer) -> list[dict]:
    texts = [text for e in examples
             for text in [e["text"], *e.get("choices", ()), *filter(None, [e.get("text_b")])]]
    ids = iter(tokenizer.encode_batch(texts))
    made = []
    for e in examples:
        row: dict[str, Any] = {"tokens": np.asarray(next(ids), np.int32), "label": e["label"]}
        if "choices" in e:
            row["choices"] = [np.asarray(next(ids), np.int32) for _ in e["choices"]]
        if "text_b" in e:
            row["tokens_b"] = np.asarray(next(ids), np.int32)
        made.append(row)
    return made


def _report_classes(data: LabeledDataset, found: Predictions) -> tuple[dict, list[dict]]:
    probabilities = found["probabilities"]
    chosen = probabilities.argmax(-1)
    labels = np.array([e["label"] for e in data.validation])
    table = metrics.confusion_matrix(labels, chosen, probabilities.shape[1])
    names = data.label_names or tuple(map(str, range(probabilities.shape[1])))
    lines = [{"id": e.get("id", i), "prediction": names[c], "label": names[e["label"]],
              **{f"p({name})": round(float(x), 6) for name, x in zip(names, p)}}
             for i, (e, c, p) in enumerate(zip(data.validation, chosen, probabilities))]
    return {**metrics.class_scores(data.metric, table), "confusion": table,
            "calibration": metrics.calibration(probabilities, labels)}, lines


def _report_scores(data: LabeledDataset, found: Predictions) -> tuple[dict, list[dict]]:
    low, high = data.label_range
    scores = low + (high - low) * found["scores"]
    labels = np.array([e["label"] for e in data.validation])
    lines = [{"id": e.get("id", i), "prediction": round(float(s), 4), "label": e["label"]}
             for i, (e, s) in enumerate(zip(data.validation, scores))]
    return metrics.correlations(scores, labels), lines


# Tags ---------------------------------------------------------------------------------------------


def _tagging(data, model, tokenizer, how: Reading, specials) -> Task:
    causal = isinstance(model, GPT)
    space = tokenizer.encode(" a") != tokenizer.encode("a")  # byte-level BPE: spaces are in tokens

    def lengths(found):
        return [2 * (not causal) + sum(map(len, e["words"])) for e in found]

    def items(split, examples):
        found = [{"words": token_classification.subword_ids(e["words"], tokenizer, space), "tags": e["tags"]}
                 for e in examples]
        for i, n in enumerate(lengths(found)):
            if n > how.length:
                raise ValueError(f"{split} example {examples[i].get('id', i)!r} has {n} tokens, "
                                 f"more than a row's {how.length}, and no tagged word may be lost; "
                                 "raise the length, or split the text")
        return found

    def make_row(item: dict, length: int) -> dict:
        return token_classification.prepare(
            item, length=length, num_classes=len(data.label_names), last_piece=causal,
            cls_id=None if causal else tokenizer.cls_id,
            sep_id=None if causal else tokenizer.sep_id, pad_id=tokenizer.pad_id or 0)

    def report(found: Predictions) -> tuple[dict, list[dict]]:
        names = data.label_names
        chosen = [[names[t] for t in token_classification.word_predictions(p, w)]
                  for p, w in zip(found["probabilities"], found["words"])]
        true = [[names[t] for t in e["tags"]] for e in data.validation]
        scores = metrics.entity_f1(true, chosen)
        right = [a == b for t, c in zip(true, chosen) for a, b in zip(t, c)]
        lines = [{"id": e.get("id", i), "words": e["words"], "tags": c}
                 for i, (e, c) in enumerate(zip(data.validation, chosen))]
        scores = {"accuracy": float(np.mean(right)), **scores}
        return {data.metric: scores[data.metric], **scores}, lines

    return Task(data, items("training", data.train), items("validation", data.validation), lengths,
                make_row, report)


# Answers ------------------------------------------------------------------------------------------


def _answering(data, model, tokenizer, how: Reading, specials) -> Task:
    causal = isinstance(model, GPT)
    windows = functools.partial(question_answering.make_windows, tokenizer=tokenizer, length=how.length,
                                stride=how.stride, max_question=how.max_question)
    train = windows(data.train, check=False)
    if left := len(data.train) - len({window.example for window in train}):
        print(f"{left} of {len(data.train)} training questions are left out: no token has a "
              "character of their answer", flush=True)
    # What an answer should be is for the scores; windows need only hold the context.
    validation = windows([{**e, "answers": []} for e in data.validation])
    some_have_none = any(not e["answers"] for e in data.train)

    def make_row(window, length: int) -> dict:
        return question_answering.prepare(window, row=classification.make_input_packer(model, tokenizer, length, specials),
                             last=causal)

    def report(found: Predictions) -> tuple[dict, list[dict]]:
        answers = question_answering.decode(data.validation, validation, found, no_answer=some_have_none)
        gold = [[g["text"] for g in e["answers"]] for e in data.validation]
        scores = metrics.squad_scores([a.text for a in answers], gold)
        if some_have_none:
            spoken = [next((b for b in a.best if b[2]), None) for a in answers]
            scores |= metrics.squad_thresholds(
                [b[0] if b else "" for b in spoken],
                [a.none - (b[3] if b else -np.inf) for a, b in zip(answers, spoken)], gold)
        lines = [{"id": e.get("id", i), "prediction": a.text, "start": a.start, "stop": a.stop,
                  "score": a.score, "no_answer": a.none, "best": a.best[:5]}
                 for i, (e, a) in enumerate(zip(data.validation, answers))]
        return {"f1": scores["f1"], "exact_match": scores["exact_match"], **scores}, lines

    return Task(data, train, validation,
                lambda found: [3 + len(w.question) + len(w.context) for w in found], make_row,
                report)


# Batches ------------------------------------------------------------------------------------------


def batches(task: Task, items: Sequence, *, length: int, batch_size: int, seed: int = 0,
            num_steps: int | None = None, mesh: Mesh | None = None):
    """Rows of at most `length` tokens, padded to buckets: one for each 64 of `num_steps`, since
    each is compiled once; to read the items once, which compiles faster, for each 4 batches."""
    lengths, share = task.lengths(items), sharding.process_data_shard(mesh)
    most = len(items) // batch_size // 4 if num_steps is None else num_steps // 64
    return LengthBucketedBatches(
        items, lengths, task.make_row,
        buckets=choose_buckets(lengths, length, min(max(most, 1), 8)), batch_size=batch_size,
        seed=seed, process_index=share.index, process_count=share.count)


def cached(model: Model, params: dict, task: Task, items: Sequence, length: int) -> list[dict]:
    """The rows of items with the body's features in the place of tokens, in their order."""
    data = batches(task, items, length=length, batch_size=64).evaluation()
    rows = feature_cache.compute_features(model, params, data)
    return sorted(rows, key=lambda row: int(row["index"]))


def of_features(
    rows: Sequence[dict], batch_size: int, seed: int, mesh: Mesh | None = None
) -> LengthBucketedBatches:
    """Batches of cached rows."""
    share = sharding.process_data_shard(mesh)
    return LengthBucketedBatches(
        rows, [1] * len(rows), lambda row, length: {k: v for k, v in row.items() if k != "index"},
        buckets=[1], batch_size=batch_size, seed=seed,
        process_index=share.index, process_count=share.count)


@functools.cache
def _predict(model: Model, kind: str) -> Callable:
    return jax.jit(functools.partial(classification.TASK_TYPES[kind].predict, model.apply))


def predict(model: Model, params: dict, kind: str, data: Sequence[dict]) -> Predictions:
    """What the model says of every item, in the items' order: arrays [n, ...].

    Rows of unlike lengths are filled up with zeros.
    """
    rows: dict[int, dict] = {}
    for batch in data:
        numbers = np.asarray(batch["index"])
        found = jax.device_get(_predict(model, kind)(
            params, {name: x for name, x in batch.items() if name != "index"}))
        for k in np.flatnonzero(numbers >= 0):
            rows[int(numbers[k])] = {name: np.asarray(x)[k] for name, x in found.items()}
    ordered = [rows[i] for i in range(len(rows))]
    return {name: _stack([row[name] for row in ordered]) for name in ordered[0]}


def _stack(values: list[np.ndarray]) -> np.ndarray:
    shape = np.max([v.shape for v in values], axis=0) if values[0].ndim else ()
    out = np.zeros((len(values), *np.asarray(shape, int)), values[0].dtype)
    for i, value in enumerate(values):
        out[(i, *map(slice, value.shape))] = value
    return out


def write_predictions(path: Path, lines: Sequence[dict]) -> None:
    """One JSON object a line, in the order of the data. Answers to questions are written a second
    time, to the same name with .json, as the `{id: text}` that SQuAD's own script reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                    encoding="utf-8")
    if lines and "no_answer" in lines[0]:
        answers = {str(line["id"]): line["prediction"] for line in lines}
        path.with_suffix(".json").write_text(json.dumps(answers, ensure_ascii=False, indent=1),
                                             encoding="utf-8")
