"""Classification and regression of texts, multiple choice, and classification of words.

Each task has three functions: `prepare_<task>` on the host, `<task>_loss` and `<task>_predict` on
the device. `TASK_TYPES` collects them, together with those of `question_answering`. Examples
contain token ids, not strings.

Three options follow the GPT paper (Radford et al. 2018, section 3.3): start, delimiter and extract
tokens (`input_format.SpecialTokens`), pairs in both orders for symmetric tasks (`both_orders`), and
an auxiliary language modeling loss (`aux_lm_loss_weight`, section 3.2).

Shape suffixes: B batch, T length, D d_model, C classes or choices.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from transformer_jax.models import GPT
from transformer_jax.models.heads import gather_positions, last_token_positions
from transformer_jax.objectives import question_answering
from transformer_jax.objectives.cross_entropy import (
    LossTerms,
    SumAndWeight,
    dropout_kwargs,
    token_losses,
    weighted_sum,
)
from transformer_jax.objectives.input_format import pad, stack_rows


def _pack_texts(example: dict, pack_input: Callable, both_orders: bool) -> dict[str, np.ndarray]:
    """One row, or with `both_orders` two rows stacked along a new first axis."""
    texts = [example[key] for key in ("tokens", "tokens_b") if key in example]
    if not both_orders:
        return pack_input(*texts)
    if len(texts) != 2:
        raise ValueError("both_orders is True, but the example has only one text; pass "
                         "both_orders=False, or add a second text as \"tokens_b\"")
    return stack_rows([pack_input(*texts), pack_input(*texts[::-1])])


def _check_labels(name: str, labels: Sequence[int], num_classes: int, kind: str = "classes"):
    outside = [label for label in labels if not 0 <= label < num_classes]
    if outside:
        raise ValueError(f"{name} {outside[0]} is outside the {num_classes} {kind} 0 to "
                         f"{num_classes - 1}; fix the data"
                         + (" or raise num_classes" if kind == "classes" else ""))


# Classification of texts and multiple choice ------------------------------------------------------


def prepare_classification(
    example: dict, rng: np.random.Generator | None = None, *, pack_input: Callable,
    num_classes: int, both_orders: bool = False,
) -> dict[str, np.ndarray]:
    """Converts a text or a pair with its class to one row.

    The example is `{"tokens": ids, "label": class}`, for a pair also with `"tokens_b": ids`.
    `pack_input` formats the texts (`input_format.make_input_packer`). With `both_orders`, for GPT
    only, a pair is formatted twice, as (a, b) and (b, a).

    Raises:
        ValueError: the label is not a class, or `both_orders` without a second text.
    """
    label = int(example["label"])
    _check_labels("label", [label], num_classes)
    return {**_pack_texts(example, pack_input, both_orders), "labels": np.int32(label),
            "weights": np.float32(1)}


def prepare_multiple_choice(
    example: dict, rng: np.random.Generator | None = None, *, pack_input: Callable,
    num_choices: int,
) -> dict[str, np.ndarray]:
    """Converts a text with C choices to C rows, the text paired with each choice.

    The example is `{"tokens": ids, "choices": list of ids, "label": index of the correct choice}`;
    without "tokens", each choice is a row by itself. Examples with fewer choices than `num_choices`
    are padded with rows of zeros. ValueError for fewer than 2 or more than `num_choices` choices,
    or a label that is not the index of a choice.
    """
    choices, label = example["choices"], int(example["label"])
    if not 2 <= len(choices) <= num_choices:
        raise ValueError(f"an example has {len(choices)} choices; it must have 2 to num_choices = "
                         f"{num_choices}")
    _check_labels("label", [label], len(choices), "choices")
    text = example.get("tokens", ())
    rows = [pack_input(text, choice) if len(text) else pack_input(choice) for choice in choices]
    rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (num_choices - len(rows))
    return {**stack_rows(rows), "choices": np.arange(num_choices) < len(choices),
            "labels": np.int32(label), "weights": np.float32(1)}


def classification_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[LossTerms, LossTerms, dict[str, SumAndWeight]]:
    """The sum over examples of -log P(label), in nats, and the number of examples.

    For multiple choice (batches with "choices"), P is a softmax over one logit per choice (GPT
    paper, section 3.3; BERT paper, section 4.4), from a model with one class.

    The metric is "accuracy". With `aux_lm_loss_weight`, sum and weight are dicts with the terms
    "task" and "lm", and the metric "lm_nats" is the language modeling loss, not multiplied by
    lambda.

    Args:
        apply, params, batch, rng: see `transformer_jax.objectives`.
        aux_lm_loss_weight: lambda of the auxiliary language modeling loss: the loss is the mean
            task loss plus lambda times the mean of -log P(next token) over the same rows (GPT
            paper, section 3.2, L3).
        vocab_size: size of the vocabulary without new special tokens, which are not targets of the
            language modeling loss; None uses the vocabulary size of the model.

    Raises:
        ValueError: `both_orders` or `aux_lm_loss_weight` with a model other than GPT.
    """
    logits_BC, lm_loss = _class_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight, metrics = token_losses(logits_BC, batch["labels"], batch["weights"])
    return _add_lm_term(total, weight, {"accuracy": metrics["accuracy"]}, lm_loss,
                        aux_lm_loss_weight)


def classification_predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """The probabilities of the classes or choices `{"probabilities": [B, C]}`."""
    return {"probabilities": jax.nn.softmax(_class_logits(apply, params, batch)[0])}


def _class_logits(apply, params, batch, rng=None, aux_lm_loss_weight=0.0, vocab_size=None):
    """The class logits `[B, C]`, and `(sum, weight)` of the language modeling loss or None.

    The features of both orders, rows `[B, 2, T]`, are added (GPT paper, figure 1). The logit of a
    choice is the single class logit of its row.
    """
    if "choices" not in batch:
        num_orders = batch["tokens"].shape[1] if batch["tokens"].ndim == 3 else 1
        return _row_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size, num_orders)
    logits, lm_loss = _row_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size, 1)
    logits_BC = logits.reshape(batch["choices"].shape)
    return jnp.where(batch["choices"], logits_BC, jnp.finfo(jnp.float32).min), lm_loss


def _row_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size, num_orders):
    """`_class_logits` of every `num_orders` rows."""
    tokens = batch["tokens"]
    inputs = {name: batch[name].reshape(-1, batch[name].shape[-1])
              for name in ("segment_ids", "padding_mask") if name in batch}
    if "padding_mask" not in inputs and num_orders > 1:
        # `finetuning.frozen` replaces the tokens by features, which have no padding mask.
        tokens, num_orders = tokens.sum(1), 1
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if num_orders == 1 and not aux_lm_loss_weight:
        return apply({"params": params}, tokens, method="classification_logits", **inputs,
                     **dropout_kwargs(rng)), None

    def class_and_lm_logits(model, tokens, deterministic):
        if not isinstance(model, GPT):
            raise ValueError(f"both_orders and aux_lm_loss_weight require GPT, but the model is a "
                             f"{type(model).__name__}; omit both options")
        padding_mask = inputs["padding_mask"]
        hidden = model.decode(tokens, padding_mask=padding_mask, deterministic=deterministic).hidden
        positions = last_token_positions(tokens, padding_mask)[:, None]
        features_BD = gather_positions(hidden, positions)[:, 0]
        features_BD = features_BD.reshape(-1, num_orders, features_BD.shape[-1]).sum(1)
        logits_BC = model.logits_from_features(features_BD, deterministic)
        return logits_BC, model.lazy_lm_logits(hidden[:, :-1]) if aux_lm_loss_weight else None

    logits_BC, lazy_logits = apply({"params": params}, tokens, method=class_and_lm_logits,
                                   **dropout_kwargs(rng))
    if not aux_lm_loss_weight:
        return logits_BC, None
    targets = tokens[:, 1:]
    is_target = inputs["padding_mask"][:, 1:] & (
        targets < (vocab_size or len(lazy_logits.embedding)))
    is_real_row = jnp.repeat(batch["weights"] > 0, len(tokens) // len(batch["weights"]))
    return logits_BC, token_losses(lazy_logits, jnp.where(is_target, targets, 0),
                                   is_target & is_real_row[:, None])[:2]


def _add_lm_term(total, weight, metrics, lm_loss, aux_lm_loss_weight):
    """`(sum, weight, metrics)` of the task, with the term "lm" if there is a `lm_loss`."""
    if lm_loss is None:
        return total, weight, metrics
    lm_sum, num_targets = lm_loss
    return ({"task": total, "lm": aux_lm_loss_weight * lm_sum},
            {"task": weight, "lm": num_targets}, metrics | {"lm_nats": lm_loss})


# Regression ---------------------------------------------------------------------------------------


def prepare_regression(
    example: dict, rng: np.random.Generator | None = None, *, pack_input: Callable,
    label_range: tuple[float, float], both_orders: bool = False,
) -> dict[str, np.ndarray]:
    """Converts a text or a pair with its score to one row, as `prepare_classification`.

    `label_range`, the lowest and the highest label, is mapped to the range 0 to 1. ValueError if it
    is empty, or a label is not finite.
    """
    low, high = label_range
    label = float(example["label"])
    if not low < high:
        raise ValueError(f"label_range is {low} to {high}; the lowest label must come first")
    if not np.isfinite(label):
        raise ValueError(f"label {label} is not a finite number; fix the data")
    return {**_pack_texts(example, pack_input, both_orders), "weights": np.float32(1),
            "labels": np.float32((label - low) / (high - low))}


def regression_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[LossTerms, LossTerms, dict[str, SumAndWeight]]:
    """The sum over examples of the squared error, and the number of examples.

    The prediction is the single logit of a model with one class; labels are scaled to 0 to 1.
    Options as for `classification_loss`; the metric is "squared_error".
    """
    logits_BC, lm_loss = _class_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight = weighted_sum(jnp.square(logits_BC[:, 0] - batch["labels"]), batch["weights"])
    return _add_lm_term(total, weight, {"squared_error": (total, weight)}, lm_loss,
                        aux_lm_loss_weight)


def regression_predict(
    apply: Callable, params: dict, batch: dict[str, Array], *,
    label_range: tuple[float, float] = (0.0, 1.0),
) -> dict:
    """The predicted scores `{"scores": [B]}`, mapped from [0, 1] to `label_range`."""
    low, high = label_range
    return {"scores": low + (high - low) * _class_logits(apply, params, batch)[0][:, 0]}


# Classification of words (BERT paper, section 5.3) ------------------------------------------------


def subword_ids(
    words: Sequence[str], tokenizer: Any, add_prefix_space: bool = False
) -> list[list[int]]:
    """Tokenizes each word of a text by itself; ValueError for a word without tokens.

    With `add_prefix_space`, all words but the first get a space in front, for byte-level BPE, whose
    tokens include the space.
    """
    texts = [(" " if add_prefix_space and i else "") + word for i, word in enumerate(words)]
    ids = tokenizer.encode_batch(texts)
    for word, word_ids in zip(words, ids):
        if not word_ids:
            raise ValueError(f"the word {word!r} has no tokens; remove it and its tag")
    return ids


def prepare_token_classification(
    example: dict, rng: np.random.Generator | None = None, *, length: int, num_classes: int,
    cls_id: int | None, sep_id: int | None, pad_id: int = 0, label_last_subword: bool = False,
) -> dict[str, np.ndarray]:
    """Converts the words of a text with their tags to one row.

    The example is `{"words": subword ids of each word, "tags": class of each word}`. `cls_id` and
    `sep_id` are at the start and the end of the row, None for no such token (GPT). With
    `label_last_subword`, the last subword of each word is labeled instead of the first: in causal
    models, only the last one attends to the entire word.

    Raises:
        ValueError: words and tags differ in number, a word has no tokens, a tag is not a class, or
            the text does not fit. Texts are not truncated, because words would lose their tags.

    Example:
        >>> row = prepare_token_classification({"words": [[7], [8, 9]], "tags": [2, 1]}, length=6,
        ...                                    num_classes=3, cls_id=1, sep_id=2)
        >>> row["tokens"].tolist(), row["labels"].tolist(), row["weights"].tolist()
        ([1, 7, 8, 9, 2, 0], [0, 2, 1, 0, 0, 0], [0.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    """
    word_ids, tags = example["words"], np.asarray(example["tags"], np.int32)
    if not len(word_ids) or len(word_ids) != len(tags):
        raise ValueError(f"a text has {len(word_ids)} words and {len(tags)} tags; give one tag "
                         "for each word, and at least one word")
    num_subwords = np.array([len(ids) for ids in word_ids], np.int64)
    if not num_subwords.all():
        raise ValueError(f"word {num_subwords.argmin()} has no tokens; remove it and its tag")
    _check_labels("tag", tags, num_classes)
    prefix = [] if cls_id is None else [cls_id]
    suffix = [] if sep_id is None else [sep_id]
    ids = [*prefix, *itertools.chain.from_iterable(word_ids), *suffix]
    if len(ids) > length:
        raise ValueError(f"a text of {len(word_ids)} words has {len(ids)} tokens, more than the "
                         f"row's {length}; raise the length, or split the text")
    positions = len(prefix) + np.cumsum(num_subwords) - (1 if label_last_subword else num_subwords)
    labels, weights = np.zeros(length, np.int32), np.zeros(length, np.float32)
    labels[positions], weights[positions] = tags, 1
    return {"tokens": pad(ids, length, pad_id), "padding_mask": np.arange(length) < len(ids),
            "labels": labels, "weights": weights}


def _token_logits(apply, params, batch, rng=None) -> Float[Array, "B T C"]:
    return apply({"params": params}, batch["tokens"], padding_mask=batch["padding_mask"],
                 method="token_classification_logits", **dropout_kwargs(rng))


def token_classification_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The sum over words of -log P(tag), in nats, and the number of words; the metric "accuracy".

    A word of several subwords is labeled, and predicted, at one of them.
    """
    total, weight, metrics = token_losses(
        _token_logits(apply, params, batch, rng), batch["labels"], batch["weights"])
    return total, weight, {"accuracy": metrics["accuracy"]}


def token_classification_predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """The class probabilities `[B, T, C]` of every token, and word_mask bool `[B, T]`, True at the
    labeled subwords: `probabilities[word_mask].argmax(-1)` are the predicted classes of words."""
    return {"probabilities": jax.nn.softmax(_token_logits(apply, params, batch)),
            "word_mask": jnp.asarray(batch["weights"]) > 0}


# Task types ---------------------------------------------------------------------------------------


class TaskType(NamedTuple):
    """The functions `prepare(example, rng, **options)`, `loss(apply, params, batch, rng)` and
    `predict(apply, params, batch)` of one type of labeled task, and the name of the model's head,
    which is the argument `task` of `models.build_model`."""

    task: str
    prepare: Callable
    loss: Callable
    predict: Callable


TASK_TYPES = {
    "classification": TaskType(
        "classification", prepare_classification, classification_loss, classification_predict),
    "regression": TaskType(
        "classification", prepare_regression, regression_loss, regression_predict),
    "multiple_choice": TaskType(
        "multiple_choice", prepare_multiple_choice, classification_loss, classification_predict),
    "token_classification": TaskType(
        "token_classification", prepare_token_classification, token_classification_loss,
        token_classification_predict),
    "question_answering": TaskType(
        "question_answering", question_answering.prepare, question_answering.loss,
        question_answering.predict),
}
"""The functions of each task type, by the name that `data.LabeledDataset.task_type` uses."""
