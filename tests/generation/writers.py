"""Models whose texts do not repeat themselves, and what they should write, by full passes."""

import functools

import jax
import numpy as np
import small_models
from small_models import build, forward

from transformer_jax.generation import generate
from transformer_jax.models import GPTConfig

GPT = small_models.GPT2.replace(num_layers=1, max_length=40)
# Tied output layers favour the token that was just read.
BART = small_models.BART.replace(num_layers=1, tie_embeddings=False, max_length=40)
TRANSFORMER = small_models.TRANSFORMER.replace(num_layers=1, tie_embeddings=False, max_length=40)
FAMILIES = {"gpt": GPT, "bart": BART, "transformer": TRANSFORMER}
PROMPTS = [[5, 9, 3], [7] * 8, [11]]
NEW = 12


@functools.cache
def lively(config):
    """Places and contexts weigh more than the last token."""
    model, params = build(config)
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: 3 * x if any("_attention" in key.key for key in path) else x, params)
    if isinstance(config, GPTConfig):
        params["position_embed"] = {"embedding": 10 * params["position_embed"]["embedding"]}
    return model, params


def run(prompts=PROMPTS, config=GPT, **options):
    return generate(*lively(config), prompts, **{"max_new_tokens": NEW, **options})


def new_tokens(out, config=GPT, width=8):
    """What was written, start token or prompts left out."""
    return out[:, width:] if isinstance(config, GPTConfig) else out[:, 1:]


@functools.cache
def next_logits(config, prompt: tuple, new: tuple) -> np.ndarray:
    """Scores of the next token by a pass over everything so far, without any cache."""
    def padded(ids):
        row = np.zeros((1, config.max_length), np.int32)
        row[0, : len(ids)] = ids
        return row

    params = lively(config)[1]
    if isinstance(config, GPTConfig):
        ids = prompt + new
        logits = forward(config, padded(ids), params=params).logits
    else:
        ids = (config.decoder_start_token_id, *new)
        real = np.arange(config.max_length)[None] < len(prompt)
        logits = forward(config, padded(prompt), decoder_tokens=padded(ids), padding_mask=real,
                         params=params).logits
    return np.asarray(logits[0, len(ids) - 1], np.float64)


def greedy_tokens(config, prompt, count: int) -> list[int]:
    """The best next token again and again."""
    new: tuple = ()
    for _ in range(count):
        new += (int(next_logits(config, tuple(prompt), new).argmax()),)
    return list(new)
