"""Parameters as later passes want them, which are over a few tokens: one of each row."""

import re

import jax
import jax.numpy as jnp

from transformer_jax.tree import flatten_paths, unflatten_paths


def by_outputs(params: dict, dtype: jnp.dtype) -> dict:
    """Kernels kept by outputs, as leaves `kernel_t`; these and embeddings in the type of the
    arithmetic.

    With few rows a product is as fast as its matrix is read (`nn.layers.by_outputs`), and it is
    read for each token. Call it under `jit`, outside of the loop. On a CPU it takes a copy of the
    kernels. Elsewhere, and on a mesh, compilers choose layouts, and kernels keep theirs.
    """
    by_rows = jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty
    leaves = flatten_paths(params)
    found = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        if f"{layer}/lora_magnitude" in leaves:  # DoRA's norm is of the kernel as it is
            found[path] = leaf
        elif name == "embedding" or (name == "kernel" and by_rows):
            found[path] = leaf.astype(dtype)
        elif name == "kernel":
            inputs = leaf.ndim - (2 if re.search(r"(query|key|value)$", layer) else 1)
            order = [*range(inputs, leaf.ndim), *range(inputs)]
            found[f"{path}_t"] = leaf.astype(dtype).transpose(order)
        else:
            found[path] = leaf
    return unflatten_paths(found)
