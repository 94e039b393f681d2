"""Causal language modeling: predict each token from the tokens before it.

The loss is the sum over i of -log P(w_i | w_{i-k}, ..., w_{i-1}) (Radford et al. 2018, "Improving
Language Understanding by Generative Pre-Training", equation 1). The context size k is the model's
`attention_window`.
"""

from collections.abc import Callable

import numpy as np
from jax import Array
from jaxtyping import Float, Key

from transformer_jax.data.packing import shift_tokens
from transformer_jax.objectives.cross_entropy import SumAndWeight, dropout_kwargs, token_losses
from transformer_jax.objectives.input_format import pad


def prepare(
    example: dict, rng: np.random.Generator | None = None, *, length: int
) -> dict[str, np.ndarray]:
    """Converts one document, `{"tokens": ids}`, to one row.

    Of a document of more than `length + 1` tokens, `rng` chooses a random part; without it, the
    row has the beginning. To train on documents of any length without padding, use
    `data.packing.PackedTokens`, which returns rows of the same format.

    Example:
        >>> row = prepare({"tokens": [5, 6, 7]}, length=4)
        >>> row["tokens"].tolist(), row["targets"].tolist(), row["weights"].tolist()
        ([5, 6, 7, 0], [6, 7, 0, 0], [1.0, 1.0, 0.0, 0.0])
    """
    ids = np.asarray(example["tokens"])
    num_excess = max(len(ids) - (length + 1), 0)
    start = int(rng.integers(num_excess + 1)) if rng is not None else 0
    ids = ids[start : start + length + 1]
    return shift_tokens(pad(ids, length + 1), pad(np.ones(len(ids)), length + 1))


def loss(
    apply: Callable, params: dict, batch: dict[str, Array], rng: Key[Array, ""] | None = None,
    **options,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The sum over targets of -log P, in nats, and the number of targets; the metric "accuracy".

    Arguments as in `transformer_jax.objectives`; `options` are `label_smoothing` and
    `logits_per_chunk` of `cross_entropy.token_losses`.
    """
    out = apply({"params": params}, batch["tokens"], positions=batch.get("positions"),
                document_ids=batch.get("document_ids"), return_logits=False, **dropout_kwargs(rng))
    total, weight, metrics = token_losses(
        getattr(out, "lazy_logits", None) or out.logits, batch["targets"], batch["weights"],
        **options)
    return total, weight, {"accuracy": metrics["accuracy"]}


def prepare_continuation(
    example: dict, rng: np.random.Generator | None = None, *, length: int, delimiter_id: int,
    eos_id: int,
) -> dict[str, np.ndarray]:
    """Converts `{"source": ids, "target": ids}` to one row `source delimiter target eos` with
    tokens, targets and weights, for a causal model.

    Only the target and its end token have weight 1. This is the format of GPT-2's summaries (GPT-2
    paper, section 3.6), where "TL;DR:" is the delimiter between an article and its summary. Texts
    that are too long are truncated at the end: first the source, down to half of the row, and then
    the target.

    Raises:
        ValueError: `length` is below 4.

    Example:
        >>> row = prepare_continuation(
        ...     {"source": [5, 6], "target": [7]}, length=6, delimiter_id=1, eos_id=2)
        >>> row["tokens"].tolist(), row["weights"].tolist()
        ([5, 6, 1, 7, 2, 0], [0.0, 0.0, 1.0, 1.0, 0.0, 0.0])
    """
    if length < 4:
        raise ValueError(f"length {length} leaves no room for two texts and 2 special tokens; use "
                         "at least 4")
    source, target = np.asarray(example["source"]), np.asarray(example["target"])
    target = target[: max(length - 2 - len(source), (length - 2) // 2)]
    source = source[: length - 2 - len(target)]
    ids = np.array([*source, delimiter_id, *target, eos_id], np.int32)
    position = np.arange(length)
    is_target = (position >= len(source)) & (position < len(ids) - 1)
    return {"tokens": pad(ids[:length], length), "targets": pad(ids[1:], length),
            "weights": is_target.astype(np.float32)}
