"""Corpora and short training runs, shared by the studies."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Config, presets
from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.pretraining import (
    ObjectiveRows,
    PretrainConfig,
    load_texts,
    make_objective_rows,
    train_tokenizer,
    with_vocabulary,
)
from transformer_jax.train import loop, step
from transformer_jax.train.callbacks import Logging
from transformer_jax.tree import PyTree

Curve = tuple[Sequence[int], Sequence[float]]
"""Steps and values."""


class Corpus(NamedTuple):
    """A tokenized text as rows of a pre-training objective; `config` has the vocabulary's size."""

    config: PretrainConfig
    tokenizer: Tokenizer
    train: ObjectiveRows
    held_out: ObjectiveRows


def load_corpus(config: PretrainConfig, tokenizer: Tokenizer | None = None) -> Corpus:
    """Loads the corpus of a config, and trains a tokenizer on it if none is given."""
    train, held_out = load_texts(config)
    tokenizer = tokenizer or train_tokenizer(config, train)
    config = dataclasses.replace(config, model=with_vocabulary(config.model, tokenizer))
    return Corpus(config, tokenizer, *(make_objective_rows(config, texts, tokenizer)
                                       for texts in (train, held_out)))


def load_characters(
    length: int, batch_size: int, num_steps: int, model: Config | None = None
) -> Corpus:
    """Loads the characters of the documentation of Python, in rows of `length`."""
    return load_corpus(PretrainConfig(
        model=model or presets.gpt2(), objective="causal_lm", tokenizer="chars", max_length=length,
        batch_size=batch_size, num_steps=num_steps, out=Path()))


class TrainingResult(NamedTuple):
    """Trained parameters, and the logged rows of the training loop."""

    params: PyTree
    history: list[dict]

    def curve(self, name: str = "loss") -> Curve:
        """Returns the steps and values of a metric in the history."""
        points = [(row["step"], row[name]) for row in self.history if name in row]
        return tuple(zip(*points))


def train(
    name: str, loss_fn: Callable, params: PyTree, batches: Iterator, num_steps: int,
    optimizer: OptimizerConfig, *, mask: PyTree | None = None, seed: int = 0,
    num_log_rows: int = 50,
) -> TrainingResult:
    """Trains parameters, prints a one-line summary, and logs about `num_log_rows` rows."""
    start_time = time.perf_counter()
    transformation = optimizer.make(num_steps)
    state, history = loop.fit(
        step.init_state(params, transformation, mask),
        step.make_train_step(loss_fn, transformation, mask), batches, rng=jax.random.key(seed),
        num_steps=num_steps, callbacks=[Logging(max(num_steps // num_log_rows, 1))])
    print(f"{name}: loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}, "
          f"{time.perf_counter() - start_time:.0f} s", flush=True)
    return TrainingResult(state.params, history)


def random_windows(
    tokens: np.ndarray, length: int, batch_size: int, seed: int
) -> Iterator[np.ndarray]:
    """Yields an infinite sequence of batches `[B, length]` of random windows of a token stream."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(tokens) - length + 1, size=batch_size)
        yield tokens[starts[:, None] + np.arange(length)].astype(np.int32)
