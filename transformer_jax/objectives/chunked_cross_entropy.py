"""Cross-entropy of an output layer without its logits.

Logits are the largest array of a language model's step: 16,384 tokens of a vocabulary of 50,257
are 3.3 GB in float32, and their gradient as much again. Here tokens go through the output layer a
chunk at a time, and each chunk's logits become, at once, its loss and what it adds to the gradients
of the hidden states and of the table. So memory does not grow with tokens times vocabulary, and no
product is computed twice: only the (scalar) derivative of the total is left for the way back.
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
from transformer_jax.nn import fused_attention
from transformer_jax.nn.layers import LazyLogits
from transformer_jax.objectives import fused_cross_entropy

# Of one device at a time, when it has more than twice as many: 128 MiB, and 512 on a GPU, whose
# products want more rows.
CHUNK_LOGITS = {"gpu": 2**27, "cpu": 2**25, "tpu": 2**25}
GPU_ROWS = 128  # its matrix units want whole tiles: 50,257 rows are made 50,304


class CrossEntropySums(NamedTuple):
    """Weighted sums over tokens. Only `loss` has a derivative."""

    loss: Float[Array, ""]  # cross-entropy, in nats, with label smoothing
    nll: Float[Array, ""]  # without
    correct: Float[Array, ""]  # tokens whose target has the greatest score


def chunked_cross_entropy(
    projection: LazyLogits,
    targets: Int[Array, "..."],
    weights: Float[Array, "..."],
    *,
    smoothing: float = 0.0,
    chunk: int,
) -> CrossEntropySums:
    """The sums that `losses.cross_entropy` of `projection.logits()` would give, without the logits.

    Args:
        projection: hidden states `[B, ..., D]` and their output layer. Over a mesh, each device
            takes the tokens it has.
        smoothing: as `losses.smoothed_cross_entropy`; static.
        chunk: how many tokens of a device at a time.
    """
    hidden, table = projection.hidden, projection.embedding
    axes = _token_axes(hidden.shape[:-1])
    args = (hidden, table, projection.scale, projection.bias, targets, weights.astype(jnp.float32))
    return CrossEntropySums(*_totals(axes, smoothing, chunk, *args))


def local_tokens(shape: tuple[int, ...]) -> int:
    """How many of the tokens `[B, ...]` one device has."""
    return math.prod(shape) // math.prod(map(sharding.num_shards, _token_axes(shape)))


def _token_axes(shape: tuple[int, ...]) -> tuple[tuple[str, ...], ...]:
    """For each dimension of tokens, the axes of the mesh that cut it."""
    spec = sharding.fit((sharding.BATCH_AXES, "sequence")[: len(shape)], shape)
    return tuple(sharding.spec_axis_names(entry) for entry in spec)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _totals(axes, smoothing, chunk, *args):
    return _run(axes, smoothing, chunk, args, ())[0]


def _forward(axes, smoothing, chunk, *args):
    wanted = tuple(name for name, arg in zip(("hidden", "table", "scale", "bias"), args)
                   if arg is not None and arg.perturbed)
    args = jax.tree.map(lambda arg: arg.value, args, is_leaf=lambda x: hasattr(x, "perturbed"))
    return _run(axes, smoothing, chunk, args, wanted)


def _backward(axes, smoothing, chunk, grads, ct):
    g = ct[0]
    if isinstance(g, jax.custom_derivatives.SymbolicZero):
        g = jnp.zeros((), jnp.float32)
    scaled = {name: (grad * g).astype(grad.dtype) for name, grad in grads.items()}
    return (*(scaled.get(name) for name in ("hidden", "table", "scale", "bias")), None, None)


_totals.defvjp(_forward, _backward, symbolic_zeros=True)


def _run(axes, smoothing, chunk, args, wanted):
    """(the three sums, {name: gradient of the first} for what is `wanted`)."""
    names = tuple(name for entry in axes for name in entry)
    local = functools.partial(_local, smoothing, chunk, wanted, names)
    if not names:
        return local(*args)
    rows = P(*(entry or None for entry in axes))
    where = {"hidden": rows, "table": P(None, _scattered(names, args[0].shape[-1]))}
    grads = {name: where.get(name, P()) for name in wanted}
    return jax.shard_map(
        local, in_specs=(rows, P(), P(), P(), rows, rows), out_specs=((P(), P(), P()), grads),
        axis_names=set(names), check_vma=False,
    )(*args)


def _local(smoothing, chunk, wanted, axes, hidden, table, scale, bias, targets, weights):
    """`_run` on the tokens of one device."""
    shape, dtype = hidden.shape, hidden.dtype
    num_tokens, V = math.prod(shape[:-1]), table.shape[0]
    chunk = min(chunk, num_tokens)
    parts = -(-num_tokens // chunk)

    def cut(x):
        x = x.reshape(num_tokens, *x.shape[len(shape) - 1 :])
        x = jnp.pad(x, [(0, parts * chunk - num_tokens)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(parts, chunk, *x.shape[1:])

    table_VD = _over_tensor(table.astype(dtype))
    rows = len(table_VD)  # V, or a few more

    fused = bool(wanted) and scale is None and _kernel_runs()

    def products(sums, d_table, d_scale, d_bias, g_CV, hidden_CD):
        """What a step returns: the sums so far, and the gradients with this chunk's."""
        if "table" in wanted:
            d_table = d_table + jnp.einsum(
                "CV,CD->VD", g_CV, hidden_CD, preferred_element_type=jnp.float32)
        d_hidden = jnp.einsum("CV,VD->CD", g_CV, table_VD) if "hidden" in wanted else None
        return (sums, (d_table, d_scale, d_bias)), d_hidden

    def step(carry, tokens):
        sums, (d_table, d_scale, d_bias) = carry
        hidden_CD, targets_C, weights_C = tokens
        raw_CV = jnp.einsum("CD,VD->CV", hidden_CD, table_VD, preferred_element_type=jnp.float32)
        if fused:
            found = fused_cross_entropy.fused_softmax_cross_entropy(raw_CV, bias, targets_C, weights_C, num_classes=V,
                                       smoothing=smoothing, dtype=dtype)
            sums = [s + (x * weights_C).sum() for s, x in zip(sums, found)]
            g_CV = found.gradient
            if "bias" in wanted:
                d_bias = d_bias + g_CV.sum(0, dtype=jnp.float32)
            return products(sums, d_table, d_scale, d_bias, g_CV, hidden_CD)
        logits_CV = raw_CV if scale is None else raw_CV * _over_tensor(scale)
        if bias is not None:
            logits_CV = logits_CV + _over_tensor(bias)
        column = jax.lax.broadcasted_iota(jnp.int32, (chunk, rows), 1)
        if rows > V:
            logits_CV = jnp.where(column < V, logits_CV, jnp.finfo(jnp.float32).min)
        hit_CV = column == targets_C[:, None]
        chosen_C = jnp.where(hit_CV, logits_CV, 0).sum(-1)
        total_C = jax.nn.logsumexp(logits_CV, axis=-1)
        nll_C = total_C - chosen_C
        loss_C = nll_C
        if smoothing:
            mean_C = jnp.where(column < V, logits_CV, 0).sum(-1) / V
            loss_C = total_C - (1 - smoothing) * chosen_C - smoothing * mean_C
        # Of equal scores the first counts, as in `losses.correct`.
        best_CV = logits_CV == logits_CV.max(-1, keepdims=True)
        first_C = jnp.where(best_CV, column, rows).min(-1)
        hits_C = (first_C == targets_C).astype(jnp.float32)
        sums = [s + (x * weights_C).sum() for s, x in zip(sums, (loss_C, nll_C, hits_C))]
        if not wanted:
            return (sums, (d_table, d_scale, d_bias)), None
        expected_CV = (1 - smoothing) * hit_CV
        if smoothing:
            expected_CV = expected_CV + jnp.where(column < V, smoothing / V, 0)
        g_CV = (jnp.exp(logits_CV - total_C[:, None]) - expected_CV) * weights_C[:, None]
        if "bias" in wanted:
            d_bias = d_bias + g_CV.sum(0)
        if "scale" in wanted:
            d_scale = d_scale + (g_CV * raw_CV).sum(0)
        if scale is not None:
            g_CV = g_CV * _over_tensor(scale)
        return products(sums, d_table, d_scale, d_bias, g_CV.astype(dtype), hidden_CD)

    zeros = [jnp.zeros((), jnp.float32)] * 3
    empty = [_over_tensor(jnp.zeros((V, *x.shape[1:]), jnp.float32)) if name in wanted else None
             for name, x in (("table", table), ("scale", scale), ("bias", bias))]
    start = (zeros, tuple(empty))
    # Under `shard_map` sums differ by device from the start, as what is added to them does.
    if differs := tuple(sharding.varying(hidden) | sharding.varying(weights)):
        start = jax.lax.pcast(start, differs, to="varying")
    (sums, by_row), d_hidden = jax.lax.scan(
        step, start, (cut(hidden), cut(targets), cut(weights)))
    grads = {name: x[:V] for name, x in zip(("table", "scale", "bias"), by_row) if x is not None}
    axis = _scattered(axes, shape[-1])
    if axis and "table" in grads:
        grads["table"] = jax.lax.psum_scatter(
            grads["table"], axis, scatter_dimension=1, tiled=True)
    sums = _sum(sums, axes)
    grads = {name: _sum(x, [a for a in axes if a != axis or name != "table"])
             for name, x in grads.items()}
    if "hidden" in wanted:
        grads["hidden"] = d_hidden.reshape(-1, shape[-1])[:num_tokens].reshape(shape)
    return tuple(sums), grads


def _kernel_runs() -> bool:
    """Whether `token_kernel` can take the logits: whole rows, on a GPU that Triton knows."""
    return fused_attention.modern_nvidia() and sharding.axis_size("tensor") == 1


def _sum(x, axes):
    return jax.lax.psum(x, tuple(axes)) if axes else x


def _scattered(axes: tuple[str, ...], width: int) -> str | None:
    """The axis over which the table's gradient is scattered as the table is, if there is one: each
    device then gets the columns of its own parameters alone."""
    cut = "fsdp" in axes and not width % sharding.num_shards("fsdp")
    return "fsdp" if cut else None


def _over_tensor(x: Array) -> Array:
    """Rows of the vocabulary cut over the tensor axis, with rows of zeros if it does not divide, or
    a GPU's tiles do not."""
    parts = sharding.axis_size("tensor")
    if jax.default_backend() == "gpu":
        parts = math.lcm(parts, GPU_ROWS)
    x = jnp.pad(x, [(0, -len(x) % parts)] + [(0, 0)] * (x.ndim - 1))
    return sharding.constrain(x, "tensor", *[None] * (x.ndim - 1))
