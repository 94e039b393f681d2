"""A block against a line-by-line NumPy version of both residual forms."""

import jax
import numpy as np
import pytest

from transformer_jax.models import GPTConfig
from transformer_jax.nn.blocks import Stack

SIZES = {"vocab_size": 9, "max_length": 8, "num_layers": 2, "d_model": 6, "num_heads": 2,
         "mlp_dim": 10, "init_std": 0.5, "activation": "relu"}


def norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def self_attention(p, x):
    q, k, v = (np.einsum("td,dnh->nth", x, p[n]["kernel"]) + p[n]["bias"][:, None]
               for n in ("query", "key", "value"))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
    scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    return np.einsum("nth,nhd->td", weights @ v, p["out"]["kernel"]) + p["out"]["bias"]


def mlp(p, x):
    hidden = np.maximum(x @ p["wi"]["kernel"] + p["wi"]["bias"], 0)
    return hidden @ p["wo"]["kernel"] + p["wo"]["bias"]


def norm_before(p, x):
    x = x + self_attention(p["self_attention"], norm(p["attention_norm"], x))
    return x + mlp(p["mlp"], norm(p["mlp_norm"], x))


def norm_after(p, x):
    x = norm(p["attention_norm"], x + self_attention(p["self_attention"], x))
    return norm(p["mlp_norm"], x + mlp(p["mlp"], x))


@pytest.mark.parametrize(("norm_first", "block"), [(True, norm_before), (False, norm_after)])
def test_stack_is_the_formula(norm_first, block):
    stack = Stack(GPTConfig(**SIZES, norm_first=norm_first).stack)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 5, 6)).astype(np.float32)
    mask = np.tri(5, dtype=bool)
    shapes = jax.eval_shape(stack.init, jax.random.key(0), x, mask)["params"]
    # Biases and scales are random too, so that a forgotten one shows.
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), shapes)
    expected = x[0].astype(np.float64)
    for i in range(2):
        expected = block(params[f"layer_{i}"], expected)
    if norm_first:
        expected = norm(params["final_norm"], expected)
    assert ("final_norm" in params) == norm_first

    out = jax.jit(stack.apply)({"params": params}, x, mask)
    np.testing.assert_allclose(out.hidden[0], expected, rtol=1e-4, atol=1e-5)
    assert out.cache is None
    assert [w.shape for w in out.attention] == [(1, 2, 5, 5)] * 2
    np.testing.assert_allclose(out.attention[1].sum(-1), 1, rtol=1e-6)
