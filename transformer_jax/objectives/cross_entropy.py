"""Cross-entropy and top-1 accuracy as weighted sums, also of an output layer in chunks of tokens.

Functions return values per token or sums with their weights; only `mean_loss` divides. The package
docstring of `transformer_jax.objectives` explains why.

Shape suffixes: D d_model, V vocabulary or classes, K tokens of a chunk, W columns of the logits (V
and padding); `...` is any number of dimensions.
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int, Key

from transformer_jax import sharding
from transformer_jax.nn import backends
from transformer_jax.nn.backends.gpu import CrossEntropyAndGrad
from transformer_jax.nn.layers import LazyLogits

LossTerms = Float[Array, ""] | Mapping[str, Float[Array, ""]]
"""A scalar or, for an objective of several terms, a dict with one scalar per term."""

SumAndWeight = tuple[Float[Array, ""], Float[Array, ""]]
"""The sum of `values * weights` and the sum of `weights`; their quotient is the weighted mean."""

LOGITS_PER_CHUNK = {"gpu": 2**27, "cpu": 2**25, "tpu": 2**25}
"""Default number of logits of a chunk on one device, by backend: 128 MiB in float32, and 512 MiB on
GPUs, whose matrix products need more rows."""

GPU_VOCAB_MULTIPLE = 128  # matrix units of GPUs need full tiles: 50,257 rows are padded to 50,304

_GRAD_NAMES = ("hidden", "embedding", "scale", "bias")  # the differentiable arguments, in order


def cross_entropy(
    logits: Float[Array, "... V"], targets: Int[Array, "..."], label_smoothing: float = 0.0
) -> Float[Array, "..."]:
    """Softmax cross-entropy with integer targets, `-log softmax(logits)[target]`, in nats.

    Logits of any float dtype are cast to float32. With label smoothing (Szegedy et al. 2015,
    section 7), the target distribution has probability `1 - label_smoothing` at the target, and
    distributes `label_smoothing` (static under `jax.jit`) uniformly over all V classes, the target
    included.

    Example:
        >>> logits = jnp.log(jnp.array([[0.25, 0.75], [0.5, 0.5]]))
        >>> print(cross_entropy(logits, jnp.array([0, 1])).round(3))  # log 4 and log 2
        [1.386 0.693]
    """
    return _cross_entropy(logits.astype(jnp.float32), targets, label_smoothing)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _cross_entropy(logits, targets, label_smoothing):
    expected_logits = _target_logits(logits, targets)[..., 0]
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
    grad = jnp.exp(logits - log_normalizer) - _target_probs(
        _class_ids(logits), targets, label_smoothing, logits.shape[-1])
    loss = _cross_entropy(logits, targets, label_smoothing)
    return loss, (grad * logits_tangent).sum(-1)


def _target_logits(logits, targets):
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)


def _class_ids(logits):
    """The class id of every logit, an array of the shape of `logits`."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _target_probs(class_ids, targets, label_smoothing, num_classes):
    """The target distribution; ids of `num_classes` or more are padding of probability 0."""
    probs = (1 - label_smoothing) * (class_ids == targets[..., None])
    if label_smoothing:
        probs = probs + jnp.where(class_ids < num_classes, label_smoothing / num_classes, 0)
    return probs


def top1_correct(logits: Float[Array, "... V"], targets: Int[Array, "..."]) -> Float[Array, "..."]:
    """1.0 where the target has the highest logit and 0.0 elsewhere.

    Ties are resolved as by `argmax`: the lowest id wins. `argmax` itself is avoided because XLA for
    CPUs does not vectorize it.
    """
    return _is_top1(logits, _target_logits(logits, targets), targets)


def _is_top1(logits, target_logits, targets):
    is_not_above = (logits < target_logits) | (
        (logits == target_logits) & (_class_ids(logits) >= targets[..., None]))
    return is_not_above.all(-1).astype(jnp.float32)


def token_losses(
    logits: Float[Array, "... V"] | LazyLogits,
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    label_smoothing: float = 0.0,
    logits_per_chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""], dict[str, SumAndWeight]]:
    """The weighted sum of cross-entropies in nats, the sum of weights, and the metrics "nll" (the
    cross-entropy without label smoothing) and "accuracy".

    If `logits` are the hidden states and the output layer (`nn.LazyLogits`), and a device would
    have more than `2 * logits_per_chunk` logits, the loss is computed in chunks of tokens
    (`chunked_cross_entropy`), unless `backends.use("reference")`. By default, `logits_per_chunk` is
    `LOGITS_PER_CHUNK` of the backend.
    """
    if isinstance(logits, LazyLogits):
        V = logits.embedding.shape[0]
        logits_per_chunk = logits_per_chunk or LOGITS_PER_CHUNK[jax.default_backend()]
        if (_num_local_tokens(targets.shape) * V > 2 * logits_per_chunk
                and not backends.is_reference()):
            sums = chunked_cross_entropy(
                logits, targets, weights, label_smoothing=label_smoothing,
                tokens_per_chunk=max(logits_per_chunk // V // 128 * 128, 128))
            weight = weights.astype(jnp.float32).sum()
            return sums.loss, weight, {"nll": (sums.nll, weight),
                                       "accuracy": (sums.correct, weight)}
        logits = logits.logits()
    nll = cross_entropy(logits, targets)
    loss = cross_entropy(logits, targets, label_smoothing) if label_smoothing else nll
    return *weighted_sum(loss, weights), {
        "nll": weighted_sum(nll, weights),
        "accuracy": weighted_sum(top1_correct(logits, targets), weights)}


def weighted_sum(values: Float[Array, "..."], weights: Float[Array, "..."]) -> SumAndWeight:
    """The sum of `values * weights` and the sum of `weights`, both float32 scalars."""
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


# In chunks of tokens ------------------------------------------------------------------------------


class CrossEntropySums(NamedTuple):
    """Weighted sums over tokens, in nats: the loss with label smoothing, the loss without, and the
    weight of the tokens whose target has the highest logit. Only `loss` is differentiable."""

    loss: Float[Array, ""]
    nll: Float[Array, ""]
    correct: Float[Array, ""]


def chunked_cross_entropy(
    lazy_logits: LazyLogits,
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    *,
    label_smoothing: float = 0.0,
    tokens_per_chunk: int,
) -> CrossEntropySums:
    """The weighted sums of `cross_entropy(lazy_logits.logits(), ...)`, without the full logits.

    The logits are the largest array of a language model's training step: for 16,384 tokens and a
    vocabulary of 50,257 they take 3.3 GB in float32, and their gradient as much again. Here the
    forward pass applies the output layer to one chunk of tokens at a time, and reduces its logits
    to the loss and the contributions to the gradients of hidden states and embedding; the backward
    pass only multiplies these gradients by the scalar cotangent of the loss. Memory therefore does
    not grow with tokens x vocabulary, and no matrix product is computed twice.

    Under a mesh (`jax.set_mesh`), each device computes the sums of its own tokens, which are then
    added over the devices. `tokens_per_chunk`, on one device, and `label_smoothing` are static.

    Example:
        >>> lazy_logits = LazyLogits(jnp.ones((2, 6, 4)), jnp.zeros((8, 4)))  # B 2, T 6, D 4, V 8
        >>> sums = chunked_cross_entropy(
        ...     lazy_logits, jnp.zeros((2, 6), int), jnp.ones((2, 6)), tokens_per_chunk=5)
        >>> round(float(sums.loss / jnp.log(8)), 3), float(sums.correct)
        (12.0, 12.0)
    """
    hidden = lazy_logits.hidden
    mesh_axes = _token_mesh_axes(hidden.shape[:-1])
    args = (hidden, lazy_logits.embedding, lazy_logits.scale, lazy_logits.bias, targets,
            weights.astype(jnp.float32))
    return CrossEntropySums(*_chunked_sums(mesh_axes, label_smoothing, tokens_per_chunk, *args))


def _num_local_tokens(shape: tuple[int, ...]) -> int:
    """The number of tokens on one device, if an array of tokens has the global shape `[B, ...]`."""
    return math.prod(shape) // math.prod(map(sharding.num_shards, _token_mesh_axes(shape)))


def _token_mesh_axes(shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """The mesh axes that shard each dimension of an array of tokens."""
    spec = sharding.constraint_spec((sharding.BATCH_AXES, "sequence")[: len(shape)], shape)
    return tuple(sharding.spec_axis_names(entry) for entry in spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _chunked_sums(mesh_axes, label_smoothing, tokens_per_chunk, *args):
    return _sums_and_grads(mesh_axes, label_smoothing, tokens_per_chunk, args, ())[0]


def _chunked_sums_fwd(mesh_axes, label_smoothing, tokens_per_chunk, *args):
    grad_names = tuple(name for name, arg in zip(_GRAD_NAMES, args)
                       if arg is not None and arg.perturbed)
    args = jax.tree.map(lambda arg: arg.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    return _sums_and_grads(mesh_axes, label_smoothing, tokens_per_chunk, args, grad_names)


def _chunked_sums_bwd(mesh_axes, label_smoothing, tokens_per_chunk, grads, cotangents):
    loss_cotangent = cotangents[0]
    if isinstance(loss_cotangent, jax.custom_derivatives.SymbolicZero):
        loss_cotangent = jnp.zeros((), jnp.float32)
    scaled = {name: (grad * loss_cotangent).astype(grad.dtype) for name, grad in grads.items()}
    return (*(scaled.get(name) for name in _GRAD_NAMES), None, None)


_chunked_sums.defvjp(_chunked_sums_fwd, _chunked_sums_bwd, symbolic_zeros=True)


def _sums_and_grads(mesh_axes, label_smoothing, tokens_per_chunk, args, grad_names):
    """The three sums, and the gradients of the first with respect to `grad_names`, as a dict."""
    axis_names = tuple(name for entry in mesh_axes for name in entry)
    local_fn = functools.partial(_local_sums_and_grads, label_smoothing, tokens_per_chunk,
                                 grad_names, axis_names)
    if not axis_names:
        return local_fn(*args)
    token_spec = P(*(entry or None for entry in mesh_axes))
    embedding_spec = P(None, _reduce_scatter_axis(axis_names, args[0].shape[-1]))
    grad_specs = {name: {"hidden": token_spec, "embedding": embedding_spec}.get(name, P())
                  for name in grad_names}
    return jax.shard_map(
        local_fn, in_specs=(token_spec, P(), P(), P(), token_spec, token_spec),
        out_specs=((P(), P(), P()), grad_specs), axis_names=set(axis_names), check_vma=False,
    )(*args)


def _local_sums_and_grads(label_smoothing, tokens_per_chunk, grad_names, axis_names, hidden,
                          embedding, scale, bias, targets, weights):
    """`_sums_and_grads` of the tokens of one device, added over the devices of `axis_names`."""
    shape, dtype = hidden.shape, hidden.dtype
    num_tokens, V = math.prod(shape[:-1]), embedding.shape[0]
    K = min(tokens_per_chunk, num_tokens)
    num_chunks = -(-num_tokens // K)

    def split_into_chunks(x):
        x = x.reshape(num_tokens, *x.shape[len(shape) - 1 :])
        x = jnp.pad(x, [(0, num_chunks * K - num_tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(num_chunks, K, *x.shape[1:])

    embedding_WD = _pad_and_shard_vocab(embedding.astype(dtype))
    # The gradient of the logits is float32 if it is multiplied by a scale, or summed for a bias.
    has_float32_grad = scale is not None or "bias" in grad_names
    grad_dtype = (jnp.float32 if has_float32_grad else dtype) if grad_names else None

    def step(carry, chunk):
        (sums, grads), (hidden_KD, targets_K, weights_K) = carry, chunk
        grads = dict(grads)
        unscaled_KW = jnp.einsum(
            "KD,WD->KW", hidden_KD, embedding_WD, preferred_element_type=jnp.float32)
        logits_KW = unscaled_KW if scale is None else unscaled_KW * _pad_and_shard_vocab(scale)
        *values, d_logits_KW = softmax_cross_entropy_and_grad(
            logits_KW, bias, targets_K, weights_K, num_classes=V, label_smoothing=label_smoothing,
            dtype=grad_dtype)
        sums = [s + (x * weights_K).sum() for s, x in zip(sums, values)]
        if "bias" in grads:
            grads["bias"] += d_logits_KW.sum(0)
        if "scale" in grads:
            grads["scale"] += (d_logits_KW * unscaled_KW).sum(0)
        if grad_names and scale is not None:
            d_logits_KW = d_logits_KW * _pad_and_shard_vocab(scale)
        if "embedding" in grads:
            grads["embedding"] += jnp.einsum("KW,KD->WD", d_logits_KW.astype(dtype), hidden_KD,
                                             preferred_element_type=jnp.float32)
        d_hidden_KD = None
        if "hidden" in grad_names:
            d_hidden_KD = jnp.einsum("KW,WD->KD", d_logits_KW.astype(dtype), embedding_WD)
        return (sums, grads), d_hidden_KD

    zero_grads = {
        name: _pad_and_shard_vocab(jnp.zeros((V, *x.shape[1:]), jnp.float32))
        for name, x in (("embedding", embedding), ("scale", scale), ("bias", bias))
        if name in grad_names}
    init = ([jnp.zeros((), jnp.float32)] * 3, zero_grads)
    # Inside `shard_map`, a scan requires that its initial carry varies over the same mesh axes as
    # the final one, that is, over those of the values that are added to it.
    if axes := tuple(sharding.varying_axes(hidden) | sharding.varying_axes(weights)):
        init = jax.lax.pcast(init, axes, to="varying")
    (sums, grads), d_hidden = jax.lax.scan(
        step, init, tuple(map(split_into_chunks, (hidden, targets, weights))))
    grads = {name: x[:V] for name, x in grads.items()}
    scatter_axis = _reduce_scatter_axis(axis_names, shape[-1])
    if scatter_axis and "embedding" in grads:
        grads["embedding"] = jax.lax.psum_scatter(
            grads["embedding"], scatter_axis, scatter_dimension=1, tiled=True)
    sums = jax.lax.psum(sums, axis_names)
    grads = {name: jax.lax.psum(x, tuple(a for a in axis_names
                                         if a != scatter_axis or name != "embedding"))
             for name, x in grads.items()}
    if "hidden" in grad_names:
        grads["hidden"] = d_hidden.reshape(-1, shape[-1])[:num_tokens].reshape(shape)
    return tuple(sums), grads


@backends.dispatched
def softmax_cross_entropy_and_grad(
    logits: Float[Array, "K W"],
    bias: Float[Array, "V"] | None,
    targets: Int[Array, "K"],
    weights: Float[Array, "K"],
    *,
    num_classes: int,
    label_smoothing: float,
    dtype: jnp.dtype | None,
) -> CrossEntropyAndGrad:
    """Cross-entropy, top-1 accuracy and gradient (of `dtype`, None for no gradient) of a chunk.

    `logits` are float32, without `bias`; columns after the first V = `num_classes` are padding. The
    function itself is not differentiable.
    """
    V, logits_KW, class_ids_KW = num_classes, logits, _class_ids(logits)
    if bias is not None:
        bias_W = jnp.pad(bias, (0, logits.shape[1] - V))
        logits_KW = logits_KW + sharding.constrain(bias_W, "tensor")
    is_class_KW = class_ids_KW < V
    if logits.shape[1] > V:
        logits_KW = jnp.where(is_class_KW, logits_KW, jnp.finfo(jnp.float32).min)
    # A sum, because W may be sharded: `_target_logits` would gather the logits of all devices.
    target_logits_K = jnp.where(class_ids_KW == targets[:, None], logits_KW, 0).sum(-1)
    log_normalizer_K = jax.nn.logsumexp(logits_KW, axis=-1)
    nll_K = loss_K = log_normalizer_K - target_logits_K
    if label_smoothing:
        mean_logits_K = jnp.where(is_class_KW, logits_KW, 0).sum(-1) / V
        loss_K = (log_normalizer_K - (1 - label_smoothing) * target_logits_K
                  - label_smoothing * mean_logits_K)
    correct_K = _is_top1(logits_KW, target_logits_K[:, None], targets)
    if dtype is None:
        return CrossEntropyAndGrad(loss_K, nll_K, correct_K, None)
    target_probs_KW = _target_probs(class_ids_KW, targets, label_smoothing, V)
    probs_KW = jnp.exp(logits_KW - log_normalizer_K[:, None])
    grad_KW = (probs_KW - target_probs_KW) * weights[:, None]
    return CrossEntropyAndGrad(loss_K, nll_K, correct_K, grad_KW.astype(dtype))


def _reduce_scatter_axis(axis_names: tuple[str, ...], d_model: int) -> str | None:
    """The mesh axis over which the gradient of the embedding is reduce-scattered, if any: each
    device then receives only the columns of its own parameter shard."""
    is_sharded = "fsdp" in axis_names and not d_model % sharding.num_shards("fsdp")
    return "fsdp" if is_sharded else None


def _pad_and_shard_vocab(x: Array) -> Array:
    """Shards the first dimension, the vocabulary, over the mesh axis "tensor", after padding with
    zeros to a multiple of the number of shards and, on GPUs, of `GPU_VOCAB_MULTIPLE`."""
    multiple = sharding.axis_size("tensor")
    if jax.default_backend() == "gpu":
        multiple = math.lcm(multiple, GPU_VOCAB_MULTIPLE)
    x = jnp.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))
    return sharding.constrain(x, "tensor", *[None] * (x.ndim - 1))
