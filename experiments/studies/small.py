"""What several studies do: read a corpus, train something small on it, keep its curve."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from transformer_jax.recipes.config import OptimizerConfig
from transformer_jax.recipes.corpus import (
    ObjectiveRows,
    load_texts,
    make_objective_rows,
    train_tokenizer,
    with_vocabulary,
)
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.train import loop, step
from transformer_jax.tree import PyTree


class Corpus(NamedTuple):
    """A text as a model is pre-trained on it: `settings` with the tokenizer's vocabulary, rows to
    train on and rows that are held out."""

    settings: PretrainConfig
    tokenizer: Any
    train: ObjectiveRows
    held_out: ObjectiveRows


def read(c: PretrainConfig, tokenizer: Any = None) -> Corpus:
    """The corpus of `c`, with a tokenizer that is made for it unless there is one."""
    train, held_out = load_texts(c)
    tokenizer = tokenizer or train_tokenizer(c, train)
    c = dataclasses.replace(c, model=with_vocabulary(c.model, tokenizer))
    return Corpus(c, tokenizer, *(make_objective_rows(c, texts, tokenizer)
                                  for texts in (train, held_out)))


Curve = tuple[Sequence[int], Sequence[float]]


class Trained(NamedTuple):
    params: PyTree
    history: list[dict]

    def curve(self, name: str = "loss") -> Curve:
        """(steps, values) of a number in the history."""
        found = [(row["step"], row[name]) for row in self.history if name in row]
        return tuple(zip(*found))


def train(
    title: str, loss_fn: Callable, params: PyTree, batches: Iterator, num_steps: int,
    optimizer: OptimizerConfig, *, mask: PyTree | None = None, seed: int = 0, looks: int = 50,
) -> Trained:
    """`num_steps` updates of what `mask` says, all if None, and a line about it."""
    began = time.perf_counter()
    made = optimizer.make(num_steps)
    state, history = loop.fit(
        step.init_state(params, made, mask), step.make_train_step(loss_fn, made, mask), batches,
        rng=jax.random.key(seed), num_steps=num_steps, log_every=max(num_steps // looks, 1),
        quiet=True)
    print(f"{title}: loss {history[0]['loss']:.3f} -> {history[-1]['loss']:.3f}, "
          f"{time.perf_counter() - began:.0f} s", flush=True)
    return Trained(state.params, history)


def windows(tokens: np.ndarray, length: int, batch_size: int, seed: int) -> Iterator[np.ndarray]:
    """Batches `[B, length]` of a stream, from random places, for ever."""
    rng = np.random.default_rng(seed)
    while True:
        starts = rng.integers(len(tokens) - length + 1, size=batch_size)
        yield tokens[starts[:, None] + np.arange(length)].astype(np.int32)
