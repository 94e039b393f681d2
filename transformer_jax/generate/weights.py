"""Parameters as later passes want them, which are over a few tokens: one of each row."""

import re

import jax
import jax.numpy as jnp

from transformer_jax.tree import flatten_paths, unflatten_paths

# What int8 parameters are called where inputs are rounded to 8 bits too.
SMALL = {"kernel_scale": "kernel_t_scale", "embedding_int8": "embedding_t",
         "embedding_scale": "embedding_t_scale"}


def by_outputs(params: dict, dtype: jnp.dtype) -> dict:
    """Kernels kept by outputs, as leaves `kernel_t`; these and embeddings in the type of the
    arithmetic.

    With few rows a product is as fast as its matrix is read (`nn.layers.by_outputs`), and it is
    read for each token. Call it under `jit`, outside of the loop. On a CPU it takes a copy of the
    kernels, and int8 ones (`finetune.shrink`) are multiplied by inputs that are rounded to 8 bits.
    Elsewhere, and on a mesh, compilers choose layouts, and kernels keep theirs.
    """
    by_rows = jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty
    leaves = flatten_paths(params)
    found = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        if (by_rows and name in ("kernel_int8", *SMALL)) or (
                f"{layer}/lora_magnitude" in leaves):  # DoRA's norm is of the kernel as it is
            found[path] = leaf
        elif name == "embedding" or (name == "kernel" and by_rows):
            found[path] = leaf.astype(dtype)
        elif name in ("kernel", "kernel_int8"):
            inputs = leaf.ndim - (2 if re.search(r"(query|key|value)$", layer) else 1)
            order = [*range(inputs, leaf.ndim), *range(inputs)]
            leaf = leaf if name == "kernel_int8" else leaf.astype(dtype)
            found[f"{layer}/kernel_t"] = leaf.transpose(order)
        elif name in ("kernel_scale", "embedding_int8", "embedding_scale"):
            found[f"{layer}/{SMALL[name]}"] = leaf
        else:
            found[path] = leaf
    return unflatten_paths(found)
