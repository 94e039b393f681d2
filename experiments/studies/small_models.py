"""Small GPT, BERT and BART models, pre-trained on the documentation of Python, and two tasks.

The tasks are classifications: which part of the standard library a docstring documents, and whether
one sentence follows another.
"""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from studies import training
from transformer_jax.data import LabeledDataset, load_dataset, sources, subsample_balanced
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import GPT, Config, Model, build_model, init_params, presets
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.pretrained import LoadedRun
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from transformer_jax.recipes.finetuning_run import (
    FinetunedParams,
    add_task_head,
    encode_for_training,
    finetune_params,
)
from transformer_jax.recipes.pretraining import PretrainConfig, load_texts, train_tokenizer
from transformer_jax.recipes.task_encoder import EncodedDataset
from transformer_jax.train import step


def masked_lm_loss(apply: Callable, params, batch, rng=None, **options):
    """BERT's loss without next-sentence prediction."""
    batch = {name: x for name, x in batch.items() if not name.startswith("nsp_")}
    return mlm_nsp.loss(apply, params, batch, rng, **options)


def next_sentence_loss(apply: Callable, params, batch, rng=None, **options):
    """BERT's loss without masked language modeling; the inputs still have masked tokens."""
    return tuple({name: x for name, x in part.items() if name.startswith("nsp")}
                 for part in mlm_nsp.loss(apply, params, batch, rng, **options))


class Method(NamedTuple):
    """A pre-training method: its objective and loss, and the model config's changed fields."""

    objective: str
    loss: Callable
    changes: Mapping[str, Any] = types.MappingProxyType({})


METHODS: dict[str, Method] = {
    "GPT": Method("causal_lm", causal_lm.loss),
    "GPT, window 8": Method("causal_lm", causal_lm.loss, {"attention_window": 8}),
    "GPT, window 2": Method("causal_lm", causal_lm.loss, {"attention_window": 2}),
    "BERT": Method("mlm_nsp", mlm_nsp.loss),
    "BERT, no segments": Method("mlm_nsp", mlm_nsp.loss, {"num_segments": 0}),
    "BERT, masked words only": Method("mlm_nsp", masked_lm_loss),
    "BERT, next sentence only": Method("mlm_nsp", next_sentence_loss),
    "BART": Method("denoising", seq2seq.loss),
}


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """Settings of model size, pre-training and fine-tuning, shared by all models of a study.

    Attributes:
        num_layers: layers of GPT and BERT; BART's encoder and decoder have half as many each.
        d_model: width of the model.
        vocab_size: size of the vocabulary, which all models share.
        length: tokens per row.
        batch_size: rows per step of pre-training.
        num_steps: steps of pre-training.
        peak_lr: peak learning rate of pre-training.
        labels: number of training examples of the topic task.
        pairs: number of training examples of the sentence-pair task.
        test_examples: number of test examples of each task.
        finetune_steps: steps of fine-tuning, which trains all parameters.
        finetune_peak_lr: peak learning rate of fine-tuning.
        seeds: number of fine-tuning runs.
        seed: seed of pre-training and of the sentence pairs.
    """

    num_layers: int = 2
    d_model: int = 128
    vocab_size: int = 2048
    length: int = 64
    batch_size: int = 32
    num_steps: int = 800
    peak_lr: float = 3e-3
    labels: int = 768
    pairs: int = 1536
    test_examples: int = 384
    finetune_steps: int = 150
    finetune_peak_lr: float = 1.5e-3
    seeds: int = 3
    seed: int = 0


LARGE = ProtocolConfig(
    num_layers=6, d_model=512, vocab_size=8192, length=128, batch_size=128, num_steps=5000,
    peak_lr=1e-3, finetune_peak_lr=2e-4, finetune_steps=300, seeds=5)
SMALLEST = ProtocolConfig(
    num_layers=2, d_model=16, vocab_size=300, length=24, batch_size=4, num_steps=2, labels=24,
    pairs=16, test_examples=16, finetune_steps=2, seeds=1)


class PretrainedModel(NamedTuple):
    """A pre-trained model, and its held-out pre-training loss."""

    base: LoadedRun
    held_out: float


def make_model_config(protocol: ProtocolConfig, method: Method) -> Config:
    """Returns the config of a method's model."""
    size = {"num_layers": protocol.num_layers, "d_model": protocol.d_model, "num_heads": 4,
            "mlp_dim": 4 * protocol.d_model, "vocab_size": protocol.vocab_size,
            "max_length": 2 * protocol.length, "dropout_rate": 0.0, "attention_dropout_rate": 0.0,
            "init_std": 0.05, "positions": "sinusoidal"}
    changes = dict(method.changes)
    if method.objective == "causal_lm":
        return presets.gpt2(**size | changes)
    if method.objective == "denoising":
        stack = {"num_layers": max(protocol.num_layers // 2, 1), "norm_first": True}
        return presets.bart_base(**size | stack | changes)
    return presets.bert_tiny(**size | {"norm_first": True, "norm_epsilon": 1e-6} | changes)


def make_pretrain_config(protocol: ProtocolConfig, method: Method) -> PretrainConfig:
    """Returns the settings of a pre-training run; `out` is not used."""
    return PretrainConfig(
        model=make_model_config(protocol, method), objective=method.objective,
        tokenizer="wordpiece", max_length=protocol.length, batch_size=protocol.batch_size,
        num_steps=protocol.num_steps, mask_rate=0.3, out=Path())


@functools.cache
def shared_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns the WordPiece tokenizer that all models share."""
    config = make_pretrain_config(
        dataclasses.replace(SMALLEST, vocab_size=vocab_size), METHODS["BERT"])
    return train_tokenizer(config, load_texts(config)[0])


def pretrain(
    protocol: ProtocolConfig, name: str, method: Method | None = None
) -> PretrainedModel:
    """Pre-trains a model by `method`, or by `METHODS[name]`; all see the same number of tokens."""
    method = method or METHODS[name]
    corpus = training.load_corpus(
        make_pretrain_config(protocol, method), shared_tokenizer(protocol.vocab_size))
    model = build_model(corpus.config.model)
    loss_fn = functools.partial(method.loss, model.apply)
    result = training.train(
        name, loss_fn, init_params(model, jax.random.key(protocol.seed)),
        corpus.train.loader(protocol.batch_size, seed=protocol.seed), protocol.num_steps,
        OptimizerConfig(peak_lr=protocol.peak_lr, warmup_steps=protocol.num_steps // 20, b2=0.99),
        seed=protocol.seed)
    held_out = step.evaluate(
        step.make_eval_step(loss_fn), result.params,
        corpus.held_out.evaluation_batches(protocol.batch_size, max_batches=16))
    return PretrainedModel(
        LoadedRun(model, result.params, corpus.tokenizer, []), held_out["loss"])


def load_topics(protocol: ProtocolConfig) -> LabeledDataset:
    """Returns the task: classify which of twelve parts of the library a text documents."""
    dataset = load_dataset(DatasetConfig())
    return dataset._replace(validation=dataset.validation[: protocol.test_examples])


def make_sentence_pairs(protocol: ProtocolConfig) -> LabeledDataset:
    """Returns the task: does the second sentence follow the first, or is it of another document?"""
    splits = []
    for split, count in (("train", protocol.pairs), ("validation", protocol.test_examples)):
        source = sources.load_source("python_docs/documents", split)
        documents = [[line for line in source[i]["text"].splitlines() if len(line) > 20]
                     for i in range(len(source))]
        documents = [lines for lines in documents if len(lines) > 1]
        rng = np.random.default_rng(protocol.seed)
        examples = []
        for i in rng.integers(len(documents), size=count):
            first = int(rng.integers(len(documents[i]) - 1))
            label = len(examples) % 2
            other = documents[int(i + rng.integers(1, len(documents))) % len(documents)]
            second = other[int(rng.integers(len(other)))] if label else documents[i][first + 1]
            examples.append({"text": documents[i][first], "text_b": second, "label": label})
        splits.append(examples)
    label_names = ("follows", "does not follow")
    return LabeledDataset("classification", *splits, label_names, "accuracy", None, {})


class Finetuned(NamedTuple):
    """A fine-tuned model, its encoded dataset, and the result with parameters and metrics."""

    model: Model
    encoded: EncodedDataset
    result: FinetunedParams


def finetune(
    base: LoadedRun, dataset: LabeledDataset, num_examples: int, config: TrainingConfig, seed: int,
    from_scratch: bool = False,
) -> Finetuned:
    """Fine-tunes all parameters of a model on `num_examples` examples, sampled with the seed."""
    model, params = add_task_head(base, dataset)
    train = subsample_balanced(dataset.train, None, seed, total=num_examples)
    encoded = encode_for_training(dataset._replace(train=train), model, base.tokenizer, config)
    return Finetuned(model, encoded, finetune_params(
        encoded, None if from_scratch else params, "full", config, seed, quiet=True))


def finetune_accuracies(
    protocol: ProtocolConfig, pretrained: PretrainedModel, dataset: LabeledDataset,
    num_examples: int, *, from_scratch: bool = False, aux_lm_loss_weight: float = 0.0,
) -> list[float]:
    """Fine-tunes all parameters on `num_examples` examples, which each seed samples anew.

    Returns the accuracy of each seed, in percent.
    """
    config = TrainingConfig(
        max_length=protocol.length, batch_size=16, num_steps=protocol.finetune_steps,
        optimizer=FinetuneOptimizerConfig(peak_lr=protocol.finetune_peak_lr, b2=0.99),
        aux_lm_loss_weight=aux_lm_loss_weight,
        gpt_special_tokens=isinstance(pretrained.base.model, GPT))
    return [100 * finetune(pretrained.base, dataset, num_examples, config, seed, from_scratch)
            .result.metrics["accuracy"] for seed in range(protocol.seeds)]


def load_tasks(protocol: ProtocolConfig) -> dict[str, tuple[LabeledDataset, int]]:
    """Returns both tasks with their numbers of training examples."""
    return {"topics": (load_topics(protocol), protocol.labels),
            "pairs": (make_sentence_pairs(protocol), protocol.pairs)}


def majority_baseline(dataset: LabeledDataset) -> float:
    """Returns the accuracy of predicting the most frequent class, in percent."""
    labels = [example["label"] for example in dataset.validation]
    return 100 * float(max(np.bincount(labels))) / len(labels)
