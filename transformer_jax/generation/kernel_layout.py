"""Parameters as later passes want them, which are over a few tokens: one of each row."""

import re

import jax
import jax.numpy as jnp

from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer
from transformer_jax.tree import flatten_paths, unflatten_paths

# What int8 parameters are called where inputs are rounded to 8 bits too.
SMALL = {"kernel_scale": "kernel_t_scale", "embedding_int8": "embedding_t",
         "embedding_scale": "embedding_t_scale"}


def transpose_kernels_for_decoding(model: GPT | Transformer, params: dict, donate: bool = False) -> dict:
    """Parameters for many calls of `generate`, which otherwise lays them out anew in each: on a CPU
    7 % of the time of 64 tokens of GPT-2, and a second copy of the kernels meanwhile.

    They are for `generate` alone, of the type of the model's arithmetic, and kernels are turned
    around on a CPU (`by_outputs`).

    Args:
        donate: delete each of the given arrays that is not kept as soon as its successor is there.
    """
    return transpose_kernels(params, model.config.compute_dtype, donate)


def transpose_kernels(params: dict, dtype: jnp.dtype, donate: bool = False) -> dict:
    """Kernels kept by outputs, as leaves `kernel_t`; these and embeddings in the type of the
    arithmetic.

    With few rows a product is as fast as its matrix is read (`nn.layers.matmul_transposed`), and it is
    read for each token. Call it under `jit`, outside of the loop. On a CPU it takes a copy of the
    kernels, and int8 ones (`finetuning.quantize`) are multiplied by inputs that are rounded to 8 bits.
    Elsewhere, and on a mesh, compilers choose layouts, and kernels keep theirs.
    """
    by_rows = jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty
    leaves = flatten_paths(params)
    found = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        new, turned = leaf, False
        if (by_rows and name in ("kernel_int8", *SMALL)) or (
                f"{layer}/lora_magnitude" in leaves):  # DoRA's norm is of the kernel as it is
            pass
        elif name in ("embedding", "kernel_t") or (name == "kernel" and by_rows):
            new = leaf if leaf.dtype == jnp.int8 else leaf.astype(dtype)
        elif name in ("kernel", "kernel_int8"):
            inputs = leaf.ndim - (2 if re.search(r"(query|key|value)$", layer) else 1)
            order = [*range(inputs, leaf.ndim), *range(inputs)]
            new = (leaf if name == "kernel_int8" else leaf.astype(dtype)).transpose(order)
            name, turned = "kernel_t", True
        else:
            name = SMALL.get(name, name)
        found[f"{layer}/{name}".removeprefix("/")] = new
        if donate and (turned or new.dtype != leaf.dtype):
            jax.block_until_ready(new)
            leaf.delete()
    return unflatten_paths(found)
