"""An annotated set as one model reads it: rows of ids, a loss, predictions, scores."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax import evaluate
from transformer_jax.data import Annotated
from transformer_jax.data.buckets import GroupedBatches
from transformer_jax.finetune import features
from transformer_jax.models import Model
from transformer_jax.objectives import tasks

BUCKETS = (16, 32, 64, 128, 256, 512)


class Task(NamedTuple):
    """A set in a tokenizer's ids: examples with lists of ids in the place of texts."""

    kind: str
    train: list[dict]
    validation: list[dict]
    label_names: tuple[str, ...]
    metric: str
    label_range: tuple[float, float] | None
    texts: Annotated

    @property
    def num_classes(self) -> int:
        return {"regression": 1, "multiple_choice": 1, "question_answering": 2}.get(
            self.kind, len(self.label_names))


def tokenized(data: Annotated, tokenizer) -> Task:
    """The set, each text tokenized once."""
    def encode(examples: Sequence[dict]) -> list[dict]:
        texts = [text for e in examples for text in (
            [e["text"], *e.get("choices", ()), *([e["text_b"]] if "text_b" in e else [])])]
        ids = iter(tokenizer.encode_batch(texts))
        made = []
        for e in examples:
            row = {"tokens": np.asarray(next(ids), np.int32)}
            if "choices" in e:
                row["choices"] = [np.asarray(next(ids), np.int32) for _ in e["choices"]]
            if "text_b" in e:
                row["tokens_b"] = np.asarray(next(ids), np.int32)
            made.append({**row, "label": e["label"]})
        return made

    return Task(data.kind, encode(data.train), encode(data.validation), data.label_names,
                data.metric, data.label_range, data)


def row_maker(task: Task, model: Model, tokenizer, **options) -> Callable[[dict, int], dict]:
    """`make_row(example, length)`: an example of the task as a row of a batch."""
    prepare = tasks.TASKS[task.kind].prepare
    if task.kind == "classification":
        options["num_classes"] = len(task.label_names)
    if task.kind == "regression":
        options["label_range"] = task.label_range

    def make_row(example: dict, length: int) -> dict:
        row = tasks.text_row(model, tokenizer, length)
        return prepare(example, row=row, **options)

    return make_row


def lengths(examples: Sequence[dict], specials: int = 4) -> list[int]:
    """Tokens of each example's longest row, special ones included."""
    return [len(e["tokens"]) + len(e.get("tokens_b", ())) + specials
            + max(map(len, e.get("choices", [()]))) for e in examples]


def batches(
    examples: Sequence[dict], make_row: Callable[[dict, int], dict], *, length: int,
    batch_size: int, seed: int = 0,
) -> GroupedBatches:
    """Rows of at most `length` tokens, padded to the buckets below it."""
    buckets = [b for b in BUCKETS if b < length] + [length]
    return GroupedBatches(
        examples, lengths(examples), make_row, buckets=buckets, batch_size=batch_size, seed=seed,
        process_index=jax.process_index(), process_count=jax.process_count())


def cached(
    model: Model, params: dict, examples: Sequence[dict], make_row, *, length: int
) -> list[dict]:
    """The rows of examples with the body's features as tokens, in the examples' order."""
    data = batches(examples, make_row, length=length, batch_size=64).evaluation()
    rows = features.compute(model, params, data)
    ordered: list[dict] = [{}] * len(rows)
    for row in rows:
        ordered[int(row.pop("index"))] = row
    return ordered


@functools.cache
def _predict(model: Model, kind: str) -> Callable:
    return jax.jit(functools.partial(tasks.TASKS[kind].predict, model.apply))


def predict(model: Model, params: dict, kind: str, data: Sequence[dict]) -> Any:
    """What the model says of every example, in the examples' order: arrays [n, ...]."""
    found: dict[str, list] = {}
    index = []
    for batch in data:
        batch = dict(batch)
        numbers = np.asarray(batch.pop("index"))
        out = jax.device_get(_predict(model, kind)(params, batch))
        index.append(numbers[numbers >= 0])
        for name, value in out.items():
            found.setdefault(name, []).append(np.asarray(value)[numbers >= 0])
    order = np.argsort(np.concatenate(index), kind="stable")
    return {name: np.concatenate(values)[order] for name, values in found.items()}


def score(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """The numbers that people report for the task's metric."""
    return evaluate.scores(task.metric, labels, predictions, num_classes=task.num_classes)
