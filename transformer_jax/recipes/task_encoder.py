"""Base class of the task encoders (`encoding`), and labeled datasets as rows of token ids."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import sharding
from transformer_jax.data.batching import LengthBucketedBatches, choose_buckets
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import GPT, Model
from transformer_jax.objectives import classification, input_format

Outputs = dict[str, np.ndarray]
"""Outputs of a model by name: arrays `[n, ...]`, with one entry for each of n items."""
PREDICT_BATCH_SIZE = 64


class InputConfig(NamedTuple):
    """Settings for converting an example to rows of token ids (see `config.TrainingConfig`).

    Texts longer than `max_length` are truncated, and longer contexts of questions are split into
    windows. Scores of beams are divided by length ** length_penalty.
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
    """Description of the task of a model."""

    task_type: str  # as in `DatasetConfig`
    label_names: tuple[str, ...] = ()  # of the classes or tags, in order
    metric: str = ""  # the main metric
    label_range: tuple[float, float] | None = None  # of a regression
    num_choices: int = 0  # maximum of multiple-choice examples
    has_unanswerable: bool = False  # whether some questions have no answer in their context

    @classmethod
    def of(cls, dataset: LabeledDataset) -> "TaskInfo":
        """Returns the task of a labeled dataset."""
        answering = dataset.task_type == "question_answering"
        return cls(
            dataset.task_type, tuple(dataset.label_names), dataset.metric, dataset.label_range,
            num_choices=max_choices(dataset.train),
            has_unanswerable=answering and any(not e["answers"] for e in dataset.train))

    @property
    def num_outputs(self) -> int:
        """Width of the task head: number of classes, 2 for spans, 1 for scores, 0 for texts."""
        fixed = {"regression": 1, "multiple_choice": 1, "question_answering": 2, "seq2seq": 0}
        return fixed.get(self.task_type, len(self.label_names))


def max_choices(examples: Sequence[dict]) -> int:
    """Returns the maximum number of choices of an example; 0 if there are none."""
    return max((len(e.get("choices", ())) for e in examples), default=0)


class TaskEncoder(abc.ABC):
    """Encodes the examples of one task for one model, and decodes the model's outputs."""

    def __init__(self, task: TaskInfo, model: Model, tokenizer: Tokenizer, config: InputConfig):
        self.task, self.model, self.tokenizer, self.config = task, model, tokenizer, config
        self.is_causal = isinstance(model, GPT)

    @abc.abstractmethod
    def encode(self, examples: Sequence[dict], split: str = "validation") -> list:
        """Tokenizes examples (`data.datasets`) to items, each of which becomes one row.

        An item is a tokenized example or, for question answering, a window over its context.
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
    def _report(
        self, examples: Sequence[dict], items: Sequence, outputs: Outputs
    ) -> tuple[dict[str, Any], list[dict]]:
        """Returns the result of `report`, without the ids of the examples."""

    def report(
        self, examples: Sequence[dict], items: Sequence, outputs: Outputs
    ) -> tuple[dict[str, Any], list[dict]]:
        """Returns the scores, the main metric first, and one line of the prediction file for each
        example, which has the example's "id" or else its index."""
        scores, lines = self._report(examples, items, outputs)
        return scores, [{"id": e.get("id", i), **line}
                        for i, (e, line) in enumerate(zip(examples, lines))]

    def input_packer(self, length: int) -> Callable:
        """Returns the function that joins one or two texts, with special tokens, to a row."""
        added = None  # GPT's start, delimiter and extract tokens
        if self.is_causal and self.config.gpt_special_tokens:
            added = input_format.SpecialTokens.append_to_vocab(self.model.config.vocab_size)
        return input_format.make_input_packer(self.model, self.tokenizer, length, added)

    def predict(self, params: dict, items: Sequence) -> Outputs:
        """Returns the model's outputs for all items, in their order."""
        batches = self.batches(items, batch_size=PREDICT_BATCH_SIZE).evaluation_batches()
        return _predict_batches(self.model, params, self.task.task_type, batches)

    def batches(
        self, items: Sequence, *, batch_size: int, seed: int = 0, num_steps: int | None = None,
        mesh: Mesh | None = None,
    ) -> LengthBucketedBatches:
        """Returns batches of rows of similar lengths, for `num_steps` steps or a single pass.

        The step is compiled once for each length bucket. To limit the time of compilation, there
        are at most 8 buckets, and at most one per 64 steps. A single pass over the items
        (`num_steps` is None) has no backward pass and compiles faster: at most one per 4 batches.
        """
        lengths, shard = self.lengths(items), sharding.process_data_shard(mesh)
        num_buckets = len(items) // batch_size // 4 if num_steps is None else num_steps // 64
        buckets = choose_buckets(lengths, self.config.max_length, min(max(num_buckets, 1), 8))
        return LengthBucketedBatches(
            items, lengths, self.make_row, buckets=buckets, batch_size=batch_size, seed=seed,
            process_index=shard.index, process_count=shard.count)


@functools.cache
def _jitted_predict(model: Model, task_type: str) -> Callable:
    predict = classification.TASK_TYPES[task_type].predict
    return jax.jit(functools.partial(predict, model.apply))


def _predict_batches(
    model: Model, params: dict, task_type: str, batches: Sequence[dict]
) -> Outputs:
    """Returns the outputs for all rows of the batches, sorted by the entry "index".

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
    if not values[0].ndim:
        return np.array(values)
    shape = np.max([v.shape for v in values], axis=0)
    return np.stack([np.pad(v, [(0, n - m) for n, m in zip(shape, v.shape)]) for v in values])


class EncodedDataset(NamedTuple):
    """A labeled dataset as token ids: the items of its splits, and the encoder that made them."""

    dataset: LabeledDataset
    encoder: TaskEncoder
    train: list
    validation: list

    def evaluate(self, params: dict) -> tuple[dict, list[dict]]:
        """Returns `TaskEncoder.report` for the validation examples."""
        outputs = self.encoder.predict(params, self.validation)
        return self.encoder.report(self.dataset.validation, self.validation, outputs)
