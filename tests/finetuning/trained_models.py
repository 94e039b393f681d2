"""Tiny models whose trainable parameters differ from the base."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import small_models

from transformer_jax.finetuning import peft
from transformer_jax.tree import flatten_paths, map_paths

BERT, GPT, BART = (config.replace(num_layers=1) for config in (
    small_models.BERT, small_models.GPT2, small_models.BART))
DORA = "lora:2:query,wi,out,dora"


@functools.cache
def trained(config, spec, num_classes=3, seed=0):
    """(model, base, params, mask); noise is added to every trainable parameter."""
    model, base = small_models.build(config, num_classes)
    base = jax.tree.map(jnp.asarray, base)
    params, mask = peft.add_and_mask(base, spec, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    is_trainable = flatten_paths(mask)
    params = map_paths(lambda path, leaf: leaf + jnp.asarray(
        0.2 * rng.normal(size=leaf.shape), leaf.dtype) if is_trainable[path] else leaf, params)
    return model, base, params, mask
