"""One text for each row, token by token: the best next token, or one that is drawn.

Shape suffixes: B rows, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.generation.kernel_layout import transpose_kernels
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    Sequences,
    StaticGenerationConfig,
    apply_logits_processors,
)
from transformer_jax.generation.prefill import Cache, Inputs, decode_step, prefill


class DecodeState(NamedTuple):
    """Between two tokens. All rows have the same number of new tokens: padding, once done."""

    text: Sequences
    done: Bool[Array, "B"]
    cache: Cache


def init_sequences(inputs: Inputs, rules: LogitsProcessorParams, plan: StaticGenerationConfig) -> Sequences:
    """The prompts, each `copies` times, in `cache_length` slots."""
    tokens_BL = jnp.full((len(inputs.prompt), plan.cache_length), rules.pad_id)
    tokens_BL = tokens_BL.at[:, : inputs.prompt.shape[1]].set(inputs.prompt)
    lengths_B = jnp.repeat(inputs.prompt_lengths, plan.copies)
    return Sequences(jnp.repeat(tokens_BL, plan.copies, 0), lengths_B, lengths_B)


def pick(scores: Float[Array, "B V"], key: Key[Array, ""], plan: StaticGenerationConfig) -> Int[Array, "B"]:
    """The best token, or one drawn by the probabilities that the scores are logits of."""
    if plan.do_sample:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    # XLA for CPUs compares one number at a time in `argmax`, and sixteen in these two.
    most_B1, V = scores.max(-1, keepdims=True), scores.shape[-1]
    column_BV = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(scores == most_B1, column_BV, V - 1).min(-1)


def choose(state: DecodeState, logits_BV, rules: LogitsProcessorParams, rng, plan: StaticGenerationConfig) -> DecodeState:
    """One more token in each row; padding in those that are done."""
    key = jax.random.fold_in(rng, state.text.new[0])
    token_B = pick(apply_logits_processors(logits_BV, state.text, rules, plan), key, plan)
    token_B = jnp.where(state.done, rules.pad_id, token_B)
    done_B = state.done | rules.is_end[token_B]
    return state._replace(text=state.text.append(token_B), done=done_B)


def unfinished(state: DecodeState, rules: LogitsProcessorParams) -> Bool[Array, ""]:
    return (state.text.new[0] < rules.max_new_tokens) & ~state.done.all()


def _begin(model, params, inputs, rules, rng, plan):
    logits_BV, cache, source = prefill(model, params, inputs, plan.cache_length, plan.copies)
    text = init_sequences(inputs, rules, plan)
    state = DecodeState(text, jnp.zeros(text.lengths.shape, bool), cache)
    return choose(state, logits_BV, rules, rng, plan), source


def _advance(model, params, source, state, rules, rng, plan):
    last_B1 = state.text.lengths[:, None] - 1
    tokens_B1 = state.text.at(last_B1)
    logits_B1V, cache = decode_step(model, params, tokens_B1, last_B1, state.cache, source)
    return choose(state._replace(cache=cache), logits_B1V[:, 0], rules, rng, plan)


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def decode(
    model, params: dict, inputs: Inputs, rules: LogitsProcessorParams, rng: Key[Array, ""], *, plan: StaticGenerationConfig
) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
    """Tokens of each row by position, and the number of new ones (padding included)."""
    state, source = _begin(model, params, inputs, rules, rng, plan)
    params = transpose_kernels(params, model.config.compute_dtype)
    state = jax.lax.while_loop(
        lambda state: unfinished(state, rules),
        lambda state: _advance(model, params, source, state, rules, rng, plan),
        state,
    )
    return state.text.tokens, state.text.new


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def _first(model, params, inputs, rules, rng, *, plan):
    state, source = _begin(model, params, inputs, rules, rng, plan)
    params = transpose_kernels(params, model.config.compute_dtype)
    return params, state, source, state.text.last, unfinished(state, rules)


@functools.partial(jax.jit, static_argnames=("model", "plan"), donate_argnames="state")
def _next(model, params, source, state, rules, rng, *, plan):
    state = _advance(model, params, source, state, rules, rng, plan)
    return state, state.text.last, unfinished(state, rules)


def decode_streaming(
    model, params: dict, inputs: Inputs, rules: LogitsProcessorParams, rng: Key[Array, ""], *, plan: StaticGenerationConfig,
    streamer: Callable[[Int[np.ndarray, "B"]], None],
) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
    """As `write`, and each token is given to `streamer` as soon as it is known."""
    params, state, source, token_B, more = _first(model, params, inputs, rules, rng, plan=plan)
    streamer(np.array(token_B))
    while more:
        state, token_B, more = _next(model, params, source, state, rules, rng, plan=plan)
        streamer(np.array(token_B))
    return state.text.tokens, state.text.new
