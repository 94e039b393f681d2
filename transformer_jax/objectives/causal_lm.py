"""Causal language modelling: the sum over i of log P(w_i | w_{i-k} ... w_{i-1}).

Radford et al. 2018, equation 1. k is the model's `attention_window`.
"""

from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Float, Key

from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout, token_losses
from transformer_jax.objectives.input_format import pad


def prepare(
    example: dict, rng: np.random.Generator | None = None, *, length: int
) -> dict[str, np.ndarray]:
    """One document `{"tokens": ids}` as one row; a longer one is cut at a random place.

    To train on documents of every length without padding, pack them: `data.PackedTokens`.
    """
    ids = np.asarray(example["tokens"])
    surplus = max(len(ids) - (length + 1), 0)
    first = int(rng.integers(surplus + 1)) if rng is not None else 0
    ids = ids[first : first + length + 1]
    return shift(pad(ids, length + 1), pad(np.ones(len(ids)), length + 1))


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    **options,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """Sum over targets of -log P, in nats; its weight is the number of targets.

    `batch` holds tokens, targets, weights `[B, T]`, and for packed rows positions and document_ids;
    `options` go to `losses.score_tokens`.
    """
    out = apply(
        {"params": params},
        batch["tokens"],
        positions=batch.get("positions"),
        document_ids=batch.get("document_ids"),
        **dropout(rng),
    )
    loss, metrics = token_losses(out.logits, getattr(out, "projection", None), batch["targets"],
                                 batch["weights"], **options)
    return *loss, {"accuracy": metrics["accuracy"]}


def prepare_continuation(
    example: dict, rng: np.random.Generator | None = None, *, length: int, delimiter_id: int,
    eos_id: int,
) -> dict[str, np.ndarray]:
    """`{"source", "target"}` ids as one row: source delimiter target eos, where only the target and
    its end are learnt (GPT-2 paper, section 3.6: "TL;DR:" between an article and its summary).

    A source that is too long loses its end; a target that is, its own, if half the row is not
    enough for it.

    Raises:
        ValueError: no room for text.
    """
    del rng
    if length < 4:
        raise ValueError(f"length {length} leaves no room for two texts and 2 special tokens; use "
                         "at least 4")
    source, target = np.asarray(example["source"]), np.asarray(example["target"])
    target = target[: max(length - 2 - len(source), (length - 2) // 2)]
    source = source[: length - 2 - len(target)]
    ids = np.array([*source, delimiter_id, *target, eos_id], np.int32)
    place = np.arange(length)
    learnt = (place >= len(source)) & (place < len(ids) - 1)
    return {"tokens": pad(ids[:length], length), "targets": pad(ids[1:], length),
            "weights": learnt.astype(np.float32)}
