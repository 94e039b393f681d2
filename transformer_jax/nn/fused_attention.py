"""Attention kernels that never hold the weights `[T, S]`, and the choice between them.

Each is `kernel(query, key, value, mask) -> out`, equal to the plain products of `attention.attend`
in value and gradient up to rounding, without attention dropout. They are for accelerators: cuDNN's
flash attention on NVIDIA GPUs, splash attention (Pallas) on TPUs, which skips blocks of scores that
a mask in words (`causal`, `attention_window`) hides.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jaxtyping import Float

from transformer_jax.sharding import BATCH_AXES, fit, num_shards, varying

CHOICES = ("auto", "xla", "cudnn", "splash")
LANES = 128  # a splash block has a multiple of so many queries and keys
BLOCK = 512


def select_implementation(name: str, query: Array, key: Array, mask: Any, dropped: bool) -> str:
    """The kernel for these arrays: `name`, or the platform's for "auto", or "xla" where that one
    cannot do them: none drops weights (`dropped`), splash takes whole blocks of 128 and a mask in
    words, outside `jax.shard_map` unless it was told `check_vma=False`, and numbers of 16 bits if
    `jax_default_matmul_precision` asks for no more; cuDNN takes numbers of 16 bits, heads of at
    most 128, and even lengths."""
    if name == "auto":
        name = _of_platform()
    T, S, H = query.shape[1], key.shape[1], query.shape[-1]
    exact = jax.config.jax_default_matmul_precision not in (None, "default", "bfloat16", "fastest")
    cut = _query_spec(query)[1]
    fits = {
        "xla": True,
        "splash": mask.allowed is None and (T == S or not mask.causal) and S % LANES == 0
        and T // num_shards(cut) % LANES == 0 and not varying(query)
        and (query.dtype == jnp.float32 or not exact),
        "cudnn": query.dtype in (jnp.bfloat16, jnp.float16) and H % 8 == 0 and H <= 128
        and T > 1 and T % 2 == S % 2 == 0 and not cut,
    }
    return name if fits[name] and not dropped else "xla"


def _of_platform() -> str:
    """The kernel of what runs here."""
    if modern_nvidia():
        return "cudnn"
    return "splash" if jax.default_backend() == "tpu" else "xla"


def modern_nvidia() -> bool:
    """Whether an NVIDIA GPU of compute capability 8 or more runs here, as cuDNN's kernel and those
    of Triton want it."""
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.local_devices()[0], "compute_capability", ""))
    found = re.fullmatch(r"(\d+)\.\d+", capability)  # AMD's are "gfx942"
    return bool(found) and int(found[1]) >= 8


def _query_spec(query: Array) -> P:
    return fit((BATCH_AXES, "sequence", "tensor", None), query.shape)


def cudnn_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B S N H"], value: Float[Array, "B S N H"],
    mask: Any,
) -> Float[Array, "B T N H"]:
    """cuDNN's flash attention. What of a mask is not causal is given to it as booleans, one row of
    `[T, S]` for all heads."""
    rest = mask.replace(causal=False, attention_window=None).dense(query.shape[1], key.shape[1])
    if rest is not None:
        rest = jnp.broadcast_to(rest, (*rest.shape[:2], query.shape[1], key.shape[1]))
    window = None if mask.attention_window is None else (mask.attention_window - 1, 0)
    return jax.nn.dot_product_attention(
        query, key, value, mask=rest, is_causal=mask.causal, local_window_size=window,
        implementation="cudnn")


def splash_attention(
    query: Float[Array, "B T N H"], key: Float[Array, "B S N H"], value: Float[Array, "B S N H"],
    mask: Any,
) -> Float[Array, "B T N H"]:
    """Splash attention, each device of a mesh on its own rows, heads and queries.

    Off a TPU it is interpreted, which is for tests; a program that is compiled for a TPU elsewhere
    has the kernel in it.
    """
    ids = _segment_ids(query, key, mask)
    query = query * query.shape[-1] ** -0.5
    if jax.default_backend() == "tpu":
        return _splash(query, key, value, ids, mask.causal, mask.attention_window, False)
    return jax.lax.platform_dependent(
        query, key, value, ids,
        tpu=lambda *args: _splash(*args, mask.causal, mask.attention_window, False),
        default=lambda *args: _splash(*args, mask.causal, mask.attention_window, True))


def _segment_ids(query: Array, key: Array, mask: Any) -> tuple[Array, Array] | None:
    """Documents and padding as ids that have to agree: padding has one that no query has."""
    if mask.query_documents is None and mask.real is None:
        return None
    q, kv = mask.query_documents, mask.key_documents
    q = jnp.ones(query.shape[:2], jnp.int32) if q is None else q.astype(jnp.int32)
    kv = jnp.ones(key.shape[:2], jnp.int32) if kv is None else kv.astype(jnp.int32)
    return q, kv if mask.real is None else jnp.where(mask.real, kv, -1)


def _splash(query, key, value, ids, causal, attention_window, interpret):
    # Imported here: Pallas takes a second to import, and only TPUs need it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, N, S = query.shape[1], query.shape[2], key.shape[1]
    spec = _query_spec(query)
    rows, tokens, heads = spec[0], spec[1], spec[2]
    shards = num_shards(tokens)
    if not causal:
        # The same for every part of the queries: it has no blocks that differ by device.
        one, shards = masks.FullMask((T // shards, S)), 1
    elif attention_window is None:
        one = masks.CausalMask((T, S))
    else:
        one = masks.LocalMask((T, S), (attention_window - 1, 0), 0)
    block_q, block_kv = splash_block_size(T // num_shards(tokens)), splash_block_size(S)
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([one] * N), head_shards=num_shards(heads),
        q_seq_shards=shards, interpret=interpret,
        block_sizes=kernels.BlockSizes(
            block_q=block_q, block_kv=block_kv, block_q_dkv=block_q, block_kv_dkv=block_kv,
            use_fused_bwd_kernel=True))

    def local(kernel, query, key, value, ids):
        ids = ids and kernels.SegmentIds(*ids)
        swap = [x.swapaxes(1, 2) for x in (query, key, value)]  # [B, N, T, H]
        return jax.vmap(kernel, in_axes=(0, 0, 0, ids and 0))(*swap, ids).swapaxes(1, 2)

    if not any(spec):
        return local(kernel, query, key, value, ids)
    keys = P(rows, None, heads, None)
    mesh = jax.sharding.get_abstract_mesh()
    blocks = P(heads, tokens if causal else None)
    where = kernel.manual_sharding_spec(jax.NamedSharding(mesh, blocks))
    return jax.shard_map(
        local, in_specs=(where, spec, keys, keys, ids and (P(rows, tokens), P(rows, None))),
        out_specs=spec, check_vma=False)(kernel, query, key, value, ids)


def splash_block_size(length: int) -> int:
    """The largest block of at most `BLOCK` that divides a multiple of 128."""
    return max(b for b in range(LANES, BLOCK + 1, LANES) if length % b == 0)


IMPLEMENTATIONS: dict[str, Callable[..., Array]] = {"cudnn": cudnn_attention, "splash": splash_attention}
