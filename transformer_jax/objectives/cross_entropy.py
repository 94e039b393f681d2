"""Cross-entropy and top-1 accuracy as weighted sums.

The functions return values per token or sums with their weights; only `mean_loss` divides. The
package docstring of `transformer_jax.objectives` explains why.

Shape suffixes: B batch, T length, V vocabulary or classes; `...` is any number of dimensions.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.nn import backends
from transformer_jax.nn.layers import LazyLogits
from transformer_jax.objectives.chunked_cross_entropy import (
    LOGITS_PER_CHUNK,
    chunked_cross_entropy,
    num_local_tokens,
)

LossTerms = Float[Array, ""] | Mapping[str, Float[Array, ""]]
"""A scalar or, for an objective of several terms, a dict with one scalar per term."""

SumAndWeight = tuple[Float[Array, ""], Float[Array, ""]]
"""The sum of `values * weights` and the sum of `weights`; their quotient is the weighted mean."""


def cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """Softmax cross-entropy with integer targets: `-log softmax(logits)[target]`, in nats.

    Args:
        logits: unnormalized log probabilities of any float dtype; they are cast to float32.
        targets: class or token ids in `[0, V)`.

    Returns:
        float32 loss of each target.

    Example:
        >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
        >>> print(cross_entropy(logits, jnp.array([0, 1])).round(3))  # log 4 and log 2
        [1.386 0.693]
    """
    return smoothed_cross_entropy(logits, targets, 0.0)


def smoothed_cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], label_smoothing: float
) -> Float[Array, "..."]:
    """Softmax cross-entropy with label smoothing (Szegedy et al. 2015, section 7), in nats.

    The target distribution has probability `1 - label_smoothing` at the target, and distributes
    `label_smoothing` uniformly over all V classes, the target included.

    Args:
        logits: unnormalized log probabilities of any float dtype; they are cast to float32.
        targets: class or token ids in `[0, V)`.
        label_smoothing: in `[0, 1)`; static under `jax.jit`.

    Returns:
        float32 loss of each target.
    """
    return _cross_entropy(logits.astype(jnp.float32), targets, label_smoothing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _cross_entropy(logits, targets, label_smoothing):
    expected_logits = _target_logits(logits, targets)
    if label_smoothing:
        expected_logits = ((1 - label_smoothing) * expected_logits
                           + label_smoothing * logits.mean(-1))
    return jax.nn.logsumexp(logits, axis=-1) - expected_logits


@_cross_entropy.defjvp
def _cross_entropy_jvp(label_smoothing, primals, tangents):
    """The closed-form derivative: softmax(logits) minus the target distribution.

    It needs one pass over the logits. The derivative that autodiff produces scatters into an array
    of the size of the logits and keeps a second one.
    """
    (logits, targets), (logits_tangent, _) = primals, tangents
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    target_probs = (1 - label_smoothing) * (_vocab_iota(logits) == targets[..., None])
    if label_smoothing:
        target_probs = target_probs + label_smoothing / logits.shape[-1]
    grad = jnp.exp(logits - log_normalizer) - target_probs
    loss = _cross_entropy(logits, targets, label_smoothing)
    return loss, (grad * logits_tangent).sum(-1)


def _target_logits(logits, targets):
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _vocab_iota(logits):
    """The class id of every logit, an array of the shape of `logits`."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def top1_correct(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """1.0 where the target has the highest logit and 0.0 elsewhere.

    Ties are resolved as by `argmax`: the lowest id wins. `argmax` itself is avoided because XLA for
    CPUs does not vectorize it.

    Example:
        >>> top1_correct(jnp.array([[0.1, 0.9], [0.9, 0.1]]), jnp.array([1, 1])).tolist()
        [1.0, 0.0]
    """
    target_logits, targets = _target_logits(logits, targets)[..., None], targets[..., None]
    is_not_above = (logits < target_logits) | (
        (logits == target_logits) & (_vocab_iota(logits) >= targets))
    return is_not_above.all(-1).astype(jnp.float32)


def token_losses(
    logits: Float[Array, "... V"],
    lazy_logits: LazyLogits | None,
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    label_smoothing: float = 0.0,
    logits_per_chunk: int | None = None,
) -> tuple[SumAndWeight, dict[str, SumAndWeight]]:
    """The weighted sum of token losses, and the metrics "nll" and "accuracy".

    If `lazy_logits` is given and a device has more than `2 * logits_per_chunk` logits, the loss is
    computed in chunks of tokens (`chunked_cross_entropy`), unless `backends.use("reference")`.
    `logits` is then unused, and inside `jax.jit` the full array is never materialized.

    Args:
        logits: unnormalized log probabilities.
        lazy_logits: the hidden states and output layer that `logits` are computed from, or None.
        targets: token ids in `[0, V)`.
        weights: weight of each target, 0 at padding.
        label_smoothing: see `smoothed_cross_entropy`; static under `jax.jit`.
        logits_per_chunk: number of logits of a chunk on one device. None selects
            `LOGITS_PER_CHUNK` of the backend.

    Returns:
        `((sum, weight), metrics)` in nats. The metric "nll" is the loss without label smoothing.
    """
    logits_per_chunk = logits_per_chunk or LOGITS_PER_CHUNK[jax.default_backend()]
    num_tokens = lazy_logits and num_local_tokens(targets.shape)
    if (num_tokens and not backends.is_reference()
            and num_tokens * lazy_logits.embedding.shape[0] > 2 * logits_per_chunk):
        V = lazy_logits.embedding.shape[0]
        tokens_per_chunk = max(logits_per_chunk // V // 128 * 128, 128)
        sums = chunked_cross_entropy(lazy_logits, targets, weights,
                                     label_smoothing=label_smoothing,
                                     tokens_per_chunk=tokens_per_chunk)
        weight = weights.astype(jnp.float32).sum()
        return (sums.loss, weight), {"nll": (sums.nll, weight),
                                     "accuracy": (sums.correct, weight)}
    nll = cross_entropy(logits, targets)
    loss = smoothed_cross_entropy(logits, targets, label_smoothing) if label_smoothing else nll
    return weighted_sum(loss, weights), {
        "nll": weighted_sum(nll, weights),
        "accuracy": weighted_sum(top1_correct(logits, targets), weights)}


def weighted_sum(values: Float[Array, "..."], weights: Float[Array, "..."]) -> SumAndWeight:
    """The sum of `values * weights` and the sum of `weights`, both float32 scalars.

    Example:
        >>> total, weight = weighted_sum(jnp.array([2.0, 3.0, 9.0]), jnp.array([1, 1, 0]))
        >>> float(total), float(weight)
        (5.0, 2.0)
    """
    weights = weights.astype(jnp.float32)
    return (values * weights).sum(), weights.sum()


def mean_loss(sums: LossTerms, weights: LossTerms) -> Float[Array, ""]:
    """The scalar loss of sums and weights: `sum / weight` of each term, added over the terms.

    A term of weight 0 contributes 0 to the loss and to its gradient.

    Example:
        >>> sums = {"mlm": jnp.float32(6), "nsp": jnp.float32(1)}
        >>> float(mean_loss(sums, {"mlm": jnp.float32(4), "nsp": jnp.float32(2)}))
        2.0
    """
    means = jax.tree.map(lambda s, w: jnp.where(w > 0, s / jnp.where(w > 0, w, 1), 0),
                         sums, weights)
    return sum(jax.tree.leaves(means))


def dropout_kwargs(rng: Key[Array, ""] | None) -> dict:
    """Keyword arguments of a model call that enable dropout with `rng`, or disable it if None."""
    return {"deterministic": rng is None, "rngs": None if rng is None else {"dropout": rng}}
