"""Annotated tasks. For now classification of one text or of a pair."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jax import Array
from jaxtyping import Float, Key

from transformer_jax.models import BERT, GPT, Transformer
from transformer_jax.objectives.layout import bert_row, gpt_row
from transformer_jax.objectives.losses import Pair, correct, cross_entropy, dropout, weighted


def text_row(model: GPT | BERT | Transformer, tokenizer: Any, length: int) -> Callable:
    """How a family writes a text, or a pair, to classify as one row: `layout.gpt_row` or
    `layout.bert_row`, whose form BART shares, with the tokenizer's special tokens."""
    if isinstance(model, GPT):
        return functools.partial(gpt_row, length=length, extract_id=tokenizer.eos_id)
    return functools.partial(bert_row, length=length, cls_id=tokenizer.cls_id,
                             sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id)


def prepare_classification(
    example: dict, rng: np.random.Generator | None = None, *, row: Callable, num_classes: int
) -> dict[str, np.ndarray]:
    """`{"tokens", "label"}`, and "tokens_b" for a pair, as one row of a batch.

    Args:
        row: `layout.bert_row` or `layout.gpt_row` with length and special tokens filled in.

    Raises:
        ValueError: the label is not in `[0, num_classes)`.
    """
    del rng
    label = int(example["label"])
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} is outside the {num_classes} classes 0 to "
                         f"{num_classes - 1}; mend the data or raise num_classes")
    texts = [example[key] for key in ("tokens", "tokens_b") if key in example]
    return {**row(*texts), "labels": np.int32(label), "weights": np.float32(1)}


def classification_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, Pair]]:
    """Sum over examples of -log P(label), in nats; its weight is the number of examples."""
    logits = apply(
        {"params": params},
        batch["tokens"],
        segment_ids=batch.get("segment_ids"),
        padding_mask=batch.get("padding_mask"),
        method="classify",
        **dropout(rng),
    )
    total, weight = weighted(cross_entropy(logits, batch["labels"]), batch["weights"])
    return total, weight, {"accuracy": weighted(correct(logits, batch["labels"]), batch["weights"])}
