"""Annotated tasks on whole texts: classes, scores, and choices.

For each a `prepare` for the host, a loss and a prediction for the device, together in `TASKS` with
those of other files (`tags`, `spans`). Examples have ids in the place of texts.

The GPT paper's way (Radford et al. 2018, section 3.3) differs in three things, each an option here:
start, delimiter and extract tokens of its own (`Specials`), pairs in both orders where order means
nothing (`both_orders`), and the language model's loss beside the task's (`aux_lm_loss_weight`, section 3.2).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Key

from transformer_jax.models import BERT, GPT, Transformer
from transformer_jax.models.heads import gather_positions, last_token_positions
from transformer_jax.objectives import question_answering, token_classification
from transformer_jax.objectives.cross_entropy import (
    SumAndWeight,
    cross_entropy,
    dropout,
    token_losses,
    top1_correct,
    weighted_sum,
)
from transformer_jax.objectives.input_format import pack_bert_input, pack_gpt_input

Terms = Float[Array, ""] | dict[str, Float[Array, ""]]


class SpecialTokens(NamedTuple):
    """Ids of GPT's tokens around a text: ids from vocab_size on are rows that
    `finetune.deltas.add_tokens` makes."""

    start: int | None
    delimiter: int | None
    extract: int

    @classmethod
    def new(cls, vocab_size: int) -> "SpecialTokens":
        """Three new tokens after the vocabulary, as in the paper."""
        return cls(vocab_size, vocab_size + 1, vocab_size + 2)


def make_input_packer(
    model: GPT | BERT | Transformer, tokenizer: Any, length: int, specials: SpecialTokens | None = None
) -> Callable:
    """How a family writes a text, or a pair, as one row: `layout.gpt_row` or `layout.bert_row`,
    whose form BART shares, with the tokenizer's special tokens, or for GPT with `specials`."""
    if isinstance(model, GPT):
        s = specials or SpecialTokens(None, None, tokenizer.eos_id)
        return functools.partial(pack_gpt_input, length=length, start_id=s.start,
                                 delimiter_id=s.delimiter, extract_id=s.extract)
    return functools.partial(pack_bert_input, length=length, cls_id=tokenizer.cls_id,
                             sep_id=tokenizer.sep_id, pad_id=tokenizer.pad_id)


def _texts(example: dict, row: Callable, both_orders: bool) -> dict[str, np.ndarray]:
    texts = [example[key] for key in ("tokens", "tokens_b") if key in example]
    if not both_orders:
        return row(*texts)
    if len(texts) != 2:
        raise ValueError("both_orders needs two texts, and the example has one; leave it out")
    orders = [row(*texts), row(*texts[::-1])]
    return {name: np.stack([made[name] for made in orders]) for name in orders[0]}


# Classes ------------------------------------------------------------------------------------------


def prepare_classification(
    example: dict, rng: np.random.Generator | None = None, *, row: Callable, num_classes: int,
    both_orders: bool = False,
) -> dict[str, np.ndarray]:
    """`{"tokens", "label"}`, and "tokens_b" for a pair, as one row of a batch.

    Args:
        row: `layout.bert_row` or `layout.gpt_row` with length and special tokens filled in.
        both_orders: a pair as two rows, a before b and b before a: tokens `[2, T]`.

    Raises:
        ValueError: the label is not in `[0, num_classes)`.
    """
    del rng
    label = int(example["label"])
    if not 0 <= label < num_classes:
        raise ValueError(f"label {label} is outside the {num_classes} classes 0 to "
                         f"{num_classes - 1}; mend the data or raise num_classes")
    return {**_texts(example, row, both_orders), "labels": np.int32(label),
            "weights": np.float32(1)}


def classification_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[Terms, Terms, dict[str, SumAndWeight]]:
    """Sum over examples of -log P(label), in nats; its weight is the number of examples.

    With an `aux_lm_loss_weight` lambda, for GPT, a second term "lm" is lambda times the mean of the language
    model's loss over the same rows (GPT paper, section 3.2, L3): from -log P(next token) at every
    token but the last, special tokens of ids from `vocab_size` on, the model's if None, excepted as
    targets.

    Raises:
        ValueError: both orders or an `aux_lm_loss_weight` for another family than GPT.
    """
    logits, lm = _classify(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight = weighted_sum(cross_entropy(logits, batch["labels"]), batch["weights"])
    metrics = {"accuracy": weighted_sum(top1_correct(logits, batch["labels"]), batch["weights"])}
    return _with_lm(total, weight, metrics, lm, aux_lm_loss_weight)


def classification_predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """{"probabilities": `[B, C]`}."""
    return {"probabilities": jax.nn.softmax(_classify(apply, params, batch, None)[0])}


def _classify(apply, params, batch, rng, aux_lm_loss_weight=0.0, vocab_size=None, orders=None):
    """Class scores `[B, C]`, and (sum, weight) of the language model's loss if it is wanted.

    Rows of both orders `[B, 2, T]` are flattened; their features are added (GPT paper, figure 1).
    `orders` is 1 where the rows `[B, R, T]` are no orders: all of them get scores, `[B * R, C]`.
    """
    tokens = batch["tokens"]
    orders = orders or (tokens.shape[1] if tokens.ndim == 3 else 1)
    inputs = {name: batch[name].reshape(-1, batch[name].shape[-1])
              for name in ("segment_ids", "padding_mask") if name in batch}
    if "padding_mask" not in inputs and orders > 1:
        # Features in the place of tokens have no padding mask: see `finetuning.feature_cache`.
        tokens, orders = tokens.sum(1), 1
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if orders == 1 and not aux_lm_loss_weight:
        return apply({"params": params}, tokens, method="classification_logits", **inputs, **dropout(rng)), None

    def both(model, tokens, deterministic):
        if not isinstance(model, GPT):
            raise ValueError(f"both_orders and aux_lm_loss_weight are for GPT, and the model is a "
                             f"{type(model).__name__}; leave them out")
        mask = inputs["padding_mask"]
        hidden = model.decode(tokens, padding_mask=mask, deterministic=deterministic).hidden
        features = gather_positions(hidden, last_token_positions(tokens, mask)[:, None])[:, 0]
        features = features.reshape(-1, orders, features.shape[-1]).sum(1)
        logits = model.logits_from_features(features, deterministic)
        return logits, model.lazy_lm_logits(hidden[:, :-1]) if aux_lm_loss_weight else None

    logits, projection = apply({"params": params}, tokens, method=both, **dropout(rng))
    if not aux_lm_loss_weight:
        return logits, None
    targets = tokens[:, 1:]
    known = inputs["padding_mask"][:, 1:] & (targets < (vocab_size or len(projection.embedding)))
    rows = jnp.repeat(batch["weights"] > 0, len(tokens) // len(batch["weights"]))
    return logits, token_losses(projection.logits(), projection, jnp.where(known, targets, 0),
                                known & rows[:, None])[0]


def _with_lm(total, weight, metrics, lm, aux_lm_loss_weight):
    if lm is None:
        return total, weight, metrics
    return ({"task": total, "lm": aux_lm_loss_weight * lm[0]}, {"task": weight, "lm": lm[1]},
            metrics | {"lm_nats": lm})


# Scores -------------------------------------------------------------------------------------------


def prepare_regression(
    example: dict, rng: np.random.Generator | None = None, *, row: Callable,
    label_range: tuple[float, float], both_orders: bool = False,
) -> dict[str, np.ndarray]:
    """As `prepare_classification`, with a number as label, of which 0 to 1 stands for the range.

    Raises:
        ValueError: the label is not finite, or the range is empty.
    """
    del rng
    low, high = label_range
    label = float(example["label"])
    if not low < high:
        raise ValueError(f"label_range is {low} to {high}; give the least and the greatest label")
    if not np.isfinite(label):
        raise ValueError(f"label {label} is no finite number; mend the data")
    return {**_texts(example, row, both_orders), "weights": np.float32(1),
            "labels": np.float32((label - low) / (high - low))}


def regression_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[Terms, Terms, dict[str, SumAndWeight]]:
    """Sum of squared errors of a model of one class, on labels of 0 to 1; the weight is the number
    of examples. Options as for `classification_loss`."""
    scores, lm = _classify(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight = weighted_sum(jnp.square(scores[:, 0] - batch["labels"]), batch["weights"])
    return _with_lm(total, weight, {"squared_error": (total, weight)}, lm, aux_lm_loss_weight)


def regression_predict(
    apply: Callable, params: dict, batch: dict[str, Array], *,
    label_range: tuple[float, float] = (0.0, 1.0),
) -> dict:
    """{"scores": `[B]`}, in the labels' own units where their range is given."""
    low, high = label_range
    return {"scores": low + (high - low) * _classify(apply, params, batch, None)[0][:, 0]}


# Choices ------------------------------------------------------------------------------------------


def prepare_multiple_choice(
    example: dict, rng: np.random.Generator | None = None, *, row: Callable, num_choices: int
) -> dict[str, np.ndarray]:
    """`{"tokens", "choices", "label"}` as C rows of the text with each choice: tokens `[C, T]`.

    Without a text the choice stands alone. Fewer choices than `num_choices` are filled up with
    rows of zeros; "choices" `[C]` is True at real ones.

    Raises:
        ValueError: more choices than there is room for, fewer than 2, or a label outside them.
    """
    del rng
    choices, label = example["choices"], int(example["label"])
    if not 2 <= len(choices) <= num_choices:
        raise ValueError(f"an example has {len(choices)} choices; give 2 to num_choices = "
                         f"{num_choices}")
    if not 0 <= label < len(choices):
        raise ValueError(f"label {label} is outside the {len(choices)} choices 0 to "
                         f"{len(choices) - 1}; mend the data")
    text = example.get("tokens", ())
    rows = [row(text, choice) if len(text) else row(choice) for choice in choices]
    rows += [{name: np.zeros_like(x) for name, x in rows[0].items()}] * (num_choices - len(rows))
    return {**{name: np.stack([made[name] for made in rows]) for name in rows[0]},
            "choices": np.arange(num_choices) < len(choices), "labels": np.int32(label),
            "weights": np.float32(1)}


def _choice_scores(apply, params, batch, rng, aux_lm_loss_weight=0.0, vocab_size=None):
    """[B, C], from a classifier of one class on every choice's row; and as `_classify`."""
    scores, lm = _classify(apply, params, batch, rng, aux_lm_loss_weight, vocab_size, orders=1)
    scores = scores.reshape(batch["choices"].shape)
    return jnp.where(batch["choices"], scores, jnp.finfo(jnp.float32).min), lm


def multiple_choice_loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    *, aux_lm_loss_weight: float = 0.0, vocab_size: int | None = None,
) -> tuple[Terms, Terms, dict[str, SumAndWeight]]:
    """Sum over examples of -log P(right choice), in nats: a softmax over one score for each (GPT
    paper, section 3.3; BERT paper, section 4.4). Options as for `classification_loss`."""
    scores, lm = _choice_scores(apply, params, batch, rng, aux_lm_loss_weight, vocab_size)
    total, weight = weighted_sum(cross_entropy(scores, batch["labels"]), batch["weights"])
    metrics = {"accuracy": weighted_sum(top1_correct(scores, batch["labels"]), batch["weights"])}
    return _with_lm(total, weight, metrics, lm, aux_lm_loss_weight)


def multiple_choice_predict(apply: Callable, params: dict, batch: dict[str, Array]) -> dict:
    """{"probabilities": `[B, C]`}."""
    return {"probabilities": jax.nn.softmax(_choice_scores(apply, params, batch, None)[0])}


# All of them --------------------------------------------------------------------------------------


class TaskType(NamedTuple):
    """What a kind of task is: the model's task, and its pure functions."""

    task: str
    prepare: Callable
    loss: Callable
    predict: Callable


TASK_TYPES = {
    "classification": TaskType("classification", prepare_classification, classification_loss,
                           classification_predict),
    "regression": TaskType("classification", prepare_regression, regression_loss, regression_predict),
    "multiple_choice": TaskType("multiple_choice", prepare_multiple_choice, multiple_choice_loss, multiple_choice_predict),
    "token_classification": TaskType("token_classification", token_classification.prepare, token_classification.loss, token_classification.predict),
    "question_answering": TaskType("question_answering", question_answering.prepare, question_answering.loss, question_answering.predict),
}
