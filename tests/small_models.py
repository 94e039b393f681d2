"""Tiny models shared by tests, with forward passes that are compiled once per signature."""

import functools

import jax
import numpy as np

from transformer_jax.models import (
    BARTConfig,
    BERTConfig,
    Config,
    GPTConfig,
    TransformerConfig,
    build_model,
    init_params,
)

VOCAB = 61
LENGTH = 32  # max_length

_SHAPE = {"vocab_size": VOCAB, "max_length": LENGTH, "num_layers": 2, "d_model": 24, "num_heads": 3,
          "mlp_dim": 40}
GPT2 = GPTConfig(**_SHAPE, norm_first=True, scale_residual_init=True)
GPT1 = GPTConfig(**_SHAPE)
BERT = BERTConfig(**_SHAPE)
TRANSFORMER = TransformerConfig(**_SHAPE, init_std=0.2, decoder_start_token_id=2)
BART = BARTConfig(**_SHAPE, output_bias=True, decoder_start_token_id=2)

# Compiles with the default optimizations of XLA, which conftest.py reduces for tests.
optimized_jit = functools.partial(
    jax.jit,
    compiler_options={
        "xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False,
        **({"xla_cpu_use_fusion_emitters": True} if jax.__version__.startswith("0.10.") else {})},
)


def random_params(shapes, seed: int = 7, std: float = 0.2):
    """Samples parameters that are far from typical initial ones.

    Attention is not uniform and biases are not zero, so a wrong mask or a missing bias changes the
    first digits of outputs. NumPy samples them, so nothing is compiled.
    """
    rng = np.random.default_rng(seed)

    def sample(path, leaf):
        values = rng.normal(size=leaf.shape) * std + (path[-1].key == "scale")
        return values.astype(np.float32)

    return jax.tree_util.tree_map_with_path(sample, shapes)


@functools.cache
def build(config: Config, num_classes: int = 0):
    """Returns the model of a config, and random parameters."""
    model = build_model(config, num_classes)
    init = functools.partial(
        init_params, model, method="classification_logits" if num_classes else "__call__"
    )
    return model, random_params(jax.eval_shape(init, jax.random.key(0)))


def _call(model, params, tokens, rng, method, arrays):
    return model.apply(
        {"params": params}, tokens, method=method, deterministic=rng is None,
        rngs=None if rng is None else {"dropout": rng}, **arrays,
    )


_quick_call = jax.jit(_call, static_argnames=("model", "method"))
_optimized_call = optimized_jit(_call, static_argnames=("model", "method"))


def forward(config: Config, tokens, *, method="__call__", params=None, rng=None, num_classes=0,
            optimized=False, **arrays):
    """Calls a model; compiled once for each config, shape and set of options.

    `optimized` compiles with the default optimizations of XLA, for tests of bitwise equality.
    """
    model, default_params = build(config, num_classes)
    tokens = np.asarray(tokens, np.int32)
    call = _optimized_call if optimized else _quick_call
    return call(model, default_params if params is None else params, tokens, rng, method, arrays)


def random_tokens(*shape: int, seed: int = 0, first: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(first, VOCAB, shape).astype(np.int32)
