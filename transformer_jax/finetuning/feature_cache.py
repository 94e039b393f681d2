"""Cached features of a frozen model, for training the classification head only.

If only the head is trained, the features that the frozen model computes for an example are the same
in every epoch. They can be computed once:

    if is_head_only(mask):
        rows = compute_features(model, params, batches)  # one forward pass over the data
        apply = make_features_apply(model.apply)
        loss_fn = functools.partial(classification.classification_loss, apply)

A row contains the features `[D]` in place of the tokens, and the labels and weights of the example.
Dropout in the frozen model is off, as the features would otherwise differ between epochs; dropout
in the classifier stays on.
"""

import functools
import re
from collections.abc import Callable, Iterable

import jax
import numpy as np

from transformer_jax.finetuning.select import EXTRA_TOKENS, new_param_patterns
from transformer_jax.models import Model
from transformer_jax.tree import PyTree, flatten_paths

_INPUTS = ("tokens", "segment_ids", "padding_mask", "last_positions")


def is_head_only(mask: PyTree) -> bool:
    """Whether only the classifier is trained (and the pooler of an encoder-decoder).

    Example:
        >>> is_head_only({"body": False, "classifier": {"kernel": True, "bias": True}})
        True
    """
    is_trainable = flatten_paths(mask)
    patterns = [p for p in new_param_patterns(list(is_trainable)) if p != EXTRA_TOKENS]
    trainable = [path for path, value in is_trainable.items() if value]
    return bool(trainable) and all(
        any(re.search(pattern, path) for pattern in patterns) for path in trainable)


def compute_features(
    model: Model, params: PyTree, batches: Iterable[dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Computes the features of all examples.

    Args:
        model: a model with a classifier.
        params: its parameters.
        batches: batches with "tokens" `[B, T]` (`[B, R, T]` for R choices, or for pairs in R = 2
            orders), "weights" `[B]` and other arrays with B rows.

    Returns:
        One row for each example, in order, with float32 features `[D]` or `[R, D]` as "tokens".
        Padding examples, of weight 0, are left out.
    """
    rows: list[dict[str, np.ndarray]] = []
    for batch in batches:
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        columns = {name: value for name, value in batch.items() if name not in _INPUTS}
        columns["tokens"] = np.asarray(_features(model, params, inputs))
        rows += [{name: value[i] for name, value in columns.items()}
                 for i in np.flatnonzero(np.asarray(batch["weights"]) > 0)]
    return rows


@functools.partial(jax.jit, static_argnames="model")
def _features(model: Model, params: PyTree, inputs: dict[str, jax.Array]) -> jax.Array:
    """Computes features `[B, D]`, or `[B, R, D]` for R rows per example."""
    batch_shape = inputs["tokens"].shape[:-1]
    flat = {name: value.reshape(-1, *value.shape[len(batch_shape):])
            for name, value in inputs.items()}
    tokens = flat.pop("tokens")
    features = model.apply({"params": params}, tokens, method="features", **flat)
    return features.reshape(*batch_shape, features.shape[-1]).astype("float32")


def make_features_apply(apply: Callable) -> Callable:
    """Returns a replacement for a model's `apply`, for batches whose "tokens" are cached features.

    It computes only the classification head. It accepts only the method "classification_logits",
    and raises a ValueError for others.

    Args:
        apply: the `apply` method of the model.
    """

    def features_apply(variables, features, *, method, deterministic=True, rngs=None, **inputs):
        if method != "classification_logits":
            raise ValueError(f"unsupported method {method!r} for cached features; supported: "
                             "classification_logits")
        return apply(variables, features, deterministic=deterministic,
                     method="logits_from_features", rngs=rngs)

    return features_apply
