"""Small models of every kind, pre-trained alike on Python's documentation, and what they are then
asked: which part of the library a docstring is about, and whether one sentence follows another."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from studies import small
from transformer_jax.data import LabeledDataset, sources, subsample_balanced
from transformer_jax.models import GPT, Config, build_model, init_params, presets
from transformer_jax.objectives import causal_lm, mlm_nsp, seq2seq
from transformer_jax.pretrained.runs import LoadedRun
from transformer_jax.recipes.base_model import add_task_head
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from transformer_jax.recipes.corpus import load_texts, train_tokenizer
from transformer_jax.recipes.finetuning_run import encode_for_training, finetune_params
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.train import step


def masked_words(apply: Callable, params, batch, rng=None, **options):
    """BERT's loss without next sentences."""
    batch = {name: x for name, x in batch.items() if not name.startswith("nsp_")}
    return mlm_nsp.loss(apply, params, batch, rng, **options)


def next_sentence(apply: Callable, params, batch, rng=None, **options):
    """BERT's loss without masked words, which stay hidden."""
    return tuple({name: x for name, x in part.items() if name.startswith("nsp")}
                 for part in mlm_nsp.loss(apply, params, batch, rng, **options))


class Kind(NamedTuple):
    """A way of pre-training: the rows (`recipes.corpus`), the loss, changes of the model."""

    rows: str
    loss: Callable
    changes: Mapping[str, Any] = types.MappingProxyType({})


KINDS: dict[str, Kind] = {
    "GPT": Kind("causal_lm", causal_lm.loss),
    "GPT, k = 8": Kind("causal_lm", causal_lm.loss, {"attention_window": 8}),
    "GPT, k = 2": Kind("causal_lm", causal_lm.loss, {"attention_window": 2}),
    "BERT": Kind("mlm_nsp", mlm_nsp.loss),
    "BERT, no segments": Kind("mlm_nsp", mlm_nsp.loss, {"num_segments": 0}),
    "BERT, words only": Kind("mlm_nsp", masked_words),
    "BERT, sentences only": Kind("mlm_nsp", next_sentence),
    "BART": Kind("denoising", seq2seq.loss),
}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Attributes:
        num_layers: of one stack; an encoder and a decoder have half of them each.
        num_steps, batch_size, length: of pre-training, in tokens of one vocabulary.
        labels, pairs: annotated examples of the two tasks; test_examples: of each.
        finetune_steps, finetune_peak_lr: of fine-tuning, which trains everything.
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


LARGE = Shape(num_layers=6, d_model=512, vocab_size=8192, length=128, batch_size=128,
              num_steps=5000, peak_lr=1e-3, finetune_peak_lr=2e-4, finetune_steps=300, seeds=5)
SMALLEST = Shape(num_layers=2, d_model=16, vocab_size=300, length=24, batch_size=4, num_steps=2,
                 labels=24, pairs=16, test_examples=16, finetune_steps=2, seeds=1)


class System(NamedTuple):
    base: LoadedRun
    held_out: float  # loss of its own objective


def make_config(s: Shape, kind: Kind) -> Config:
    shape = {"num_layers": s.num_layers, "d_model": s.d_model, "num_heads": 4,
             "mlp_dim": 4 * s.d_model, "vocab_size": s.vocab_size, "max_length": 2 * s.length,
             "dropout_rate": 0.0, "attention_dropout_rate": 0.0, "init_std": 0.05,
             "positions": "sinusoidal"}
    rows, _, changes = kind
    if rows == "causal_lm":
        return presets.gpt2(**shape | dict(changes))
    if rows == "denoising":
        return presets.bart_base(**shape | {"num_layers": max(s.num_layers // 2, 1),
                                            "norm_first": True} | dict(changes))
    return presets.bert_tiny(**shape | {"norm_first": True, "norm_epsilon": 1e-6} | dict(changes))


def settings(s: Shape, kind: Kind) -> PretrainConfig:
    return PretrainConfig(
        model=make_config(s, kind), objective=kind.rows, tokenizer="wordpiece",
        max_length=s.length, batch_size=s.batch_size, num_steps=s.num_steps, mask_rate=0.3, out=Path())


@functools.cache
def wordpiece(vocab_size: int) -> Any:
    """The vocabulary that all share."""
    c = settings(dataclasses.replace(SMALLEST, vocab_size=vocab_size), KINDS["BERT"])
    return train_tokenizer(c, load_texts(c)[0])


def pretrain(s: Shape, name: str, kind: Kind | None = None) -> System:
    """One system, from nothing; all see as many tokens in the same vocabulary."""
    kind = kind or KINDS[name]
    corpus = small.read(settings(s, kind), wordpiece(s.vocab_size))
    model = build_model(corpus.settings.model)
    loss = functools.partial(kind.loss, model.apply)
    trained = small.train(
        name, loss, init_params(model, jax.random.key(s.seed)),
        corpus.train.loader(s.batch_size, seed=s.seed), s.num_steps,
        OptimizerConfig(peak_lr=s.peak_lr, warmup_steps=s.num_steps // 20, b2=0.99), seed=s.seed)
    held_out = step.evaluate(step.make_eval_step(loss), trained.params,
                             corpus.held_out.evaluation_batches(s.batch_size, max_batches=16))
    base = LoadedRun(model, trained.params, corpus.tokenizer, [])
    return System(base, held_out["loss"])


# What they are asked -----------------------------------------------------------------------------


def topics(s: Shape) -> LabeledDataset:
    """Which of twelve parts of the library a docstring is about."""
    data = DatasetConfig().load()
    return data._replace(validation=data.validation[: s.test_examples])


def pairs(s: Shape) -> LabeledDataset:
    """Whether the second sentence follows the first, or is of another document."""
    made = []
    for split, count in (("train", s.pairs), ("validation", s.test_examples)):
        source = sources.load_source("python_docs/documents", split)
        documents = [[line for line in source[i]["text"].splitlines() if len(line) > 20]
                     for i in range(len(source))]
        documents = [lines for lines in documents if len(lines) > 1]
        rng = np.random.default_rng(s.seed)
        examples = []
        for i in rng.integers(len(documents), size=count):
            first = int(rng.integers(len(documents[i]) - 1))
            label = len(examples) % 2
            other = documents[int(i + rng.integers(1, len(documents))) % len(documents)]
            second = other[int(rng.integers(len(other)))] if label else documents[i][first + 1]
            examples.append({"text": documents[i][first], "text_b": second, "label": label})
        made.append(examples)
    return LabeledDataset("classification", *made, ("follows", "does not"), "accuracy", None, {})


def ask(s: Shape, system: System, data: LabeledDataset, total: int, *, scratch: bool = False,
        aux_lm_loss_weight: float = 0.0) -> list[float]:
    """Accuracies in percent of all seeds, after fine-tuning everything on `total` examples."""
    training = TrainingConfig(
        max_length=s.length, batch_size=16, num_steps=s.finetune_steps,
        optimizer=FinetuneOptimizerConfig(peak_lr=s.finetune_peak_lr, b2=0.99),
        aux_lm_loss_weight=aux_lm_loss_weight,
        gpt_special_tokens=isinstance(system.base.model, GPT))
    model, pretrained = add_task_head(system.base, data)
    scores = []
    for seed in range(s.seeds):
        drawn = data._replace(train=subsample_balanced(data.train, None, seed, total=total))
        encoded = encode_for_training(drawn, model, system.base.tokenizer, training)
        found = finetune_params(
            encoded, None if scratch else pretrained, "full", training, seed, quiet=True)
        scores.append(100 * found.metrics["accuracy"])
    return scores


def chance(data: LabeledDataset) -> float:
    """The share of the commonest class, in percent."""
    labels = [example["label"] for example in data.validation]
    return 100 * float(max(np.bincount(labels))) / len(labels)
