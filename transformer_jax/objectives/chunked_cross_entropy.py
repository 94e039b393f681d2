"""Cross-entropy of an output layer, computed in chunks of tokens without the full logits.

The logits are the largest array of a language model's training step: for 16,384 tokens and a
vocabulary of 50,257 they take 3.3 GB in float32, and their gradient takes as much again. Here the
output layer is applied to one chunk of tokens at a time. The forward pass reduces the logits of
each chunk to their loss and to their contributions to the gradients of the hidden states and of the
output embedding; the backward pass only multiplies these gradients by the scalar cotangent of the
loss. Memory therefore does not grow with tokens x vocabulary, and no matrix product is computed
twice.

Shape suffixes: B batch, D d_model, V vocabulary, K tokens of a chunk, W columns of the logits (V
and padding).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float, Int

from transformer_jax import sharding
from transformer_jax.nn import backends
from transformer_jax.nn.backends.gpu import CrossEntropyAndGrad
from transformer_jax.nn.layers import LazyLogits

LOGITS_PER_CHUNK = {"gpu": 2**27, "cpu": 2**25, "tpu": 2**25}
"""Default number of logits of a chunk on one device, by backend: 128 MiB in float32, and 512 MiB on
GPUs, whose matrix products need more rows. `cross_entropy.token_losses` computes the loss in chunks
only if a device has more than twice as many logits."""

GPU_VOCAB_MULTIPLE = 128  # matrix units of GPUs need full tiles: 50,257 rows are padded to 50,304

_GRAD_NAMES = ("hidden", "embedding", "scale", "bias")  # the differentiable arguments, in order


class CrossEntropySums(NamedTuple):
    """Weighted sums over tokens. Only `loss` is differentiable.

    Attributes:
        loss: cross-entropy with label smoothing, in nats.
        nll: cross-entropy without label smoothing, in nats.
        correct: weight of the tokens whose target has the highest logit.
    """

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
    """The weighted sums of `smoothed_cross_entropy(lazy_logits.logits(), ...)`, in chunks.

    Under a mesh (`jax.set_mesh`), each device computes the sums of its own tokens, and the sums
    are then added over the devices.

    Args:
        lazy_logits: hidden states `[B, ..., D]` and the output layer.
        targets: token ids in `[0, V)`.
        weights: weight of each target, 0 at padding.
        label_smoothing: see `cross_entropy.smoothed_cross_entropy`; static under `jax.jit`.
        tokens_per_chunk: number of tokens of a chunk on one device; static under `jax.jit`.

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


def num_local_tokens(shape: tuple[int, ...]) -> int:
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
        sums, (d_embedding, d_scale, d_bias) = carry
        hidden_KD, targets_K, weights_K = chunk
        unscaled_KW = jnp.einsum(
            "KD,WD->KW", hidden_KD, embedding_WD, preferred_element_type=jnp.float32)
        logits_KW = unscaled_KW if scale is None else unscaled_KW * _pad_and_shard_vocab(scale)
        *values, d_logits_KW = softmax_cross_entropy_and_grad(
            logits_KW, bias, targets_K, weights_K, num_classes=V, label_smoothing=label_smoothing,
            dtype=grad_dtype)
        sums = [s + (x * weights_K).sum() for s, x in zip(sums, values)]
        if "bias" in grad_names:
            d_bias = d_bias + d_logits_KW.sum(0)
        if "scale" in grad_names:
            d_scale = d_scale + (d_logits_KW * unscaled_KW).sum(0)
        if grad_names and scale is not None:
            d_logits_KW = d_logits_KW * _pad_and_shard_vocab(scale)
        if "embedding" in grad_names:
            d_embedding = d_embedding + jnp.einsum(
                "KW,KD->WD", d_logits_KW.astype(dtype), hidden_KD,
                preferred_element_type=jnp.float32)
        d_hidden_KD = None
        if "hidden" in grad_names:
            d_hidden_KD = jnp.einsum("KW,WD->KD", d_logits_KW.astype(dtype), embedding_WD)
        return (sums, (d_embedding, d_scale, d_bias)), d_hidden_KD

    zero_sums = [jnp.zeros((), jnp.float32)] * 3
    zero_grads = [
        _pad_and_shard_vocab(jnp.zeros((V, *x.shape[1:]), jnp.float32))
        if name in grad_names else None
        for name, x in (("embedding", embedding), ("scale", scale), ("bias", bias))]
    init = (zero_sums, tuple(zero_grads))
    # Inside `shard_map`, a scan requires that its initial carry varies over the same mesh axes as
    # the final one, that is, over those of the values that are added to it.
    if axes := tuple(sharding.varying_axes(hidden) | sharding.varying_axes(weights)):
        init = jax.lax.pcast(init, axes, to="varying")
    (sums, vocab_grads), d_hidden = jax.lax.scan(
        step, init, (split_into_chunks(hidden), split_into_chunks(targets),
                     split_into_chunks(weights)))
    grads = {name: x[:V] for name, x in zip(("embedding", "scale", "bias"), vocab_grads)
             if x is not None}
    scatter_axis = _reduce_scatter_axis(axis_names, shape[-1])
    if scatter_axis and "embedding" in grads:
        grads["embedding"] = jax.lax.psum_scatter(
            grads["embedding"], scatter_axis, scatter_dimension=1, tiled=True)
    sums = _psum(sums, axis_names)
    grads = {name: _psum(x, [a for a in axis_names if a != scatter_axis or name != "embedding"])
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
    """Cross-entropy, top-1 accuracy and gradient of the logits of a chunk of tokens.

    It is not differentiable itself.

    Args:
        logits: float32, without `bias`; the columns after the first V = `num_classes` are padding.
        bias: added to the logits, or None.
        targets: token ids in `[0, V)`.
        weights: weight of each target in the gradient.
        num_classes: V.
        label_smoothing: see `cross_entropy.smoothed_cross_entropy`.
        dtype: dtype of the gradient; None for no gradient.
    """
    V, logits_KW = num_classes, logits
    if bias is not None:
        bias_W = jnp.pad(bias, (0, logits.shape[1] - V))
        logits_KW = logits_KW + sharding.constrain(bias_W, "tensor")
    class_ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    is_class = class_ids < V
    if logits.shape[1] > V:
        logits_KW = jnp.where(is_class, logits_KW, jnp.finfo(jnp.float32).min)
    is_target_KW = class_ids == targets[:, None]
    target_logits_K = jnp.where(is_target_KW, logits_KW, 0).sum(-1)
    log_normalizer_K = jax.nn.logsumexp(logits_KW, axis=-1)
    nll_K = loss_K = log_normalizer_K - target_logits_K
    if label_smoothing:
        mean_logits_K = jnp.where(is_class, logits_KW, 0).sum(-1) / V
        loss_K = (log_normalizer_K - (1 - label_smoothing) * target_logits_K
                  - label_smoothing * mean_logits_K)
    # Of tied logits the lowest id wins, as in `cross_entropy.top1_correct`.
    is_max_KW = logits_KW == logits_KW.max(-1, keepdims=True)
    argmax_K = jnp.where(is_max_KW, class_ids, logits.shape[1]).min(-1)
    correct_K = (argmax_K == targets).astype(jnp.float32)
    if dtype is None:
        return CrossEntropyAndGrad(loss_K, nll_K, correct_K, None)
    target_probs_KW = (1 - label_smoothing) * is_target_KW
    if label_smoothing:
        target_probs_KW = target_probs_KW + jnp.where(is_class, label_smoothing / V, 0)
    probs_KW = jnp.exp(logits_KW - log_normalizer_K[:, None])
    grad_KW = (probs_KW - target_probs_KW) * weights[:, None]
    return CrossEntropyAndGrad(loss_K, nll_K, correct_K, grad_KW.astype(dtype))


def _psum(x, axis_names):
    return jax.lax.psum(x, tuple(axis_names)) if axis_names else x


def _reduce_scatter_axis(axis_names: tuple[str, ...], d_model: int) -> str | None:
    """The mesh axis over which the gradient of the embedding is reduce-scattered, if any.

    Each device then receives only the columns of its own parameter shard.
    """
    is_sharded = "fsdp" in axis_names and not d_model % sharding.num_shards("fsdp")
    return "fsdp" if is_sharded else None


def _pad_and_shard_vocab(x: Array) -> Array:
    """Shards the first dimension of `x`, the vocabulary, over the mesh axis "tensor".

    The dimension is padded with zeros to a multiple of the number of shards and, on GPUs, of
    `GPU_VOCAB_MULTIPLE`.
    """
    multiple = sharding.axis_size("tensor")
    if jax.default_backend() == "gpu":
        multiple = math.lcm(multiple, GPU_VOCAB_MULTIPLE)
    x = jnp.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))
    return sharding.constrain(x, "tensor", *[None] * (x.ndim - 1))
