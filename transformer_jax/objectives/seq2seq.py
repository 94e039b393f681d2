"""Sequence to sequence: a target, word by word, given a source (Vaswani et al. 2017).

Translation, summarization and BART's denoising all train by this one loss.
"""

from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout, token_losses
from transformer_jax.objectives.input_format import pad

Ids = Int[np.ndarray, "N"]


def prepare(
    example: dict[str, Ids],
    rng: np.random.Generator | None = None,
    *,
    source_length: int,
    target_length: int,
    start_id: int,
    eos_id: int,
    pad_id: int,
    bos_id: int | None = None,
) -> dict[str, np.ndarray]:
    """`{"source", "target"}` ids without special tokens as one row; longer ones are cut at the end.

    Both texts end with `eos_id`, and begin with `bos_id` if given. The decoder's inputs are the
    target moved one place to the right behind `start_id`: at each place they hold the tokens before
    the one to predict, and never that one itself.

    Returns:
        tokens int32 and padding_mask bool `[source_length]`; decoder_tokens, targets int32 and
        weights float32 `[target_length]`, 0 at padding.

    Raises:
        ValueError: a length leaves no room for text.
    """
    del rng
    begin = [] if bos_id is None else [bos_id]
    rows = {}
    for side, length in (("source", source_length), ("target", target_length)):
        room = length - len(begin) - 1
        if room < 1:
            raise ValueError(f"{side}_length {length} leaves no room for text beside "
                             f"{len(begin) + 1} special tokens; use at least {len(begin) + 2}")
        rows[side] = [*begin, *example[side][:room], eos_id]
    source, target = rows["source"], rows["target"]
    return {
        "tokens": pad(source, source_length, pad_id),
        "padding_mask": np.arange(source_length) < len(source),
        "decoder_tokens": pad([start_id, *target[:-1]], target_length, pad_id),
        "targets": pad(target, target_length, pad_id),
        "weights": (np.arange(target_length) < len(target)).astype(np.float32),
    }


def loss(
    apply: Callable,
    params: dict,
    batch: dict[str, Array],
    rng: Key[Array, ""] | None = None,
    *,
    label_smoothing: float = 0.0,
    **options,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """Sum over target tokens of the cross-entropy, in nats; its weight is their number.

    `label_smoothing` is the share of each target that is spread over the vocabulary (section 5.4).
    It trains, and so it is left out where there is no dropout key, when a model is evaluated; the
    metric "nll" never has it. `options` go to `losses.score_tokens`.
    """
    out = apply(
        {"params": params},
        batch["tokens"],
        batch["decoder_tokens"],
        padding_mask=batch["padding_mask"],
        **dropout(rng),
    )
    loss, metrics = token_losses(
        out.logits, getattr(out, "projection", None), batch["targets"], batch["weights"],
        label_smoothing if rng is not None else 0.0, **options)
    return *loss, metrics
