"""Encoded datasets: labeled datasets as token ids, with their task encoders."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from transformer_jax import metrics, sharding
from transformer_jax.data.datasets import LabeledDataset
from transformer_jax.data.length_buckets import LengthBucketedBatches
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.errors import did_you_mean
from transformer_jax.finetuning import feature_cache
from transformer_jax.models import GPT, Model
from transformer_jax.recipes import text_encoder
from transformer_jax.recipes.question_encoder import QuestionEncoder
from transformer_jax.recipes.seq2seq_encoder import Seq2SeqEncoder
from transformer_jax.recipes.task_encoder import (
    PREDICT_BATCH_SIZE,
    InputConfig,
    TaskEncoder,
    TaskInfo,
    predict_batches,
)
from transformer_jax.recipes.text_encoder import TextEncoder
from transformer_jax.recipes.word_encoder import WordEncoder

__all__ = ["EncodedDataset", "InputConfig", "TaskEncoder", "TaskInfo", "cache_features",
           "encode_dataset", "feature_batches", "make_encoder", "predict_batches",
           "write_predictions"]

ENCODERS: dict[str, type[TaskEncoder]] = {
    **dict.fromkeys(text_encoder.TASK_TYPES, TextEncoder),
    "token_classification": WordEncoder,
    "question_answering": QuestionEncoder,
    "seq2seq": Seq2SeqEncoder,
}
"""Task type -> class of its encoder."""


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


def make_encoder(
    task: TaskInfo, model: Model, tokenizer: Tokenizer, config: InputConfig
) -> TaskEncoder:
    """Returns the encoder of a task for a model.

    Raises:
        ValueError: the task type is unknown, an option of GPT is set for another model, or the
            model or its tokenizer does not support the task.
    """
    if task.task_type not in ENCODERS:
        raise ValueError(f"unknown task type {task.task_type!r}; "
                         f"{did_you_mean(task.task_type, ENCODERS)}")
    if config.both_orders and task.task_type not in ("classification", "regression"):
        raise ValueError(f"both_orders is for pairs of texts, but the task is {task.task_type}; "
                         "remove the option")
    if not isinstance(model, GPT):
        for name in ("both_orders", "gpt_special_tokens"):
            if getattr(config, name):
                raise ValueError(f"{name} is for GPT, but the model is a {type(model).__name__}; "
                                 "remove the option")
    return ENCODERS[task.task_type](task, model, tokenizer, config)


def encode_dataset(
    dataset: LabeledDataset, model: Model, tokenizer: Tokenizer, config: InputConfig
) -> EncodedDataset:
    """Tokenizes a labeled dataset for a model.

    Raises:
        ValueError: as in `make_encoder`; or a text with tagged words is longer than a row.
        ModuleNotFoundError: the library that computes the metric is not installed.

    Example:
        >>> from transformer_jax.data import tokenizers
        >>> from transformer_jax.models import build_model, presets
        >>> tokenizer = tokenizers.train_wordpiece(["one two three"] * 4, vocab_size=120)
        >>> rows = [{"text": "one two", "label": 0}, {"text": "three", "label": 1}]
        >>> dataset = LabeledDataset("classification", rows, rows, ("a", "b"), "accuracy", None, {})
        >>> model = build_model(presets.bert_tiny(), num_classes=2, task="classification")
        >>> encoded = encode_dataset(dataset, model, tokenizer, InputConfig(max_length=16))
        >>> encoded.encoder.lengths(encoded.train)
        [4, 3]
    """
    encoder = make_encoder(TaskInfo.of(dataset), model, tokenizer, config)
    metrics.require_library(dataset.metric)
    return EncodedDataset(dataset, encoder, encoder.encode(dataset.train, "training"),
                          encoder.encode(dataset.validation))


def cache_features(params: dict, data: EncodedDataset) -> list[dict]:
    """Computes the outputs of the body (features) for all training items, without dropout.

    Runs that train only the head use them instead of evaluating the body in every step.

    Returns:
        The rows of the items, in order; the entry "tokens" of each holds its features `[D]`.
    """
    encoder = data.encoder
    batches = encoder.batches(data.train, batch_size=PREDICT_BATCH_SIZE).evaluation_batches()
    rows = feature_cache.compute_features(encoder.model, params, batches)
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
