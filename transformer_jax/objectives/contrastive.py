"""Contrastive learning of sentence embeddings with in-batch negatives.

The loss is InfoNCE over cosine similarities, known as the multiple-negatives ranking loss: the
cross-entropy of classifying, for each first text, which second text of the batch belongs to it.

- Henderson et al. 2017, "Efficient Natural Language Response Suggestion", section 4.4: the other
  pairs of the batch as negatives.
- Reimers & Gurevych 2019, "Sentence-BERT", section 3: the mean of the hidden states as embedding.

Checkpoints such as all-MiniLM-L6-v2 were trained with this loss, so its increase during fine-tuning
measures how much of the pre-training task such a model forgets.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Key

from transformer_jax.models.heads import mean_pool
from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout_kwargs, token_losses
from transformer_jax.objectives.input_format import pack_bert_input, stack_rows

INVERSE_TEMPERATURE = 20.0  # multiplies the cosine similarities, as in the released models


def prepare(
    example: dict, rng: np.random.Generator | None = None, **options
) -> dict[str, np.ndarray]:
    """Converts a pair of related texts, `{"tokens": ids, "tokens_b": ids}`, to one row.

    `options` are those of `input_format.pack_bert_input`; `length` is that of each text with its
    special tokens.

    Example:
        >>> row = prepare({"tokens": [7], "tokens_b": [8, 9]}, length=4, cls_id=1, sep_id=2)
        >>> row["tokens"].tolist()
        [[1, 7, 2, 0], [1, 8, 9, 2]]
    """
    rows = [pack_bert_input(example[name], **options) for name in ("tokens", "tokens_b")]
    row = stack_rows(rows)
    return {"tokens": row["tokens"], "padding_mask": row["padding_mask"], "weights": np.float32(1)}


def sentence_embeddings(
    hidden_BTD: Float[Array, "B T D"], padding_mask_BT: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    """The mean of the hidden states of each text's tokens, normalized to unit length.

    Example:
        >>> hidden = jnp.array([[[3.0, 4.0], [9.0, 9.0]]])
        >>> print(sentence_embeddings(hidden, jnp.array([[True, False]])).round(3))
        [[0.6 0.8]]
    """
    mean_BD = mean_pool(hidden_BTD, padding_mask_BT)
    return mean_BD / jnp.maximum(jnp.linalg.norm(mean_BD, axis=-1, keepdims=True), 1e-12)


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The sum over pairs of -log P(second text | first text), in nats, and the number of pairs.

    P is a softmax over the second texts of the batch. Unlike other losses, it depends on the
    composition of the batch; compare values only between equal batches. The metric "accuracy" is
    the fraction of first texts whose own second text is the most similar one.
    """
    B, _, T = batch["tokens"].shape
    padding_mask = batch["padding_mask"].reshape(2 * B, T)
    hidden = apply({"params": params}, batch["tokens"].reshape(2 * B, T),
                   padding_mask=padding_mask, method="encode", **dropout_kwargs(rng)).hidden
    embeddings = sentence_embeddings(hidden.astype(jnp.float32), padding_mask).reshape(B, 2, -1)
    logits_BB = INVERSE_TEMPERATURE * embeddings[:, 0] @ embeddings[:, 1].T
    logits_BB = jnp.where(batch["weights"][None] > 0, logits_BB, jnp.finfo(jnp.float32).min)
    total, weight, metrics = token_losses(logits_BB, jnp.arange(B), batch["weights"])
    return total, weight, {"accuracy": metrics["accuracy"]}
