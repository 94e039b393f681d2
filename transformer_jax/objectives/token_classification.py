"""A class for every word of a text: named entities, parts of speech (BERT paper, section 5.3)."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.objectives.cross_entropy import (
    SumAndWeight,
    cross_entropy,
    dropout,
    top1_correct,
    weighted_sum,
)


def subword_ids(words: Sequence[str], tokenizer: Any, space: bool = False) -> list[list[int]]:
    """The ids of each word. With `space` all words but the first begin with a space, as byte-level
    BPE wants.

    Raises:
        ValueError: a word gives no token.
    """
    texts = [(" " if space and i else "") + word for i, word in enumerate(words)]
    ids = tokenizer.encode_batch(texts)
    for word, row in zip(words, ids):
        if not row:
            raise ValueError(f"the word {word!r} gives no token; remove it and its tag")
    return ids


def prepare(
    example: dict, rng: np.random.Generator | None = None, *, length: int, num_classes: int,
    cls_id: int | None, sep_id: int | None, pad_id: int = 0, last_piece: bool = False,
) -> dict[str, np.ndarray]:
    """`{"words": ids of each word's pieces, "tags"}` as one row of a batch.

    A word is labelled at its first piece, or at its last with `last_piece`, the one that has seen
    all of the word in a causal model. All else has weight 0.

    Args:
        cls_id, sep_id: in front and at the end; None for none (GPT).

    Returns:
        tokens, labels int32 `[length]`, padding_mask bool, weights float32 `[length]`.

    Raises:
        ValueError: unlike numbers of words and tags, a word without tokens, a tag outside the
            classes, or a text longer than the row: cut it into sentences, since no word may be
            lost.
    """
    del rng
    words, labels = example["words"], np.asarray(example["tags"], np.int32)
    if not len(words) or len(words) != len(labels):
        raise ValueError(f"a text has {len(words)} words and {len(labels)} tags; give one for "
                         "each, and at least one")
    empty = [i for i, word in enumerate(words) if not len(word)]
    if empty:
        raise ValueError(f"word {empty[0]} has no tokens; remove it and its tag")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise ValueError(f"tag {outside[0]} is outside the {num_classes} classes 0 to "
                         f"{num_classes - 1}; mend the data")
    front = [] if cls_id is None else [cls_id]
    ids = [*front, *(i for word in words for i in word), *([] if sep_id is None else [sep_id])]
    if len(ids) > length:
        raise ValueError(f"a text of {len(words)} words has {len(ids)} tokens, more than the row's "
                         f"{length}; raise the length, or split the text")
    sizes = np.array([len(word) for word in words], np.int64)
    places = len(front) + np.cumsum(sizes) - (1 if last_piece else sizes)
    row = {"tokens": np.full(length, pad_id, np.int32), "labels": np.zeros(length, np.int32),
           "weights": np.zeros(length, np.float32), "padding_mask": np.arange(length) < len(ids)}
    row["tokens"][: len(ids)] = ids
    row["labels"][places] = labels
    row["weights"][places] = 1
    return row


def _scores(apply, params, batch, rng) -> Float[Array, "B T C"]:
    return apply({"params": params}, batch["tokens"], padding_mask=batch["padding_mask"],
                 method="token_classification_logits", **dropout(rng))


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """Sum over words of -log P(tag), in nats; its weight is the number of words."""
    logits = _scores(apply, params, batch, rng)
    total, weight = weighted_sum(cross_entropy(logits, batch["labels"]), batch["weights"])
    return total, weight, {"accuracy": weighted_sum(top1_correct(logits, batch["labels"]),
                                                batch["weights"])}


def predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """{"probabilities": `[B, T, C]`, "words": bool `[B, T]`, True where a word is labelled}."""
    return {"probabilities": jax.nn.softmax(_scores(apply, params, batch, None)),
            "words": jnp.asarray(batch["weights"]) > 0}


def word_predictions(
    probabilities: Float[np.ndarray, "T C"], words: Int[np.ndarray, "T"]
) -> Int[np.ndarray, "W"]:
    """The tags of a text's words, in order, from one row of `predict`."""
    return np.asarray(probabilities)[np.asarray(words, bool)].argmax(-1)
