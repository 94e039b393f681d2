"""The tiny models that tests share, and one compiled forward pass for each shape of call.

Initial weights are ten times those of the papers, so that attention is far from uniform and a
wrong mask or position shows in the first digits.
"""

import functools

import jax
import numpy as np

from transformer_jax.models import BERTConfig, Config, GPTConfig, build_model, init_params

VOCAB = 61
LENGTH = 32  # positions

_SHAPE = {"vocab_size": VOCAB, "max_length": LENGTH, "num_layers": 2, "d_model": 24, "num_heads": 3,
          "mlp_dim": 40, "init_std": 0.2}
GPT2 = GPTConfig(**_SHAPE, norm_first=True, scale_residual_init=True)
GPT1 = GPTConfig(**_SHAPE)
BERT = BERTConfig(**_SHAPE)


@functools.cache
def build(config: Config, num_classes: int = 0):
    """The model of a config with its random parameters."""
    model = build_model(config, num_classes)
    init = jax.jit(functools.partial(init_params, model, head="classify" if num_classes else
                                     "__call__"))
    return model, init(jax.random.key(7))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model, params, tokens, rng, method, arrays):
    return model.apply(
        {"params": params}, tokens, method=method, deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng}, **arrays,
    )


def forward(config: Config, tokens, *, method="__call__", params=None, rng=None, num_classes=0,
            **arrays):
    """A model call, compiled once for each config, shape and set of options."""
    model, built = build(config, num_classes)
    tokens = np.asarray(tokens, np.int32)
    return _apply(model, built if params is None else params, tokens, rng, method, arrays)


def random_tokens(*shape: int, seed: int = 0, first: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(first, VOCAB, shape).astype(np.int32)
