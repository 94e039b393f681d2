"""Parameter layout for decoding steps, whose matmuls have only a few rows (one per sequence)."""

import re

import jax
import jax.numpy as jnp

from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer
from transformer_jax.tree import flatten_paths, unflatten_paths

# Old -> new names of int8 parameters. Layers with the new names also round their inputs to int8.
INT8_NAMES = {"kernel_scale": "kernel_t_scale", "embedding_int8": "embedding_t",
              "embedding_scale": "embedding_t_scale"}


def transpose_kernels_for_decoding(
    model: GPT | Transformer, params: dict, donate: bool = False
) -> dict:
    """Converts parameters to the decoding layout once, for many calls of `generate`.

    Without this, `generate` converts them in each call. On a CPU, this takes 7 % of the time of
    decoding 64 tokens with GPT-2, and memory for a second copy of the kernels during the call. The
    result is for `generate` only: its kernels and embeddings have the compute dtype, and on a CPU
    kernels are transposed to [out, in].

    Args:
        model: GPT or encoder-decoder.
        params: its parameters.
        donate: delete each input array that was converted as soon as its replacement is computed.

    Returns:
        Parameters for `generate`.

    Example:
        >>> from transformer_jax.models import GPT, GPTConfig
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=8, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=12))
        >>> params = {"wi": {"kernel": jnp.ones((4, 12)), "bias": jnp.zeros(12)}}
        >>> jax.tree.map(jnp.shape, transpose_kernels_for_decoding(model, params))
        {'wi': {'bias': (12,), 'kernel_t': (12, 4)}}
    """
    return transpose_kernels(params, model.config.compute_dtype, donate)


def transpose_kernels(params: dict, dtype: jnp.dtype, donate: bool = False) -> dict:
    """Returns parameters with transposed kernels `kernel_t` [out, in], in the compute dtype.

    The time of a matmul with few rows is that of reading its weight matrix, once for each generated
    token; `nn.backends.cpu.matmul_transposed` explains why a transposed matrix is faster. On a CPU
    this function makes a copy of the kernels, and int8 kernels (`finetuning.quantize`) are later
    multiplied by inputs that are rounded to int8. On other backends, and on a mesh, the compiler
    chooses layouts, and kernels are not transposed.

    Call it under `jit`, outside of the decoding loop.

    Args:
        params: model parameters.
        dtype: compute dtype of the model; that of the returned kernels and embeddings.
        donate: as for `transpose_kernels_for_decoding`; not under `jit`.
    """
    keep_layout = jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty
    leaves = flatten_paths(params)
    converted = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        new, is_transposed = leaf, False
        if (keep_layout and name in ("kernel_int8", *INT8_NAMES)) or (
                f"{layer}/lora_magnitude" in leaves):  # DoRA needs the norms of the stored kernel
            pass
        elif name in ("embedding", "kernel_t") or (name == "kernel" and keep_layout):
            new = leaf if leaf.dtype == jnp.int8 else leaf.astype(dtype)
        elif name in ("kernel", "kernel_int8"):
            num_inputs = leaf.ndim - (2 if re.search(r"(query|key|value)$", layer) else 1)
            order = [*range(num_inputs, leaf.ndim), *range(num_inputs)]
            new = (leaf if name == "kernel_int8" else leaf.astype(dtype)).transpose(order)
            name, is_transposed = "kernel_t", True
        else:
            name = INT8_NAMES.get(name, name)
        converted[f"{layer}/{name}".removeprefix("/")] = new
        if donate and (is_transposed or new.dtype != leaf.dtype):
            jax.block_until_ready(new)
            leaf.delete()
    return unflatten_paths(converted)
