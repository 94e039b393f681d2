"""Sequence-to-sequence learning: predict each target token, given the source and the target tokens
before it (Vaswani et al. 2017, "Attention Is All You Need").

Translation, summarization and denoising (`objectives.denoising`) use this loss. Batch keys (S is
the source length, T the target length):

| key              | dtype   | shape    | meaning                                                |
|------------------|---------|----------|--------------------------------------------------------|
| `tokens`         | int32   | `[B, S]` | source token ids                                       |
| `padding_mask`   | bool    | `[B, S]` | True at source tokens, False at padding                |
| `decoder_tokens` | int32   | `[B, T]` | the start token, then `targets` without the last one  |
| `targets`        | int32   | `[B, T]` | target token ids, with their end token                 |
| `weights`        | float32 | `[B, T]` | 1 at targets, 0 at padding                             |
"""

from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Float, Key

from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout_kwargs, token_losses
from transformer_jax.objectives.input_format import TokenIds, pad


def prepare(
    example: dict[str, TokenIds],
    rng: np.random.Generator | None = None,
    *,
    source_length: int,
    target_length: int,
    start_id: int,
    eos_id: int,
    pad_id: int,
    bos_id: int | None = None,
) -> dict[str, np.ndarray]:
    """Converts a source and a target to one row.

    Both texts end with `eos_id` and, if `bos_id` is given, begin with it; texts that are too long
    are truncated at the end. The decoder inputs are the targets shifted right, with `start_id` at
    the first position, so the input at a position never contains the token to predict there.

    Args:
        example: `{"source": ids, "target": ids}`, without special tokens.
        rng: unused.
        source_length, target_length: lengths S and T of the row.
        start_id, eos_id, pad_id, bos_id: ids of the special tokens.

    Returns:
        tokens int32 and padding_mask bool `[S]`; decoder_tokens, targets int32 and weights float32
        `[T]`.

    Raises:
        ValueError: a length leaves no room for one token of text.

    Example:
        >>> row = prepare({"source": [7, 8], "target": [9]}, source_length=4, target_length=3,
        ...               start_id=2, eos_id=3, pad_id=1)
        >>> row["tokens"].tolist(), row["decoder_tokens"].tolist(), row["targets"].tolist()
        ([7, 8, 3, 1], [2, 9, 1], [9, 3, 1])
    """
    del rng
    prefix = [] if bos_id is None else [bos_id]
    ids = {}
    for side, length in (("source", source_length), ("target", target_length)):
        max_tokens = length - len(prefix) - 1
        if max_tokens < 1:
            raise ValueError(f"{side}_length {length} leaves no room for text beside "
                             f"{len(prefix) + 1} special tokens; use at least {len(prefix) + 2}")
        ids[side] = [*prefix, *example[side][:max_tokens], eos_id]
    source, target = ids["source"], ids["target"]
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
    """The sum of the cross-entropy over target tokens, in nats, and the number of target tokens.

    Args:
        apply, params, batch, rng: see `transformer_jax.objectives`.
        label_smoothing: probability that is distributed over the vocabulary (section 5.4). Label
            smoothing is a regularizer: it is applied only if `rng` is given, as dropout is, and
            not in evaluation.
        **options: `logits_per_chunk` of `cross_entropy.token_losses`.

    Returns:
        `(sum, weight, metrics)` with the metrics "nll", the cross-entropy without label smoothing,
        and "accuracy".
    """
    out = apply(
        {"params": params},
        batch["tokens"],
        batch["decoder_tokens"],
        padding_mask=batch["padding_mask"],
        **dropout_kwargs(rng),
    )
    sum_and_weight, metrics = token_losses(
        out.logits, getattr(out, "lazy_logits", None), batch["targets"], batch["weights"],
        label_smoothing if rng is not None else 0.0, **options)
    return *sum_and_weight, metrics
