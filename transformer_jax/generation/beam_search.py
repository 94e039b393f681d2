"""Beam search with the results of `GenerationMixin._beam_search` of Hugging Face Transformers 5.

A row is one prompt of the batch. At each step, the candidates are the C best continuations of the K
running sequences of a row. Candidates that end are added to the finished sequences if they are
among the first K. The score of a finished sequence is log-probability / length ** length_penalty,
where the length is the number of new tokens (Wu et al. 2016, "Google's Neural Machine Translation
System", section 7, without the constant 5). The K best candidates that do not end are the next
running sequences. C is so large that K candidates do not end, even if the others extend every
running sequence by every end-of-sequence token.

Shape suffixes: B batch, K beams, C candidates, L token slots of a sequence, N = B * K running
sequences, V vocabulary, M = K * V continuations of a row.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.generation.decoding import (
    Cache,
    GenerationInputs,
    decode_step,
    prefill_rows,
    transpose_kernels_for_decoding,
)
from transformer_jax.generation.logits_processors import (
    DecodingOptions,
    Sequences,
    apply_logits_processors,
)

NEG_INF = -1e9  # score of invalid entries; finite, so that sums with it keep their order


class FinishedBeams(NamedTuple):
    """The K best finished sequences of each row, best first.

    `scores` are log-probabilities divided by length ** length_penalty, `lengths` numbers of new
    tokens. `is_valid` is False at entries that hold no finished sequence yet.
    """

    tokens: Int[Array, "B K L"]
    scores: Float[Array, "B K"]
    lengths: Int[Array, "B K"]
    is_valid: Bool[Array, "B K"]


class BeamState(NamedTuple):
    """State of the search between two tokens.

    The K running sequences of a row are in order of decreasing score, a log-probability.
    `can_improve` is True at rows where one of them may still score higher than a finished one.
    `is_finished` is True when the search is over. `num_steps` counts forward passes, the prefill
    included.
    """

    sequences: Sequences
    scores: Float[Array, "B K"]
    finished: FinishedBeams
    can_improve: Bool[Array, "B"]
    is_finished: Bool[Array, ""]
    num_steps: Int[Array, ""]
    cache: Cache


def _extend_beams(
    state: BeamState, logits_NV: Float[Array, "N V"], options: DecodingOptions
) -> BeamState:
    """Extends every running sequence by one token and updates the finished sequences."""
    (B, K), C = state.scores.shape, options.num_beam_candidates
    V, L = logits_NV.shape[-1], state.sequences.tokens.shape[-1]
    rows_B1 = jnp.arange(B)[:, None]
    step = state.num_steps  # tokens generated so far

    # Candidates: the C best continuations of each row.
    log_probs_NV = apply_logits_processors(
        jax.nn.log_softmax(logits_NV, axis=-1), state.sequences, options)
    scores_BKV = log_probs_NV.reshape(B, K, V) + state.scores[:, :, None]
    scores_BM = scores_BKV.reshape(B, K * V)
    ranking_BM = scores_BM
    if options.do_sample:
        # The C largest scores with Gumbel noise are C samples without replacement (Kool et al.
        # 2019, "Stochastic Beams and Where to Find Them", section 2.3).
        key = jax.random.fold_in(options.rng, step)
        ranking_BM = scores_BM + jax.random.gumbel(key, scores_BM.shape)
    indices_BC = jax.lax.top_k(ranking_BM, C)[1]
    scores_BC = jnp.take_along_axis(scores_BM, indices_BC, axis=1)
    parents_BC, tokens_BC = indices_BC // V, indices_BC % V

    sequences_BCL = state.sequences.tokens.reshape(B, K, L)[rows_B1, parents_BC]
    positions_B = state.sequences.lengths[::K]
    sequences_BCL = sequences_BCL.at[rows_B1, jnp.arange(C), positions_B[:, None]].set(
        tokens_BC, mode="drop")
    is_end_BC = options.is_eos[tokens_BC] | (step + 1 >= options.max_new_tokens)

    # Finished sequences: only the first K candidates may finish; the others only continue.
    can_finish_BC = is_end_BC & (jnp.arange(C) < K)
    old = state.finished
    is_closed_B = (old.is_valid.all(-1) & options.early_stopping) | ~state.can_improve
    final_scores_BC = scores_BC / options.length_divisor[step]
    final_scores_BC = (final_scores_BC + jnp.where(is_closed_B[:, None], NEG_INF, 0)
                       + jnp.where(can_finish_BC, 0, NEG_INF))
    lengths_BC = jnp.full((B, C), step + 1)
    merged = [jnp.concatenate(pair, axis=1) for pair in zip(
        old, (sequences_BCL, final_scores_BC, lengths_BC, can_finish_BC))]
    best_BK = jax.lax.top_k(merged[1], K)[1]
    finished = FinishedBeams(*(x[rows_B1, best_BK] for x in merged))

    # Running sequences: the K best candidates that do not end.
    running_scores_BC = scores_BC + jnp.where(is_end_BC, NEG_INF, 0)
    next_BK = jax.lax.top_k(running_scores_BC, K)[1]
    scores_BK = running_scores_BC[rows_B1, next_BK]
    parents_N = (parents_BC[rows_B1, next_BK] + rows_B1 * K).reshape(-1)
    sequences = state.sequences._replace(
        tokens=sequences_BCL[rows_B1, next_BK].reshape(B * K, L),
        lengths=state.sequences.lengths + 1)
    cache = state.cache._replace(  # beams of a row have the same source
        self_attention=jax.tree.map(lambda x: x[parents_N], state.cache.self_attention))

    # Stopping rule.
    best_case_B1 = scores_BK[:, :1] / options.best_case_divisor[step]
    worst_BK = jnp.where(finished.is_valid, finished.scores.min(-1, keepdims=True), NEG_INF)
    can_improve_B = state.can_improve & (best_case_B1 > worst_BK).any(-1)
    is_full = finished.is_valid.all() & options.early_stopping
    is_over = ~can_improve_B.any() | is_full | is_end_BC.all()
    return BeamState(sequences, scores_BK, finished, can_improve_B, is_over, step + 1, cache)


def start(
    model, params: dict, inputs: GenerationInputs, options: DecodingOptions
) -> tuple[dict, BeamState]:
    """Adds the first new tokens. Returns the parameters in the layout for `step`, and the state."""
    B, K = len(inputs.prompts), options.rows_per_prompt
    logits_NV, cache, sequences = prefill_rows(model, params, inputs, options)
    # All beams start with the same prompt. Only the first one is extended in the first step, as
    # the others would yield duplicates.
    scores_BK = jnp.where(jnp.arange(K) == 0, jnp.zeros((B, 1)), NEG_INF)
    finished = FinishedBeams(
        sequences.tokens.reshape(B, K, -1), jnp.full((B, K), NEG_INF),
        jnp.zeros((B, K), jnp.int32), jnp.zeros((B, K), bool))
    state = BeamState(sequences, scores_BK, finished, can_improve=jnp.ones(B, bool),
                      is_finished=jnp.bool_(False), num_steps=jnp.int32(0), cache=cache)
    state = _extend_beams(state, logits_NV, options)
    return transpose_kernels_for_decoding(model, params), state


def step(model, params: dict, state: BeamState, options: DecodingOptions) -> BeamState:
    """Extends the beams by one token; `params` and the first `state` are results of `start`."""
    positions_N1 = state.sequences.lengths[:, None] - 1
    logits_N1V, cache = decode_step(
        model, params, state.sequences.tokens_at(positions_N1), positions_N1, state.cache)
    return _extend_beams(state._replace(cache=cache), logits_N1V[:, 0], options)
