"""Use a trained model: continue text with GPT, fill masks with BERT.

Shape suffixes: B batch, T prompt bucket, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.models.bert import BERT
from transformer_jax.models.gpt import GPT
from transformer_jax.models.heads import take_positions

SMALLEST_BUCKET = 16


def bucket(length: int, limit: int) -> int:
    """The next power of two from 16 up, at most `limit`: shapes that compiled code is kept for."""
    return min(max(SMALLEST_BUCKET, 1 << (length - 1).bit_length()), limit)


class Sampling(NamedTuple):
    """How the next token is drawn from its scores. These are traced: changing a value does not
    compile again."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # V for no limit
    top_p: Float[Array, ""]  # 1 for no limit


def restrict(
    logits_BV: Float[Array, "B V"], sampling: Sampling
) -> Float[Array, "B V"]:
    """Logits over temperature, -inf outside the top k and outside the nucleus.

    The nucleus is the smallest set of tokens, best first, whose probability reaches top_p; the
    best token is always in it (Holtzman et al. 2019, section 3.1). It is measured after the top-k
    cut.
    """
    logits_BV = logits_BV / sampling.temperature
    order_BV = jnp.argsort(-logits_BV, axis=-1, stable=True)
    rank_V = jnp.arange(logits_BV.shape[-1])
    sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
    sorted_BV = jnp.where(rank_V < sampling.top_k, sorted_BV, -jnp.inf)
    probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
    before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
    # Rounding can push the running sum to 1 before the tail: top_p = 1 must still mean no limit.
    keep_BV = (before_BV < sampling.top_p) | (sampling.top_p >= 1) | (rank_V == 0)
    sorted_BV = jnp.where(keep_BV, sorted_BV, -jnp.inf)
    return jnp.take_along_axis(sorted_BV, jnp.argsort(order_BV, axis=-1), axis=-1)


@functools.partial(jax.jit, static_argnames=("model", "cache_length", "do_sample"))
def _generate(
    model: GPT,
    params: dict,
    prompt_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    max_new_tokens: Int[Array, ""],
    is_end_V: Bool[Array, "V"],
    pad_id: Int[Array, ""],
    sampling: Sampling,
    rng: Key[Array, ""],
    *,
    cache_length: int,
    do_sample: bool,
) -> Int[Array, "B cache_length"]:
    """New tokens of each row, left-aligned; `pad_id` after an end token."""
    B, T = prompt_BT.shape

    def forward(tokens_BT, positions_BT, cache):
        return model.apply(
            {"params": params}, tokens_BT, positions=positions_BT, cache=cache, method="decode"
        )

    def choose(hidden_BD, step):
        logits_BV = model.apply({"params": params}, hidden_BD, method="lm_logits")
        if not do_sample:
            return logits_BV.argmax(-1).astype(jnp.int32)
        key = jax.random.fold_in(rng, step)
        return jax.random.categorical(key, restrict(logits_BV, sampling)).astype(jnp.int32)

    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = model.init_cache(model.config, B, cache_length)
    out = forward(prompt_BT, positions_BT, cache)
    token_B = choose(take_positions(out.hidden, lengths_B[:, None] - 1)[:, 0], 0)
    new = jnp.full((B, cache_length), pad_id, jnp.int32).at[:, 0].set(token_B)

    def unfinished(carry):
        step, done_B, *_ = carry
        return (step < max_new_tokens) & ~done_B.all()

    def advance(carry):
        step, done_B, token_B, new, cache = carry
        out = forward(token_B[:, None], (lengths_B + step - 1)[:, None], cache)
        token_B = jnp.where(done_B, pad_id, choose(out.hidden[:, 0], step))
        new = new.at[:, step].set(token_B)
        return step + 1, done_B | is_end_V[token_B], token_B, new, out.cache

    carry = (jnp.int32(1), is_end_V[token_B], token_B, new, out.cache)
    return jax.lax.while_loop(unfinished, advance, carry)[3]


def generate(
    model: GPT,
    params: dict,
    input_ids: Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    attention_mask: Int[np.ndarray, "B T"] | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    rng: Key[Array, ""] | None = None,
) -> Int[np.ndarray, "B T+max_new_tokens"]:
    """Continue prompts, greedily or by sampling, with keys and values cached.

    One program is compiled for each bucket of lengths (powers of two) and batch size; other
    prompts, lengths within the bucket, temperatures, limits and end tokens reuse it.

    Args:
        input_ids: a batch of prompts: lists of unequal length, or an array with `attention_mask`
            (1 at tokens, 0 at padding on either side).
        do_sample: draw the next token; otherwise take the best.
        temperature: logits are divided by it; above 0.
        top_k, top_p: keep the k best tokens, and the best whose probability reaches p.
        eos_token_id: one or several ids after which a row stops; the rest is `pad_token_id`.
        rng: key for sampling.

    Returns:
        int32 array on the host: the prompts, padded on the left to T, then the new tokens. Column T
        is the first new token of every row.

    Raises:
        ValueError: an empty prompt, an id outside the vocabulary, more tokens than the model
            has positions, or an option out of range; nothing is compiled.
    """
    c = model.config
    prompts = _as_lists(input_ids, attention_mask)
    ends = [] if eos_token_id is None else np.atleast_1d(eos_token_id)
    check_ids(prompts, c.vocab_size)
    for name, ids in (("eos_token_id", ends), ("pad_token_id", [pad_token_id])):
        check_ids([ids], c.vocab_size, name)
    _check_options(c, prompts, max_new_tokens, do_sample, temperature, top_k, top_p, rng)
    longest = max(map(len, prompts))
    prompt_bucket = bucket(longest, c.max_length)
    cache_length = bucket(longest + max_new_tokens, c.max_length)
    right = np.full((len(prompts), prompt_bucket), pad_token_id, np.int32)
    left = np.full((len(prompts), longest), pad_token_id, np.int32)
    for row, ids in enumerate(prompts):
        right[row, : len(ids)] = ids
        left[row, longest - len(ids) :] = ids
    is_end = np.zeros(c.vocab_size, bool)
    is_end[ends] = True
    new = _generate(
        model,
        params,
        right,
        np.array([len(ids) for ids in prompts], np.int32),
        np.int32(max_new_tokens),
        is_end,
        np.int32(pad_token_id),
        Sampling(np.float32(temperature), np.int32(top_k or c.vocab_size), np.float32(top_p)),
        jax.random.key(0) if rng is None else rng,
        cache_length=cache_length,
        do_sample=do_sample,
    )
    return np.concatenate([left, np.asarray(new)[:, :max_new_tokens]], axis=1)


def _as_lists(input_ids, attention_mask) -> list[np.ndarray]:
    rows = [np.asarray(row) for row in input_ids]
    shapes = [row.shape for row in rows]
    if any(len(shape) != 1 for shape in shapes):
        raise ValueError(f"prompts have shapes {shapes}; give a batch of rows of ids: [prompt]")
    if attention_mask is not None:
        masks = [np.asarray(mask, bool) for mask in attention_mask]
        if [mask.shape for mask in masks] != shapes:
            raise ValueError(f"attention_mask has rows of shapes {[m.shape for m in masks]} and "
                             f"input_ids of {shapes}; give one mark for each token")
        rows = [row[mask] for row, mask in zip(rows, masks)]
    if not rows or not all(len(row) for row in rows):
        empty = [i for i, row in enumerate(rows) if not len(row)]
        raise ValueError(f"prompts {empty} of {len(rows)} are empty; begin them with at least one "
                         "token, such as end-of-text")
    return rows


def check_ids(rows: Sequence[np.ndarray], vocab_size: int, name: str = "row {}") -> None:
    """Refuse ids that the device would look up without a word, as NaN or as another token."""
    for i, row in enumerate(rows):
        row = np.asarray(row)
        bad = row[(row < 0) | (row >= vocab_size)]
        if bad.size:
            raise ValueError(f"{name.format(i)} has token id {bad[0]}, outside the vocabulary of "
                             f"{vocab_size}; use the tokenizer the model was trained with")


def _check_options(c, prompts, max_new_tokens, do_sample, temperature, top_k, top_p, rng) -> None:
    longest = max(map(len, prompts))
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; ask for at least 1")
    if longest + max_new_tokens > c.max_length:
        raise ValueError(f"prompt of {longest} and {max_new_tokens} new tokens exceed the model's "
                         f"{c.max_length} positions; ask for at most {c.max_length - longest} new "
                         "tokens or shorten the prompt")
    if not do_sample:
        return
    if rng is None:
        raise ValueError("do_sample needs rng; pass jax.random.key(seed)")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0 (do_sample=False is "
                         "greedy)")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; keep at least 1 token, or None for all")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}; it must be above 0 and at most 1")


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _mask_scores(model, params, tokens, padding_mask, positions, top_k):
    logits_BPV = model.apply(
        {"params": params}, tokens, padding_mask=padding_mask, masked_positions=positions,
        method="mask_logits",
    )
    return jax.lax.top_k(jax.nn.softmax(logits_BPV, axis=-1), top_k)


class Fill(NamedTuple):
    """Candidates for one mask, best first."""

    position: int
    token_ids: Int[np.ndarray, "k"]
    probabilities: Float[np.ndarray, "k"]


def fill_mask(
    model: BERT, params: dict, tokens: Sequence[int], *, mask_id: int, top_k: int = 5
) -> list[Fill]:
    """The likeliest tokens at each [MASK] of one row of ids with its special tokens placed.

    Raises:
        ValueError: no mask, an id outside the vocabulary, more tokens than positions, or no
            candidate asked for.
    """
    c = model.config
    ids = np.asarray(tokens, np.int32)
    check_ids([ids], c.vocab_size)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; ask for at least 1 candidate")
    masks = np.flatnonzero(ids == mask_id)
    if not len(masks):
        raise ValueError(f"no token of {len(ids)} is the mask {mask_id}; put [MASK] into the text")
    if len(ids) > c.max_length:
        raise ValueError(f"text of {len(ids)} tokens is longer than the model's {c.max_length} "
                         "positions; shorten it")
    length = bucket(len(ids), c.max_length)
    row = np.zeros((1, length), np.int32)
    row[0, : len(ids)] = ids
    positions = np.zeros((1, bucket(len(masks), length)), np.int32)
    positions[0, : len(masks)] = masks
    real = np.arange(length)[None] < len(ids)
    probabilities, candidates = _mask_scores(
        model, params, row, real, positions, min(top_k, c.vocab_size)
    )
    return [
        Fill(int(p), np.asarray(candidates)[0, i], np.asarray(probabilities)[0, i])
        for i, p in enumerate(masks)
    ]
