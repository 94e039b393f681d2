"""Frozen features, computed once: where only the head trains, the body says the same every epoch.

    if features.only_head_trains(mask):
        rows = features.compute(model, params, batches)       # one forward pass over the data
        loss_fn = functools.partial(tasks.classification_loss, features.on_features(model.apply))

A row holds the body's features `[D]` in the place of its tokens, and its labels and weights.
Dropout inside the body is off, or features would differ from epoch to epoch; the classifier's stays
on.
"""

import functools
import re
from collections.abc import Callable, Iterable

import jax
import numpy as np

from transformer_jax.finetuning.select import EXTRA_TOKENS, new_parameters
from transformer_jax.models import Model
from transformer_jax.tree import PyTree, flatten_paths

_INPUTS = ("tokens", "segment_ids", "padding_mask", "last")


def only_head_trains(mask: PyTree) -> bool:
    """Whether all that trains is the classifier, and an encoder-decoder's pooler."""
    trains = flatten_paths(mask)
    head = [pattern for pattern in new_parameters(list(trains)) if pattern != EXTRA_TOKENS]
    chosen = [path for path, train in trains.items() if train]
    return bool(chosen) and all(any(re.search(p, path) for p in head) for path in chosen)


def compute_features(
    model: Model, params: PyTree, batches: Iterable[dict[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """The rows of all batches, in order, with features `[D]` float32 as "tokens".

    Tokens of shape `[B, C, T]`, the choices of a question, become features `[C, D]`. Rows of weight
    zero, with which a last batch is filled up, are left out.
    """
    rows: list[dict[str, np.ndarray]] = []
    for batch in batches:
        inputs = {name: batch[name] for name in _INPUTS if name in batch}
        found = np.asarray(_features(model, params, inputs))
        kept = {name: value for name, value in batch.items() if name not in _INPUTS}
        kept["tokens"] = found
        rows += [{name: value[i] for name, value in kept.items()}
                 for i in np.flatnonzero(np.asarray(batch["weights"]) > 0)]
    return rows


@functools.partial(jax.jit, static_argnames="model")
def _features(model: Model, params: PyTree, inputs: dict[str, jax.Array]) -> jax.Array:
    """[B, D], or [B, C, D] for choices."""
    several = inputs["tokens"].shape[:-1]
    flat = {name: value.reshape(-1, *value.shape[len(several):])
            for name, value in inputs.items()}
    tokens = flat.pop("tokens")
    found = model.apply({"params": params}, tokens, method="features", **flat)
    return found.reshape(*several, found.shape[-1]).astype("float32")


def apply_to_features(apply: Callable) -> Callable:
    """`apply` of a model for batches whose "tokens" are features: only the head is computed."""

    def head(variables, features, *, method, deterministic=True, rngs=None, **inputs):
        if method != "classification_logits":
            raise ValueError(f"method {method!r} needs more than features; only classify does not")
        return apply(variables, features, deterministic=deterministic, method="logits_from_features",
                     rngs=rngs)

    return head
