"""Base class of the task encoders, which convert labeled examples to rows of token ids.

An encoder also converts the outputs of the model to predictions and scores. `encoding` has the
encoders, and `encoding.make_encoder` selects the one for a task.
"""

import abc
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import sharding
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.length_buckets import LengthBucketedBatches, choose_buckets
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.finetuning import frozen
from transformer_jax.models import GPT, Model
from transformer_jax.objectives import classification

Outputs = dict[str, np.ndarray]
"""Outputs of a model by name: arrays `[n, ...]`, with one entry for each of n items."""
PREDICT_BATCH_SIZE = 64


class InputConfig(NamedTuple):
    """Settings for converting an example to rows of token ids.

    Attributes:
        max_length: maximum number of tokens of a row; longer texts are truncated, and longer
            contexts of questions are split into windows.
        gpt_special_tokens: whether rows have start, delimiter and extract tokens (GPT paper,
            section 3.3).
        both_orders: whether each pair of texts is encoded in both orders (GPT paper, section 3.3).
        stride: distance in tokens between the starts of consecutive windows over a long context.
        max_question_length: number of tokens to which longer questions are truncated.
        target_length: maximum number of tokens of a target text; for GPT, only of a generated one.
        num_beams: number of beams of the beam search that generates target texts.
        length_penalty: beam scores are divided by length ** length_penalty; unused with one beam.
    """

    max_length: int
    gpt_special_tokens: bool = False
    both_orders: bool = False
    stride: int = 128
    max_question_length: int = 64
    target_length: int = 64
    num_beams: int = 4
    length_penalty: float = 1.0


class TaskInfo(NamedTuple):
    """Description of the task of a model.

    Attributes:
        task_type: "classification", "regression", "multiple_choice", "token_classification",
            "question_answering" or "seq2seq".
        label_names: names of the classes or tags, in order; empty for the other task types.
        metric: the main metric.
        label_range: lowest and highest label of a regression.
        num_choices: maximum number of choices of a multiple-choice example.
        has_unanswerable: whether some questions have no answer in their context.
    """

    task_type: str
    label_names: tuple[str, ...] = ()
    metric: str = ""
    label_range: tuple[float, float] | None = None
    num_choices: int = 0
    has_unanswerable: bool = False

    @classmethod
    def of(cls, dataset: LabeledDataset) -> "TaskInfo":
        """Returns the task of a labeled dataset."""
        answering = dataset.task_type == "question_answering"
        return cls(
            dataset.task_type, tuple(dataset.label_names), dataset.metric, dataset.label_range,
            num_choices=max((len(e.get("choices", ())) for e in dataset.train), default=0),
            has_unanswerable=answering and any(not e["answers"] for e in dataset.train))

    @property
    def num_outputs(self) -> int:
        """Width of the task head: number of classes, 2 for spans, 1 for scores, 0 for texts."""
        fixed = {"regression": 1, "multiple_choice": 1, "question_answering": 2, "seq2seq": 0}
        return fixed.get(self.task_type, len(self.label_names))


class TaskEncoder(abc.ABC):
    """Encodes the examples of one task for one model, and decodes the model's outputs.

    Args:
        task: the task.
        model: the model, with the head of the task.
        tokenizer: the model's tokenizer.
        config: settings of the encoding.
    """

    def __init__(self, task: TaskInfo, model: Model, tokenizer: Tokenizer, config: InputConfig):
        self.task, self.model, self.tokenizer, self.config = task, model, tokenizer, config
        self.is_causal = isinstance(model, GPT)

    @abc.abstractmethod
    def encode(self, examples: Sequence[dict], split: str = "validation") -> list:
        """Tokenizes labeled examples.

        Args:
            examples: the examples, in the form of `data.datasets`.
            split: "training" or "validation".

        Returns:
            The items, each of which becomes one row: tokenized examples or, for question
            answering, windows over their contexts.
        """

    @abc.abstractmethod
    def lengths(self, items: Sequence) -> list[int]:
        """Returns the number of tokens of each item's row, including special tokens."""

    @abc.abstractmethod
    def make_row(self, item: Any, length: int) -> dict[str, np.ndarray]:
        """Returns the arrays of one row, padded or truncated to `length` tokens."""

    @abc.abstractmethod
    def predictions(
        self, examples: Sequence[dict], items: Sequence, outputs: Outputs
    ) -> list[dict]:
        """Returns one dict for each example: the prediction and its score or probabilities."""

    @abc.abstractmethod
    def report(
        self, examples: Sequence[dict], items: Sequence, outputs: Outputs
    ) -> tuple[dict[str, Any], list[dict]]:
        """Returns the scores, the main metric first, and one line of the prediction file for each
        example."""

    def input_packer(self, length: int) -> Callable:
        """Returns the function that joins one or two texts, with special tokens, to a row."""
        added = None  # GPT's start, delimiter and extract tokens
        if self.is_causal and self.config.gpt_special_tokens:
            added = classification.SpecialTokens.append_to_vocab(self.model.config.vocab_size)
        return classification.make_input_packer(self.model, self.tokenizer, length, added)

    def predict(self, params: dict, items: Sequence) -> Outputs:
        """Returns the model's outputs for all items, in their order."""
        batches = self.batches(items, batch_size=PREDICT_BATCH_SIZE).evaluation_batches()
        return predict_batches(self.model, params, self.task.task_type, batches)

    def batches(
        self, items: Sequence, *, batch_size: int, seed: int = 0, num_steps: int | None = None,
        mesh: Mesh | None = None,
    ) -> LengthBucketedBatches:
        """Returns batches of rows of similar lengths.

        The step is compiled once for each length bucket. To limit the time of compilation, there
        are at most 8 buckets, and at most one per 64 steps. A single pass over the items
        (`num_steps` is None) has no backward pass and compiles faster: at most one per 4 batches.

        Args:
            items: items from `encode`.
            batch_size: number of rows of a batch, over all devices.
            seed: seed of the order of the items.
            num_steps: number of steps of the run; None for a single pass.
            mesh: device mesh, which determines the rows of this process.
        """
        lengths, shard = self.lengths(items), sharding.process_data_shard(mesh)
        num_buckets = len(items) // batch_size // 4 if num_steps is None else num_steps // 64
        buckets = choose_buckets(lengths, self.config.max_length, min(max(num_buckets, 1), 8))
        return LengthBucketedBatches(
            items, lengths, self.make_row, buckets=buckets, batch_size=batch_size, seed=seed,
            process_index=shard.index, process_count=shard.count)


def example_id(example: dict, index: int) -> Any:
    """Returns the example's "id", or its index in the data."""
    return example.get("id", index)


@functools.cache
def _jitted_predict(model: Model, task_type: str) -> Callable:
    predict = classification.TASK_TYPES[task_type].predict
    return jax.jit(functools.partial(predict, model.apply))


def predict_batches(
    model: Model, params: dict, task_type: str, batches: Sequence[dict]
) -> Outputs:
    """Returns the outputs of a model for all rows of the batches, sorted by the entry "index".

    Rows with a negative index are padding and are left out. Outputs of different lengths are padded
    with zeros.
    """
    rows: dict[int, dict] = {}
    for batch in batches:
        index = np.asarray(batch["index"])
        outputs = jax.device_get(_jitted_predict(model, task_type)(
            params, {name: x for name, x in batch.items() if name != "index"}))
        for k in np.flatnonzero(index >= 0):
            rows[int(index[k])] = {name: np.asarray(x)[k] for name, x in outputs.items()}
    ordered = [rows[i] for i in range(len(rows))]
    return {name: _pad_and_stack([row[name] for row in ordered]) for name in ordered[0]}


def _pad_and_stack(values: list[np.ndarray]) -> np.ndarray:
    shape = np.max([v.shape for v in values], axis=0) if values[0].ndim else ()
    out = np.zeros((len(values), *np.asarray(shape, int)), values[0].dtype)
    for i, value in enumerate(values):
        out[(i, *map(slice, value.shape))] = value
    return out


class EncodedDataset(NamedTuple):
    """A labeled dataset as token ids.

    Attributes:
        dataset: the labeled examples.
        encoder: converts items to rows and scores the model's outputs.
        train: items of the training split: tokenized examples or, for question answering, windows
            over their contexts.
        validation: items of the validation split.
    """

    dataset: LabeledDataset
    encoder: TaskEncoder
    train: list
    validation: list

    def evaluate(self, params: dict) -> tuple[dict, list[dict]]:
        """Returns the scores on the validation examples, the main metric first, and one line of the
        prediction file for each example."""
        outputs = self.encoder.predict(params, self.validation)
        return self.encoder.report(self.dataset.validation, self.validation, outputs)


def cache_features(params: dict, data: EncodedDataset) -> list[dict]:
    """Computes the outputs of the body (features) for all training items, without dropout.

    Runs that train only the head use them instead of evaluating the body in every step.

    Returns:
        The rows of the items, in order; the entry "tokens" of each holds its features `[D]`, or
        `[R, D]` for R choices or R = 2 orders.
    """
    encoder = data.encoder
    batches = encoder.batches(data.train, batch_size=PREDICT_BATCH_SIZE).evaluation_batches()
    rows = frozen.compute_features(encoder.model, params, batches)
    return sorted(rows, key=lambda row: int(row["index"]))


def feature_batches(
    rows: Sequence[dict], batch_size: int, seed: int, mesh: Mesh | None = None
) -> LengthBucketedBatches:
    """Returns batches of rows of cached features, shuffled anew in each epoch."""
    shard = sharding.process_data_shard(mesh)
    return LengthBucketedBatches(
        rows, [1] * len(rows), lambda row, length: {k: v for k, v in row.items() if k != "index"},
        buckets=[1], batch_size=batch_size, seed=seed, process_index=shard.index,
        process_count=shard.count)


def write_predictions(path: Path, lines: Sequence[dict]) -> None:
    """Writes one JSON object per line, in the order of the data.

    Answers to questions are also written to a file of the same name with the suffix .json, as the
    dict `{id: text}` that SQuAD's evaluation script reads.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
                    encoding="utf-8")
    if lines and "no_answer" in lines[0]:
        answers = {str(line["id"]): line["prediction"] for line in lines}
        path.with_suffix(".json").write_text(json.dumps(answers, ensure_ascii=False, indent=1),
                                             encoding="utf-8")
