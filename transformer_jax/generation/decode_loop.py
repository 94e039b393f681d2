"""Autoregressive decoding of one sequence per row: greedy or sampled, compiled or streamed.

Shape suffixes: B batch, L token slots of a row, V vocabulary.
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
from transformer_jax.generation.prefill import Cache, GenerationInputs, decode_step, prefill


class DecodeState(NamedTuple):
    """State of the decoding loop between two tokens.

    All rows have the same number of new tokens: finished rows are extended with padding.

    Attributes:
        sequences: the tokens of each row.
        is_finished: True at rows with an end-of-sequence token.
        cache: keys and values of all tokens but the last.
    """

    sequences: Sequences
    is_finished: Bool[Array, "B"]
    cache: Cache


def init_sequences(
    inputs: GenerationInputs,
    processor_params: LogitsProcessorParams,
    static_config: StaticGenerationConfig,
) -> Sequences:
    """Returns the prompts in `cache_length` slots, each repeated `rows_per_prompt` times."""
    tokens_BL = jnp.full(
        (len(inputs.prompt), static_config.cache_length), processor_params.pad_token_id)
    tokens_BL = tokens_BL.at[:, : inputs.prompt.shape[1]].set(inputs.prompt)
    lengths_B = jnp.repeat(inputs.prompt_lengths, static_config.rows_per_prompt)
    return Sequences(jnp.repeat(tokens_BL, static_config.rows_per_prompt, 0), lengths_B, lengths_B)


def select_token(
    scores: Float[Array, "B V"], key: Key[Array, ""], static_config: StaticGenerationConfig
) -> Int[Array, "B"]:
    """Selects one token per row: the argmax, or a sample if `static_config.do_sample`.

    Args:
        scores: processed logits of the next token.
        key: for sampling; unused otherwise.
        static_config: compile-time configuration.

    Returns:
        Token ids; of equal maxima the first.
    """
    if static_config.do_sample:
        return jax.random.categorical(key, scores).astype(jnp.int32)
    # XLA for CPUs compares one number at a time in `argmax`, and sixteen in these two reductions.
    max_B1, V = scores.max(-1, keepdims=True), scores.shape[-1]
    ids_BV = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    return jnp.where(scores == max_B1, ids_BV, V - 1).min(-1)


def append_next_token(
    state: DecodeState,
    logits: Float[Array, "B V"],
    processor_params: LogitsProcessorParams,
    rng: Key[Array, ""],
    static_config: StaticGenerationConfig,
) -> DecodeState:
    """Selects the next token of each row and appends it; finished rows get padding."""
    key = jax.random.fold_in(rng, state.sequences.num_new_tokens[0])
    scores_BV = apply_logits_processors(logits, state.sequences, processor_params, static_config)
    token_B = select_token(scores_BV, key, static_config)
    token_B = jnp.where(state.is_finished, processor_params.pad_token_id, token_B)
    is_finished_B = state.is_finished | processor_params.is_eos[token_B]
    return state._replace(sequences=state.sequences.append(token_B), is_finished=is_finished_B)


def should_continue(
    state: DecodeState, processor_params: LogitsProcessorParams
) -> Bool[Array, ""]:
    """Whether there are unfinished rows and fewer than `max_new_tokens` new tokens."""
    is_short = state.sequences.num_new_tokens[0] < processor_params.max_new_tokens
    return is_short & ~state.is_finished.all()


def _prefill_and_first_token(model, params, inputs, processor_params, rng, static_config):
    logits_BV, cache, encoder_memory = prefill(
        model, params, inputs, static_config.cache_length, static_config.rows_per_prompt)
    sequences = init_sequences(inputs, processor_params, static_config)
    state = DecodeState(sequences, jnp.zeros(sequences.lengths.shape, bool), cache)
    state = append_next_token(state, logits_BV, processor_params, rng, static_config)
    return state, encoder_memory


def _decode_next_token(model, params, encoder_memory, state, processor_params, rng, static_config):
    positions_B1 = state.sequences.lengths[:, None] - 1
    tokens_B1 = state.sequences.tokens_at(positions_B1)
    logits_B1V, cache = decode_step(
        model, params, tokens_B1, positions_B1, state.cache, encoder_memory)
    return append_next_token(
        state._replace(cache=cache), logits_B1V[:, 0], processor_params, rng, static_config)


@functools.partial(jax.jit, static_argnames=("model", "static_config"))
def decode(
    model,
    params: dict,
    inputs: GenerationInputs,
    processor_params: LogitsProcessorParams,
    rng: Key[Array, ""],
    *,
    static_config: StaticGenerationConfig,
) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
    """Decodes one sequence per row in a single compiled loop.

    The public function `transformer_jax.generate` prepares the inputs.

    Args:
        model: GPT or encoder-decoder.
        params: its parameters.
        inputs: the prompts, and the sources of an encoder-decoder.
        processor_params: parameters of the logits processors.
        rng: for sampling.
        static_config: compile-time configuration.

    Returns:
        The tokens of each row by position, and the number of new tokens of each row, padding
        included.
    """
    state, encoder_memory = _prefill_and_first_token(
        model, params, inputs, processor_params, rng, static_config)
    params = transpose_kernels(params, model.config.compute_dtype)
    state = jax.lax.while_loop(
        lambda state: should_continue(state, processor_params),
        lambda state: _decode_next_token(
            model, params, encoder_memory, state, processor_params, rng, static_config),
        state,
    )
    return state.sequences.tokens, state.sequences.num_new_tokens


@functools.partial(jax.jit, static_argnames=("model", "static_config"))
def _start_streaming(model, params, inputs, processor_params, rng, *, static_config):
    state, encoder_memory = _prefill_and_first_token(
        model, params, inputs, processor_params, rng, static_config)
    params = transpose_kernels(params, model.config.compute_dtype)
    is_running = should_continue(state, processor_params)
    return params, state, encoder_memory, state.sequences.last_tokens, is_running


@functools.partial(
    jax.jit, static_argnames=("model", "static_config"), donate_argnames="state")
def _stream_next_token(
    model, params, encoder_memory, state, processor_params, rng, *, static_config
):
    state = _decode_next_token(
        model, params, encoder_memory, state, processor_params, rng, static_config)
    return state, state.sequences.last_tokens, should_continue(state, processor_params)


def decode_streaming(
    model,
    params: dict,
    inputs: GenerationInputs,
    processor_params: LogitsProcessorParams,
    rng: Key[Array, ""],
    *,
    static_config: StaticGenerationConfig,
    streamer: Callable[[Int[np.ndarray, "B"]], None],
) -> tuple[Int[Array, "B L"], Int[Array, "B"]]:
    """Like `decode`, with one compiled call per token.

    Args:
        streamer: called on the host with the new token of each row, int32 `[B]`.
        model, params, inputs, processor_params, rng, static_config: as for `decode`.

    Returns:
        As `decode`.
    """
    params, state, encoder_memory, token_B, is_running = _start_streaming(
        model, params, inputs, processor_params, rng, static_config=static_config)
    streamer(np.array(token_B))
    while is_running:
        state, token_B, is_running = _stream_next_token(
            model, params, encoder_memory, state, processor_params, rng,
            static_config=static_config)
        streamer(np.array(token_B))
    return state.sequences.tokens, state.sequences.num_new_tokens
