"""Small models whose greedy sequences are varied, and reference decoding without a cache."""

import functools

import jax
import numpy as np
import small_models
from small_models import build, forward

from transformer_jax.generation import generate
from transformer_jax.models import GPTConfig

GPT = small_models.GPT2.replace(num_layers=1, max_length=40)
# Tied output layers favor repeating the last token.
BART = small_models.BART.replace(num_layers=1, tie_embeddings=False, max_length=40)
TRANSFORMER = small_models.TRANSFORMER.replace(num_layers=1, tie_embeddings=False, max_length=40)
FAMILIES = {"gpt": GPT, "bart": BART, "transformer": TRANSFORMER}
PROMPTS = [[5, 9, 3], [7] * 8, [11]]
NUM_NEW = 12


@functools.cache
def varied_model(config):
    """A model whose next token depends on position and context more than on the last token."""
    model, params = build(config)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 3 * x if any("_attention" in key.key for key in path) else x, params)
    if isinstance(config, GPTConfig):
        params["position_embed"] = {"embedding": 10 * params["position_embed"]["embedding"]}
    return model, params


def run(prompts=PROMPTS, config=GPT, **options):
    return generate(*varied_model(config), prompts, **{"max_new_tokens": NUM_NEW, **options})


def new_tokens(out, config=GPT, width=8):
    """The generated tokens without prompts or start token."""
    return out[:, width:] if isinstance(config, GPTConfig) else out[:, 1:]


@functools.cache
def next_logits(config, prompt: tuple, new: tuple) -> np.ndarray:
    """Logits of the next token by a full forward pass without a cache."""
    def padded(ids):
        row = np.zeros((1, config.max_length), np.int32)
        row[0, : len(ids)] = ids
        return row

    params = varied_model(config)[1]
    if isinstance(config, GPTConfig):
        ids = prompt + new
        logits = forward(config, padded(ids), params=params).logits
    else:
        ids = (config.decoder_start_token_id, *new)
        padding_mask = np.arange(config.max_length)[None] < len(prompt)
        logits = forward(config, padded(prompt), decoder_tokens=padded(ids),
                         padding_mask=padding_mask, params=params).logits
    return np.asarray(logits[0, len(ids) - 1], np.float64)


def greedy_tokens(config, prompt, count: int) -> list[int]:
    """Greedy decoding without a cache."""
    new: tuple = ()
    for _ in range(count):
        new += (int(next_logits(config, tuple(prompt), new).argmax()),)
    return list(new)
