"""Variants for TPUs."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from transformer_jax.sharding import BATCH_AXES, constraint_spec, num_shards, varying_axes

LANES = 128  # block sizes of splash attention are multiples of the number of TPU lanes
MAX_BLOCK_SIZE = 512


def splash_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B S N H"], value: Float[Array, "B S N H"],
    mask: Any, **_,
) -> tuple[Float[Array, "B T N H"], None]:
    """`attention.dot_product_attention` by splash attention, a Pallas kernel.

    It skips blocks of scores that a causal or sliding-window mask excludes, and never stores
    attention weights. On a mesh, each device computes its own rows, heads and queries. It was only
    compiled for TPUs; its gain was not measured.

    On platforms other than TPUs the Pallas kernel is interpreted, for tests. A program that is
    compiled for TPUs ahead of time, even on another platform, contains the compiled kernel.
    """
    segment_ids = _segment_ids(query, key, mask)
    query = query * query.shape[-1] ** -0.5
    if jax.default_backend() == "tpu":
        out = _splash(query, key, value, segment_ids, mask.causal, mask.attention_window, False)
        return out, None
    return jax.lax.platform_dependent(
        query, key, value, segment_ids,
        tpu=lambda *args: _splash(*args, mask.causal, mask.attention_window, False),
        default=lambda *args: _splash(*args, mask.causal, mask.attention_window, True)), None


def supports_splash(
    query, key, value, mask: Any, *, attention_impl: str = "auto", dropout_rate: float = 0.0,
    dropout_rng: Array | None = None, return_weights: bool = False,
) -> bool:
    """Returns whether `splash_attention` applies: by default on TPUs.

    It supports neither dropout nor `return_weights`. Key and per-device query lengths must be
    multiples of 128, the mask must have no `dense_mask`, T == S if it is causal, and inside
    `jax.shard_map`, `check_vma` must be False. 16-bit inputs are supported only if
    `jax_default_matmul_precision` is not above bfloat16.
    """
    name = "splash" if attention_impl == "auto" and jax.default_backend() == "tpu" else (
        attention_impl)
    if name != "splash" or return_weights or (dropout_rng is not None and dropout_rate > 0):
        return False
    T, S = query.shape[1], key.shape[1]
    precision = jax.config.jax_default_matmul_precision
    is_high_precision = precision not in (None, "default", "bfloat16", "fastest")
    T_per_device = T // num_shards(_query_spec(query)[1])
    return (mask.dense_mask is None and (T == S or not mask.causal) and S % LANES == 0
            and T_per_device % LANES == 0 and not varying_axes(query)
            and (query.dtype == jnp.float32 or not is_high_precision))


def _query_spec(query: Array) -> P:
    return constraint_spec((BATCH_AXES, "sequence", "tensor", None), query.shape)


def _segment_ids(query: Array, key: Array, mask: Any) -> tuple[Array, Array] | None:
    """Encodes documents and padding as segment ids: queries attend to keys of the same id.

    Padding keys have the id -1, which no query has.
    """
    if mask.query_document_ids is None and mask.padding_mask is None:
        return None
    query_ids, key_ids = mask.query_document_ids, mask.key_document_ids
    query_ids = (
        jnp.ones(query.shape[:2], jnp.int32) if query_ids is None else query_ids.astype(jnp.int32))
    key_ids = jnp.ones(key.shape[:2], jnp.int32) if key_ids is None else key_ids.astype(jnp.int32)
    if mask.padding_mask is not None:
        key_ids = jnp.where(mask.padding_mask, key_ids, -1)
    return query_ids, key_ids


def _splash(query, key, value, segment_ids, causal, attention_window, interpret):
    # Imported here because importing Pallas takes a second, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, S = query.shape[1], query.shape[2], key.shape[1]
    query_spec = _query_spec(query)
    batch_axes, sequence_axes, head_axes = query_spec[0], query_spec[1], query_spec[2]
    num_query_shards = num_mask_shards = num_shards(sequence_axes)
    if not causal:
        # All shards of the queries have the same mask, which excludes nothing.
        head_mask, num_mask_shards = masks.FullMask((T // num_query_shards, S)), 1
    elif attention_window is None:
        head_mask = masks.CausalMask((T, S))
    else:
        head_mask = masks.LocalMask((T, S), (attention_window - 1, 0), 0)
    block_q, block_kv = splash_block_size(T // num_query_shards), splash_block_size(S)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([head_mask] * N), head_shards=num_shards(head_axes),
        q_seq_shards=num_mask_shards, interpret=interpret,
        block_sizes=kernels.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True))

    def attend(kernel, query, key, value, segment_ids):
        segment_ids = segment_ids and kernels.SegmentIds(*segment_ids)
        heads_first = [x.swapaxes(1, 2) for x in (query, key, value)]  # [B, N, T or S, H]
        in_axes = (0, 0, 0, segment_ids and 0)
        return jax.vmap(kernel, in_axes=in_axes)(*heads_first, segment_ids).swapaxes(1, 2)

    if not any(query_spec):
        return attend(kernel, query, key, value, segment_ids)
    key_spec = P(batch_axes, None, head_axes, None)
    mesh = jax.sharding.get_abstract_mesh()
    mask_spec = P(head_axes, sequence_axes if causal else None)
    kernel_spec = kernel.manual_sharding_spec(jax.NamedSharding(mesh, mask_spec))
    segment_specs = segment_ids and (P(batch_axes, sequence_axes), P(batch_axes, None))
    return jax.shard_map(
        attend, in_specs=(kernel_spec, query_spec, key_spec, key_spec, segment_specs),
        out_specs=query_spec, check_vma=False)(kernel, query, key, value, segment_ids)


def splash_block_size(length: int) -> int:
    """Returns the largest multiple of 128 up to `MAX_BLOCK_SIZE` that divides such a multiple."""
    sizes = range(LANES, MAX_BLOCK_SIZE + 1, LANES)
    return max(size for size in sizes if length % size == 0)
