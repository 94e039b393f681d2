"""Sentence embeddings: texts of a pair belong together, those of other pairs do not.

Reimers & Gurevych 2019, "Sentence-BERT", section 3 (the mean of token states as a text's embedding)
and Henderson et al. 2017, "Efficient Natural Language Response Suggestion", section 4.4 (the other
pairs of a batch as negatives). What checkpoints such as all-MiniLM-L6-v2 were trained for, so also
the measure of what such a model forgets.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Key

from transformer_jax.models.heads import mean_pool
from transformer_jax.objectives.cross_entropy import (
    SumAndWeight,
    cross_entropy,
    dropout,
    top1_correct,
    weighted_sum,
)
from transformer_jax.objectives.input_format import pack_bert_input

SCALE = 20.0  # of cosines, the inverse temperature of the released models


def prepare(
    example: dict, rng: np.random.Generator | None = None, *, length: int, cls_id: int, sep_id: int,
    pad_id: int = 0,
) -> dict[str, np.ndarray]:
    """`{"tokens", "tokens_b"}`, two texts that belong together, as a row: tokens int32 and
    padding_mask bool `[2, length]`."""
    del rng
    sides = [pack_bert_input(example[name], length=length, cls_id=cls_id, sep_id=sep_id, pad_id=pad_id)
             for name in ("tokens", "tokens_b")]
    return {**{name: np.stack([side[name] for side in sides])
               for name in ("tokens", "padding_mask")}, "weights": np.float32(1)}


def embed(
    hidden: Float[Array, "B T D"], padding_mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    """A text's embedding: the mean of its tokens' states, of length 1."""
    mean = mean_pool(hidden, padding_mask)
    return mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """Sum over pairs of -log P(second text | first), among the second texts of the batch, in nats.

    It depends on what else is in the batch: compare it between equal batches only. The metric is
    the share of pairs whose own partner is the nearest.
    """
    B, _, T = batch["tokens"].shape
    mask = batch["padding_mask"].reshape(2 * B, T)
    hidden = apply({"params": params}, batch["tokens"].reshape(2 * B, T), padding_mask=mask,
                   method="hidden", **dropout(rng)).hidden
    embeddings = embed(hidden.astype(jnp.float32), mask).reshape(B, 2, -1)
    scores = SCALE * embeddings[:, 0] @ embeddings[:, 1].T
    scores = jnp.where(batch["weights"][None] > 0, scores, jnp.finfo(jnp.float32).min)
    own = jnp.arange(B)
    total, weight = weighted_sum(cross_entropy(scores, own), batch["weights"])
    return total, weight, {"accuracy": weighted_sum(top1_correct(scores, own), batch["weights"])}
