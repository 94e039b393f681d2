"""Speculative decoding: a draft model proposes tokens, and one pass of the target model verifies
them.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1. The
result is that of the target model alone: the same tokens without sampling, and the same
distribution with sampling. Rows may accept different numbers of tokens, because cache slots are
indexed by position.

Shape suffixes: B batch, L token slots of a row, G draft tokens, P = G + 1 verified positions,
V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.generation.decode_loop import init_sequences, select_token
from transformer_jax.generation.kernel_layout import transpose_kernels
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    Sequences,
    StaticGenerationConfig,
    apply_logits_processors,
)
from transformer_jax.generation.prefill import decode_step, prefill


class ModelPair(NamedTuple):
    """One value for the target model and one for the draft model (models, parameters, caches)."""

    target: Any
    draft: Any


class SpeculativeState(NamedTuple):
    """State of speculative decoding between two rounds.

    Attributes:
        sequences: the tokens of each row; finished rows are not extended.
        is_finished: True at rows with an end-of-sequence token or `max_new_tokens` tokens.
        num_rounds: number of passes of the target model, the prefill included.
        caches: the KV caches of both models.
    """

    sequences: Sequences
    is_finished: Bool[Array, "B"]
    num_rounds: Int[Array, ""]
    caches: ModelPair


def verify_greedy(
    scores: Float[Array, "B P V"], draft_tokens: Int[Array, "B G"]
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """Accepts draft tokens up to the first that is not the target model's argmax.

    Args:
        scores: the target model's scores at each position.
        draft_tokens: the proposed tokens.

    Returns:
        The argmax tokens, and the number n of accepted draft tokens in each row. The first n + 1
        tokens of a row are to be appended; the rest must be ignored.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> scores = jax.nn.one_hot(jnp.array([[2, 0, 1]]), 3)
        >>> tokens, num_accepted = verify_greedy(scores, jnp.array([[2, 1]]))
        >>> tokens.tolist(), num_accepted.tolist()
        ([[2, 0, 1]], [1])
    """
    argmax_BP = scores.argmax(-1).astype(jnp.int32)
    return argmax_BP, _num_leading_true(argmax_BP[:, :-1] == draft_tokens)


def verify_sampled(
    scores: Float[Array, "B P V"],
    draft_scores: Float[Array, "B G V"],
    draft_tokens: Int[Array, "B G"],
    key: Key[Array, ""],
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """Accepts or rejects sampled draft tokens by rejection sampling (algorithm 1).

    A token sampled from the draft distribution q is accepted with probability min(1, p / q), where
    p is the target distribution. The token after the accepted ones is sampled from max(0, p - q),
    normalized, if a token was rejected, and from p otherwise.

    Args:
        scores: the target model's logits at each position.
        draft_scores: the draft model's logits.
        draft_tokens: the proposed tokens.
        key: for the acceptance and for the token after the accepted ones.

    Returns:
        The tokens, and the number n of accepted draft tokens in each row. The first n + 1 tokens of
        a row are to be appended; the rest must be ignored.
    """
    B, G = draft_tokens.shape
    rows_B = jnp.arange(B)
    key, next_key = jax.random.split(key)
    p_BPV, q_BGV = jax.nn.softmax(scores, -1), jax.nn.softmax(draft_scores, -1)
    p_BG, q_BG = (jnp.take_along_axis(x[:, :G], draft_tokens[..., None], axis=2)[..., 0]
                  for x in (p_BPV, q_BGV))
    num_accepted_B = _num_leading_true(jax.random.uniform(key, (B, G)) * q_BG < p_BG)
    p_BV = p_BPV[rows_B, num_accepted_B]
    q_BV = jnp.pad(q_BGV, ((0, 0), (0, 1), (0, 0)))[rows_B, num_accepted_B]
    residual_BV = jnp.maximum(p_BV - q_BV, 0)
    # The residual is zero where p and q are equal up to rounding; p is then equivalent.
    residual_BV = jnp.where(residual_BV.sum(-1, keepdims=True) > 0, residual_BV, p_BV)
    next_token_B = jax.random.categorical(next_key, jnp.log(residual_BV)).astype(jnp.int32)
    tokens_BP = jnp.pad(draft_tokens, ((0, 0), (0, 1))).at[rows_B, num_accepted_B].set(next_token_B)
    return tokens_BP, num_accepted_B


def _num_leading_true(flags_BG):
    return jnp.cumprod(flags_BG.astype(jnp.int32), axis=-1).sum(-1)


def _prefill_and_first_token(models, params, inputs, processor_params, rng, static_config):
    (logits_BV, cache, encoder_memory), (_, draft_cache, draft_encoder_memory) = (
        prefill(models[i], params[i], inputs[i], static_config.cache_length,
                static_config.rows_per_prompt)
        for i in (0, 1))
    sequences = init_sequences(inputs.target, processor_params, static_config)
    key = jax.random.fold_in(rng, 0)
    scores_BV = apply_logits_processors(logits_BV, sequences, processor_params, static_config)
    token_B = select_token(scores_BV, key, static_config)
    is_finished_B = processor_params.is_eos[token_B] | (processor_params.max_new_tokens <= 1)
    state = SpeculativeState(sequences.append(token_B), is_finished_B, jnp.int32(1),
                             ModelPair(cache, draft_cache))
    return state, ModelPair(encoder_memory, draft_encoder_memory)


def _run_round(models, params, encoder_memories, state, processor_params, rng, static_config):
    """Runs one round: drafts G tokens, verifies them, and appends at least one token to each
    unfinished row."""
    G, sequences = static_config.num_draft_tokens, state.sequences
    draft_key, verify_key = jax.random.split(jax.random.fold_in(rng, state.num_rounds))

    def draft_token(carry, key):
        # The last token is not in the draft cache, and neither is the one before it if all draft
        # tokens of the previous round were accepted; so each step processes the last two tokens.
        sequences, cache = carry
        positions_B2 = sequences.lengths[:, None] + jnp.array([-2, -1])
        logits_B2V, cache = decode_step(
            models.draft, params.draft, sequences.tokens_at(positions_B2), positions_B2, cache,
            encoder_memories.draft)
        scores_BV = apply_logits_processors(
            logits_B2V[:, 1], sequences, processor_params, static_config)
        token_B = select_token(scores_BV, key, static_config)
        outputs = token_B, scores_BV if static_config.do_sample else None
        return (sequences.append(token_B), cache), outputs

    (drafted, draft_cache), (draft_tokens_GB, draft_scores_GBV) = jax.lax.scan(
        draft_token, (sequences, state.caches.draft), jax.random.split(draft_key, G))
    draft_tokens_BG = draft_tokens_GB.T

    offsets_P = jnp.arange(G + 1)
    positions_BP = sequences.lengths[:, None] - 1 + offsets_P
    tokens_BP = jnp.concatenate(
        [sequences.tokens_at(positions_BP[:, :1]), draft_tokens_BG], axis=1)
    logits_BPV, cache = decode_step(
        models.target, params.target, tokens_BP, positions_BP, state.caches.target,
        encoder_memories.target)
    scores_BPV = jax.vmap(
        lambda logits_BV, offset: apply_logits_processors(
            logits_BV, drafted._replace(lengths=sequences.lengths + offset), processor_params,
            static_config),
        in_axes=(1, 0), out_axes=1,
    )(logits_BPV, offsets_P)
    if static_config.do_sample:
        draft_scores_BGV = jnp.moveaxis(draft_scores_GBV, 0, 1)
        new_BP, num_accepted_B = verify_sampled(
            scores_BPV, draft_scores_BGV, draft_tokens_BG, verify_key)
    else:
        new_BP, num_accepted_B = verify_greedy(scores_BPV, draft_tokens_BG)

    # Append up to the first end-of-sequence token, and at most `max_new_tokens` in all.
    is_new_BP = offsets_P <= num_accepted_B[:, None]
    is_eos_BP = processor_params.is_eos[new_BP]
    is_after_eos_BP = (jnp.cumsum(is_eos_BP, axis=1) - is_eos_BP) > 0
    num_new_B = sequences.num_new_tokens
    is_within_BP = num_new_B[:, None] + offsets_P < processor_params.max_new_tokens
    is_new_BP &= ~is_after_eos_BP & is_within_BP & ~state.is_finished[:, None]
    rows_B1 = jnp.arange(len(new_BP))[:, None]
    out_of_range = sequences.tokens.shape[1]
    slots_BP = jnp.where(is_new_BP, sequences.lengths[:, None] + offsets_P, out_of_range)
    sequences = sequences._replace(
        tokens=sequences.tokens.at[rows_B1, slots_BP].set(new_BP, mode="drop"),
        lengths=sequences.lengths + is_new_BP.sum(-1),
    )
    is_finished_B = (state.is_finished | (is_eos_BP & is_new_BP).any(-1)
                     | (sequences.num_new_tokens >= processor_params.max_new_tokens))
    return SpeculativeState(
        sequences, is_finished_B, state.num_rounds + 1, ModelPair(cache, draft_cache))


@functools.partial(jax.jit, static_argnames="models")
def _transpose_kernels(models, params):
    return ModelPair(*(
        transpose_kernels(p, m.config.compute_dtype) for m, p in zip(models, params)))


@functools.partial(jax.jit, static_argnames=("models", "static_config"))
def decode_speculative(
    models: ModelPair,
    params: ModelPair,
    inputs: ModelPair,
    processor_params: LogitsProcessorParams,
    rng: Key[Array, ""],
    *,
    static_config: StaticGenerationConfig,
) -> tuple[Int[Array, "B L"], Int[Array, "B"], Int[Array, ""]]:
    """Decodes one sequence per row by speculative decoding, in a single compiled loop.

    Args:
        models: target and draft model, of the same vocabulary.
        params: their parameters.
        inputs: the `GenerationInputs` of each.
        processor_params: parameters of the logits processors.
        rng: for sampling.
        static_config: compile-time configuration.

    Returns:
        The tokens of each row by position, the number of new tokens of each row, and the number of
        rounds.
    """
    state, encoder_memories = _prefill_and_first_token(
        models, params, inputs, processor_params, rng, static_config)
    params = _transpose_kernels(models, params)
    state = jax.lax.while_loop(
        lambda state: ~state.is_finished.all(),
        lambda state: _run_round(
            models, params, encoder_memories, state, processor_params, rng, static_config),
        state,
    )
    return state.sequences.tokens, state.sequences.num_new_tokens, state.num_rounds


_start_streaming = jax.jit(_prefill_and_first_token, static_argnames=("models", "static_config"))
_stream_round = jax.jit(
    _run_round, static_argnames=("models", "static_config"), donate_argnames="state")


def decode_speculative_streaming(
    models: ModelPair,
    params: ModelPair,
    inputs: ModelPair,
    processor_params: LogitsProcessorParams,
    rng: Key[Array, ""],
    *,
    static_config: StaticGenerationConfig,
    streamer: Callable[[Int[np.ndarray, "B"]], None],
) -> tuple[Int[Array, "B L"], Int[Array, "B"], Int[Array, ""]]:
    """Like `decode_speculative`, with one compiled call per round.

    Args:
        streamer: called on the host with the next token of each row, int32 `[B]`, as soon as it is
            known for every unfinished row.
        models, params, inputs, processor_params, rng, static_config: as for `decode_speculative`.

    Returns:
        As `decode_speculative`.
    """
    state, encoder_memories = _start_streaming(
        models, params, inputs, processor_params, rng, static_config=static_config)
    params = _transpose_kernels(models, params)
    num_streamed = 0
    while True:
        sequences = state.sequences
        tokens, num_new, is_finished = (np.array(x) for x in (
            sequences.tokens, sequences.num_new_tokens, state.is_finished))
        starts = np.array(sequences.prompt_lengths)
        num_ready = num_new.max() if is_finished.all() else num_new[~is_finished].min()
        for step in range(num_streamed, num_ready):  # slots after the end of a row hold padding
            streamer(tokens[np.arange(len(num_new)), starts + step])
        num_streamed = max(num_streamed, num_ready)
        if is_finished.all():
            return sequences.tokens, sequences.num_new_tokens, state.num_rounds
        state = _stream_round(models, params, encoder_memories, state, processor_params, rng,
                              static_config=static_config)
