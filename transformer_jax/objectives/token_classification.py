"""Token classification: one class per word, as for named entities or parts of speech.

BERT paper, section 5.3. A word of several subwords is labeled, and predicted, at one of them.

Batch keys:

| key            | dtype   | shape    | meaning                                                    |
|----------------|---------|----------|------------------------------------------------------------|
| `tokens`       | int32   | `[B, T]` | token ids of the words, with special tokens                |
| `padding_mask` | bool    | `[B, T]` | True at tokens, False at padding                           |
| `labels`       | int32   | `[B, T]` | class of the word, at its labeled subword; 0 elsewhere     |
| `weights`      | float32 | `[B, T]` | 1 at labeled subwords, 0 elsewhere                         |

Shape suffixes: B batch, T length, C classes.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.objectives.cross_entropy import (
    SumAndWeight,
    cross_entropy,
    dropout_kwargs,
    top1_correct,
    weighted_sum,
)


def subword_ids(
    words: Sequence[str], tokenizer: Any, add_prefix_space: bool = False
) -> list[list[int]]:
    """Tokenizes each word of a text by itself.

    Args:
        words: the words of the text.
        tokenizer: a `data.Tokenizer`.
        add_prefix_space: put a space in front of all words but the first, for byte-level BPE,
            whose tokens include the space.

    Returns:
        The subword ids of each word.

    Raises:
        ValueError: a word has no tokens.
    """
    texts = [(" " if add_prefix_space and i else "") + word for i, word in enumerate(words)]
    ids = tokenizer.encode_batch(texts)
    for word, word_ids in zip(words, ids):
        if not word_ids:
            raise ValueError(f"the word {word!r} has no tokens; remove it and its tag")
    return ids


def prepare(
    example: dict, rng: np.random.Generator | None = None, *, length: int, num_classes: int,
    cls_id: int | None, sep_id: int | None, pad_id: int = 0, label_last_subword: bool = False,
) -> dict[str, np.ndarray]:
    """Converts the words of a text with their tags to one row.

    Args:
        example: `{"words": subword ids of each word, "tags": class of each word}`.
        rng: unused.
        length: length T of the row.
        num_classes: tags are in `[0, num_classes)`.
        cls_id, sep_id: tokens at the start and the end of the row; None for no such token (GPT).
        pad_id: id at padding.
        label_last_subword: label the last subword of each word instead of the first. Use it for
            causal models, where only the last subword attends to the entire word.

    Returns:
        tokens, labels int32, padding_mask bool and weights float32, each `[T]`.

    Raises:
        ValueError: words and tags differ in number, a word has no tokens, a tag is not a class, or
            the text does not fit. Texts are not truncated, because words would lose their tags.

    Example:
        >>> row = prepare({"words": [[7], [8, 9]], "tags": [2, 1]}, length=6, num_classes=3,
        ...               cls_id=1, sep_id=2)
        >>> row["tokens"].tolist(), row["labels"].tolist(), row["weights"].tolist()
        ([1, 7, 8, 9, 2, 0], [0, 2, 1, 0, 0, 0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    """
    del rng
    word_ids, labels = example["words"], np.asarray(example["tags"], np.int32)
    if not len(word_ids) or len(word_ids) != len(labels):
        raise ValueError(f"a text has {len(word_ids)} words and {len(labels)} tags; give one tag "
                         "for each word, and at least one word")
    empty = [i for i, ids in enumerate(word_ids) if not len(ids)]
    if empty:
        raise ValueError(f"word {empty[0]} has no tokens; remove it and its tag")
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.size:
        raise ValueError(f"tag {outside[0]} is outside the {num_classes} classes 0 to "
                         f"{num_classes - 1}; fix the data or raise num_classes")
    prefix = [] if cls_id is None else [cls_id]
    suffix = [] if sep_id is None else [sep_id]
    ids = [*prefix, *itertools.chain.from_iterable(word_ids), *suffix]
    if len(ids) > length:
        raise ValueError(f"a text of {len(word_ids)} words has {len(ids)} tokens, more than the "
                         f"row's {length}; raise the length, or split the text")
    num_subwords = np.array([len(ids) for ids in word_ids], np.int64)
    positions = len(prefix) + np.cumsum(num_subwords) - (1 if label_last_subword else num_subwords)
    row = {"tokens": np.full(length, pad_id, np.int32), "labels": np.zeros(length, np.int32),
           "weights": np.zeros(length, np.float32), "padding_mask": np.arange(length) < len(ids)}
    row["tokens"][: len(ids)] = ids
    row["labels"][positions] = labels
    row["weights"][positions] = 1
    return row


def _token_logits(apply, params, batch, rng) -> Float[Array, "B T C"]:
    return apply({"params": params}, batch["tokens"], padding_mask=batch["padding_mask"],
                 method="token_classification_logits", **dropout_kwargs(rng))


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The sum over words of -log P(tag), in nats, and the number of words.

    Args:
        apply, params, batch, rng: see `transformer_jax.objectives`.

    Returns:
        `(sum, weight, metrics)` with the metric "accuracy" of the words.
    """
    logits_BTC = _token_logits(apply, params, batch, rng)
    total, weight = weighted_sum(cross_entropy(logits_BTC, batch["labels"]), batch["weights"])
    accuracy = weighted_sum(top1_correct(logits_BTC, batch["labels"]), batch["weights"])
    return total, weight, {"accuracy": accuracy}


def predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """The class probabilities of every token.

    Returns:
        probabilities `[B, T, C]`; word_mask bool `[B, T]`, True at labeled subwords.
    """
    return {"probabilities": jax.nn.softmax(_token_logits(apply, params, batch, None)),
            "word_mask": jnp.asarray(batch["weights"]) > 0}


def word_predictions(
    probabilities: Float[np.ndarray, "T C"], word_mask: Bool[np.ndarray, "T"]
) -> Int[np.ndarray, "words"]:
    """The predicted class of each word of one text, in order, from one row of `predict`.

    Example:
        >>> probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4]])
        >>> word_predictions(probabilities, np.array([False, True, True])).tolist()
        [1, 0]
    """
    return np.asarray(probabilities)[np.asarray(word_mask, bool)].argmax(-1)
