"""Cached decoding has the logits of the full forward pass at every position."""

import numpy as np
import pytest
from small_models import GPT1, GPT2, build, forward, random_tokens

LENGTHS = np.array([3, 8, 5])  # of the prompts
STEPS = 6
CONFIGS = {
    "pre_norm": GPT2,
    "post_norm_attention_window": GPT1.replace(attention_window=4),
    "sinusoidal": GPT2.replace(positions="sinusoidal", scale_residual_init=False),
}


def assert_close(actual, expected):
    """Compares logits with a tolerance of 1e-5 of the largest logit at each position."""
    scale = np.abs(expected).max(-1, keepdims=True)
    assert (np.abs(actual - expected) / scale).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_steps_equal_the_full_pass(name):
    config = CONFIGS[name]
    model, _ = build(config)
    T = LENGTHS.max()
    tokens = random_tokens(3, T + STEPS, seed=3)
    full = np.asarray(forward(config, tokens).logits)
    rows = np.arange(3)

    # Prompts of unequal length in one chunk, with padding on the right.
    prompt = np.where(np.arange(T) < LENGTHS[:, None], tokens[:, :T], 0)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (3, T))
    out = forward(config, prompt, cache=model.init_cache(config, 3, T + STEPS),
                  positions=positions)
    for row, length in enumerate(LENGTHS):
        assert_close(np.asarray(out.logits)[row, :length], full[row, :length])

    # Then one token per step, each row at its own position.
    cache = out.cache
    for step in range(STEPS):
        position = (LENGTHS + step).astype(np.int32)
        out = forward(config, tokens[rows, position][:, None], cache=cache,
                      positions=position[:, None])
        cache = out.cache
        assert_close(np.asarray(out.logits)[:, 0], full[rows, position])


def test_decoding_by_chunks_equals_the_full_pass():
    model, _ = build(GPT2)
    tokens = random_tokens(3, 14, seed=4)
    full = np.asarray(forward(GPT2, tokens).logits)
    for width in (7, 1):
        cache = model.init_cache(GPT2, 3, 14)
        for start in range(0, 14, width):
            chunk = slice(start, start + width)
            positions = np.broadcast_to(np.arange(14, dtype=np.int32)[chunk], (3, width))
            out = forward(GPT2, tokens[:, chunk], cache=cache, positions=positions)
            cache = out.cache
            assert_close(np.asarray(out.logits), full[:, chunk])
