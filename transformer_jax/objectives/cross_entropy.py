"""Cross-entropy and accuracy as sums with weights; nothing here divides but `mean`.

Shape suffixes: B batch, T length, V vocabulary or classes.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.nn.layers import LazyLogits
from transformer_jax.objectives.chunked_cross_entropy import (
    CHUNK_LOGITS,
    chunked_cross_entropy,
    local_tokens,
)

Total = Float[Array, ""] | Mapping[str, Float[Array, ""]]
SumAndWeight = tuple[Float[Array, ""], Float[Array, ""]]


def cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."]
) -> Float[Array, "..."]:
    """-log softmax(logits)[target], in nats, computed in float32."""
    return smoothed_cross_entropy(logits, targets, 0.0)


def smoothed_cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], smoothing: float
) -> Float[Array, "..."]:
    """Cross-entropy with a target that gives `smoothing` of its mass to all V classes alike and
    the rest to `targets` (Szegedy et al. 2015, section 7), in nats."""
    return _cross_entropy(logits.astype(jnp.float32), targets, smoothing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _cross_entropy(logits, targets, smoothing):
    expected = _chosen(logits, targets)
    if smoothing:
        expected = (1 - smoothing) * expected + smoothing * logits.mean(-1)
    return jax.nn.logsumexp(logits, axis=-1) - expected


@_cross_entropy.defjvp
def _(smoothing, primals, tangents):
    """softmax(logits) - expected, in closed form: one pass from the logits. The derivative that JAX
    makes scatters into an array of their size, and keeps another."""
    (logits, targets), (t, _) = primals, tangents
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    expected = (1 - smoothing) * (_columns(logits) == targets[..., None])
    if smoothing:
        expected = expected + smoothing / logits.shape[-1]
    slope = jnp.exp(logits - total) - expected
    return _cross_entropy(logits, targets, smoothing), (slope * t).sum(-1)


def _chosen(logits, targets):
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _columns(logits):
    """The number of each class, for every logit."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def top1_correct(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """1.0 where the best-scored class is the target; of equal scores the first counts.

    Not by `argmax`, for which XLA for CPUs compares one number at a time.
    """
    chosen, targets = _chosen(logits, targets)[..., None], targets[..., None]
    behind = (logits < chosen) | ((logits == chosen) & (_columns(logits) >= targets))
    return behind.all(-1).astype(jnp.float32)


def token_losses(
    logits: Float[Array, "... V"],
    projection: LazyLogits | None,
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    smoothing: float = 0.0,
    chunk_logits: int | None = None,
) -> tuple[SumAndWeight, dict[str, SumAndWeight]]:
    """The loss of predicted tokens, and the metrics "nll" and "accuracy": weighted sums, in nats.

    Where a device has more than twice `chunk_logits` logits (`CHUNK_LOGITS` of the platform, if
    None) and the model says what they are made of, its `projection`, they are made so many at a
    time, and none is kept.
    """
    chunk_logits = chunk_logits or CHUNK_LOGITS[jax.default_backend()]
    tokens = projection and local_tokens(targets.shape)
    if tokens and tokens * projection.embedding.shape[0] > 2 * chunk_logits:
        chunk = max(chunk_logits // projection.embedding.shape[0] // 128 * 128, 128)
        found = chunked_cross_entropy(projection, targets, weights, smoothing=smoothing, chunk=chunk)
        weight = weights.astype(jnp.float32).sum()
        return (found.loss, weight), {"nll": (found.nll, weight),
                                      "accuracy": (found.correct, weight)}
    nll = cross_entropy(logits, targets)
    trained = smoothed_cross_entropy(logits, targets, smoothing) if smoothing else nll
    return weighted_sum(trained, weights), {"nll": weighted_sum(nll, weights),
                                        "accuracy": weighted_sum(top1_correct(logits, targets), weights)}


def weighted_sum(values: Float[Array, "..."], weights: Float[Array, "..."]) -> SumAndWeight:
    """(sum of values * weights, sum of weights)."""
    weights = weights.astype(jnp.float32)
    return (values * weights).sum(), weights.sum()


def mean(total: Total, weight: Total) -> Float[Array, ""]:
    """The loss that sums and weights stand for: total / weight, added over terms.

    A term without weight counts 0.
    """
    quotients = jax.tree.map(lambda s, w: jnp.where(w > 0, s / jnp.where(w > 0, w, 1), 0),
                             total, weight)
    return sum(jax.tree.leaves(quotients))


def dropout(rng: Key[Array, ""] | None) -> dict:
    """Keyword arguments of a model call: dropout under `rng`, or none."""
    return {"deterministic": rng is None, "rngs": None if rng is None else {"dropout": rng}}
