"""Tasks on whole texts: classification, regression and multiple choice.

Each task has three functions: `prepare_<task>` on the host, `<task>_loss` and `<task>_predict` on
the device. `TASK_TYPES` collects them, together with those of `token_classification` and
`question_answering`. Examples contain token ids, not strings.

Three options follow the GPT paper (Radford et al. 2018, section 3.3): start, delimiter and extract
tokens (`SpecialTokens`), pairs in both orders for symmetric tasks (`both_orders`), and an auxiliary
language modeling loss (`aux_lm_loss_weight`, section 3.2).

Batch keys (R is absent for single rows, 2 with `both_orders`, C for multiple choice; `labels` of
regression are float32, scaled to 0 to 1):

| key            | dtype   | shape       | meaning                                                 |
|----------------|---------|-------------|---------------------------------------------------------|
| `tokens`       | int32   | `[B, R, T]` | token ids of the text or pair, with special tokens      |
| `segment_ids`  | int32   | `[B, R, T]` | 1 at the second text (BERT format), else 0              |
| `padding_mask` | bool    | `[B, R, T]` | True at tokens, False at padding                        |
| `labels`       | int32   | `[B]`       | class, or index of the correct choice                   |
| `choices`      | bool    | `[B, C]`    | multiple choice only: False at choices that are padding |
| `weights`      | float32 | `[B]`       | 1; 0 for rows of padding                                |

Shape suffixes: B batch, T length, D d_model, C classes or choices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Key

from transformer_jax.models import BERT, GPT, Transformer
from transformer_jax.models.heads import gather_positions, last_token_positions
from transformer_jax.objectives import question_answering, token_classification
from transformer_jax.objectives.cross_entropy import (
    LossTerms,
    SumAndWeight,
    cross_entropy,
    dropout_kwargs,
    token_losses,
    top1_correct,
    weighted_sum,
)
from transformer_jax.objectives.input_format import pack_bert_input, pack_gpt_input


class SpecialTokens(NamedTuple):
    """Ids of the special tokens of GPT's input format (`input_format.pack_gpt_input`).

    Ids of `vocab_size` or more refer to embeddings that `finetuning.peft.add_tokens` adds.
    """

    start_id: int | None
    delimiter_id: int | None
    extract_id: int

    @classmethod
    def append_to_vocab(cls, vocab_size: int) -> "SpecialTokens":
        """Three new tokens with the ids after the vocabulary, as in the GPT paper.

        Example:
            >>> SpecialTokens.append_to_vocab(100)
            SpecialTokens(start_id=100, delimiter_id=101, extract_id=102)
        """
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


def make_input_packer(
    model: GPT | BERT | Transformer, tokenizer: Any, length: int,
    special_tokens: SpecialTokens | None = None,
) -> Callable:
    """Returns the function `pack_input(a, b=None)` that formats one text or a pair for a model.

    Args:
        model: GPT uses `input_format.pack_gpt_input`; BERT and BART use `pack_bert_input`.
        tokenizer: provides the ids of the special tokens.
        length: length T of the rows.
        special_tokens: for GPT only. None: the only special token is the extract token, for which
            the end-of-text token of the tokenizer is used.

    Returns:
        `input_format.pack_gpt_input` or `pack_bert_input` with all options bound.
    """
    if isinstance(model, GPT):
        s = special_tokens or SpecialTokens(None, None, tokenizer.eos_id)
        return functools.partial(pack_gpt_input, length=length, start_id=s.start_id,
                                 delimiter_id=s.delimiter_id, extract_id=s.extract_id)
    return functools.partial(pack_bert_input, length=length, cls_id=tokenizer.cls_id,
                             sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id)


def _pack_texts(example: dict, pack_input: Callable, both_orders: bool) -> dict[str, np.ndarray]:
    """One row, or with `both_orders` two rows stacked along a new first axis."""
    texts = [example[key] for key in ("tokens", "tokens_b") if key in example]
    if not both_orders:
        return pack_input(*texts)
    if len(texts) != 2:
        raise ValueError("both_orders is True, but the example has only one text; pass "
                         "both_orders=False, or add a second text as \"tokens_b\"")
    rows = [pack_input(*texts), pack_input(*texts[::-1])]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


# Classification -----------------------------------------------------------------------------------


def prepare_classification(
    example: dict, rng: np.random.Generator | None = None, *, pack_input: Callable,
    num_classes: int, both_orders: bool = False,
) -> dict[str, np.ndarray]:
    """Converts a text or a pair with its class to one row.

    Args:
        example: `{"tokens": ids, "label": class}`, for a pair also `"tokens_b": ids`.
        rng: unused.
        pack_input: formats the texts, see `make_input_packer`.
        num_classes: labels are in `[0, num_classes)`.
        both_orders: format a pair twice, as (a, b) and (b, a), for GPT only.

    Returns:
        The arrays of `pack_input`, each `[T]` or with `both_orders` `[2, T]`; labels int32 and
        weights float32 `[]`.

    Raises:
        ValueError: the label is not a class, or `both_orders` without a second text.

    Example:
        >>> pack_input = functools.partial(pack_bert_input, length=5, cls_id=1, sep_id=2)
        >>> row = prepare_classification(
        ...     {"tokens": [7, 8], "label": 1}, pack_input=pack_input, num_classes=2)
        >>> row["tokens"].tolist(), int(row["labels"])
        ([1, 7, 8, 2, 0], 1)
    """
    del rng
    label = int(example["label"])
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} is outside the {num_classes} classes 0 to "
                         f"{num_classes - 1}; fix the data or raise num_classes")
    return {**_pack_texts(example, pack_input, both_orders), "labels": np.int32(label),
            "weights": np.float32(1)}


def classification_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[LossTerms, LossTerms, dict[str, SumAndWeight]]:
    """The sum over examples of -log P(label), in nats, and the number of examples.

    Args:
        apply, params, batch, rng: see `transformer_jax.objectives`.
        aux_lm_loss_weight: lambda of the auxiliary language modeling loss (GPT only): the loss is
            the mean task loss plus lambda times the mean of -log P(next token) over the same rows
            (GPT paper, section 3.2, L3).
        vocab_size: size of the vocabulary without new special tokens, which are not targets of the
            language modeling loss; None uses the vocabulary size of the model.

    Returns:
        `(sum, weight, metrics)` with the metric "accuracy". With `aux_lm_loss_weight`, sum and
        weight are dicts with the terms "task" and "lm", and the metric "lm_nats" is the language
        modeling loss, not multiplied by lambda.

    Raises:
        ValueError: `both_orders` or `aux_lm_loss_weight` with a model other than GPT.
    """
    logits_BC, lm_loss = _class_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight = weighted_sum(cross_entropy(logits_BC, batch["labels"]), batch["weights"])
    metrics = {"accuracy": weighted_sum(top1_correct(logits_BC, batch["labels"]),
                                        batch["weights"])}
    return _add_lm_term(total, weight, metrics, lm_loss, aux_lm_loss_weight)


def classification_predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """The class probabilities `{"probabilities": [B, C]}`."""
    return {"probabilities": jax.nn.softmax(_class_logits(apply, params, batch, None)[0])}


def _class_logits(
    apply, params, batch, rng, aux_lm_loss_weight=0.0, vocab_size=None, num_orders=None
):
    """The class logits `[B, C]`, and (sum, weight) of the language modeling loss or None.

    The features of both orders, rows `[B, 2, T]`, are added (GPT paper, figure 1). With
    `num_orders=1`, the R rows `[B, R, T]` of an example are classified independently and the logits
    are `[B * R, C]`.
    """
    tokens = batch["tokens"]
    num_orders = num_orders or (tokens.shape[1] if tokens.ndim == 3 else 1)
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
    lm_loss, _ = token_losses(lazy_logits.logits(), lazy_logits, jnp.where(is_target, targets, 0),
                              is_target & is_real_row[:, None])
    return logits_BC, lm_loss


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
    """Converts a text or a pair with its score to one row.

    Arguments and result are as for `prepare_classification`, but "label" is a number, and labels
    are float32: `label_range`, the lowest and the highest label, is mapped to the range 0 to 1.

    Raises:
        ValueError: the label is not finite, the range is empty, or `both_orders` without a second
            text.
    """
    del rng
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
    return {"scores": low + (high - low) * _class_logits(apply, params, batch, None)[0][:, 0]}


# Multiple choice ----------------------------------------------------------------------------------


def prepare_multiple_choice(
    example: dict, rng: np.random.Generator | None = None, *, pack_input: Callable,
    num_choices: int,
) -> dict[str, np.ndarray]:
    """Converts a text with C choices to C rows, the text paired with each choice.

    Args:
        example: `{"tokens": ids, "choices": list of ids, "label": index of the correct choice}`.
            Without "tokens", each choice is a row by itself.
        rng: unused.
        pack_input: formats the text and a choice, see `make_input_packer`.
        num_choices: C. Examples with fewer choices are padded with rows of zeros.

    Returns:
        The arrays of `pack_input`, each `[C, T]`; choices bool `[C]`, False at padding; labels
        int32 and weights float32 `[]`.

    Raises:
        ValueError: fewer than 2 or more than `num_choices` choices, or the label is not the index
            of a choice.

    Example:
        >>> pack_input = functools.partial(pack_bert_input, length=6, cls_id=1, sep_id=2)
        >>> example = {"tokens": [7], "choices": [[8], [9]], "label": 1}
        >>> prepare_multiple_choice(example, pack_input=pack_input, num_choices=2)["tokens"]
        array([[1, 7, 2, 8, 2, 0],
               [1, 7, 2, 9, 2, 0]], dtype=int32)
    """
    del rng
    choices, label = example["choices"], int(example["label"])
    if not 2 <= len(choices) <= num_choices:
        raise ValueError(f"an example has {len(choices)} choices; it must have 2 to num_choices = "
                         f"{num_choices}")
    if not 0 <= label < len(choices):
        raise ValueError(f"label {label} is outside the {len(choices)} choices 0 to "
                         f"{len(choices) - 1}; fix the data")
    text = example.get("tokens", ())
    rows = [pack_input(text, choice) if len(text) else pack_input(choice) for choice in choices]
    rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (num_choices - len(rows))
    return {**{name: np.stack([row[name] for row in rows]) for name in rows[0]},
            "choices": np.arange(num_choices) < len(choices), "labels": np.int32(label),
            "weights": np.float32(1)}


def _choice_logits(apply, params, batch, rng, aux_lm_loss_weight=0.0, vocab_size=None):
    """The logits `[B, C]` of the choices, and the same language modeling loss as `_class_logits`.

    The logit of a choice is the single class logit of its row.
    """
    logits, lm_loss = _class_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size,
                                    num_orders=1)
    logits_BC = logits.reshape(batch["choices"].shape)
    return jnp.where(batch["choices"], logits_BC, jnp.finfo(jnp.float32).min), lm_loss


def multiple_choice_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[LossTerms, LossTerms, dict[str, SumAndWeight]]:
    """The sum over examples of -log P(correct choice), in nats, and the number of examples.

    P is a softmax over one logit per choice (GPT paper, section 3.3; BERT paper, section 4.4), from
    a model with one class. Options and metrics as for `classification_loss`.
    """
    logits_BC, lm_loss = _choice_logits(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight = weighted_sum(cross_entropy(logits_BC, batch["labels"]), batch["weights"])
    metrics = {"accuracy": weighted_sum(top1_correct(logits_BC, batch["labels"]),
                                        batch["weights"])}
    return _add_lm_term(total, weight, metrics, lm_loss, aux_lm_loss_weight)


def multiple_choice_predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """The probabilities of the choices `{"probabilities": [B, C]}`."""
    return {"probabilities": jax.nn.softmax(_choice_logits(apply, params, batch, None)[0])}


# Task types ---------------------------------------------------------------------------------------


class TaskType(NamedTuple):
    """The functions of one type of labeled task.

    Attributes:
        task: name of the model's head, the argument `task` of `models.build_model`.
        prepare: `prepare(example, rng, **options)`, one example to one row, on the host.
        loss: `loss(apply, params, batch, rng)`, on the device.
        predict: `predict(apply, params, batch)`, on the device.
    """

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
        "multiple_choice", prepare_multiple_choice, multiple_choice_loss,
        multiple_choice_predict),
    "token_classification": TaskType(
        "token_classification", token_classification.prepare, token_classification.loss,
        token_classification.predict),
    "question_answering": TaskType(
        "question_answering", question_answering.prepare, question_answering.loss,
        question_answering.predict),
}
"""The functions of each task type, by the name that `data.LabeledDataset.task_type` uses."""
