"""Beam search: the best texts, several of them kept in parallel.

The bookkeeping is that of Hugging Face Transformers 5 (`GenerationMixin._beam_search`), so that
texts come out the same: from all continuations of a row's K running texts the best C are looked at;
those among the first K that end go to the finished texts, by their score over length ** penalty
(Wu et al. 2016, "Google's Neural Machine Translation System", section 7, without the constant 5);
the best K others run on. C leaves K others even if every end token is taken.

Shape suffixes: B batch, K beams, C candidates, L slots of a text, N = B * K rows, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.generation.decode_loop import init_sequences
from transformer_jax.generation.kernel_layout import transpose_kernels
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    Sequences,
    StaticGenerationConfig,
    apply_logits_processors,
)
from transformer_jax.generation.prefill import Cache, Inputs, decode_step, prefill

NEG_INF = -1e9  # the score of what is no candidate; finite, so that sums keep their order


class Search(NamedTuple):
    """When to stop, and how texts of unequal length compare. Traced."""

    length_divisor: Float[Array, "L"]  # at n - 1: n ** length_penalty
    best_divisor: Float[Array, "L"]  # the same for the length at which a running text may end
    stop_when_full: Bool[Array, ""]  # stop with K finished texts, though better ones may come


class Finished(NamedTuple):
    """The best finished texts of each row, best first."""

    tokens: Int[Array, "B K L"]
    scores: Float[Array, "B K"]
    lengths: Int[Array, "B K"]  # new tokens
    filled: Bool[Array, "B K"]


class BeamState(NamedTuple):
    text: Sequences  # N running texts, the best of each row first
    scores: Float[Array, "B K"]  # sums of log probabilities
    finished: Finished
    can_improve: Bool[Array, "B"]  # a running text may still become better than a finished one
    running: Bool[Array, ""]
    cache: Cache


def _select(state: BeamState, logits_NV, rules: LogitsProcessorParams, search: Search, rng, plan: StaticGenerationConfig) -> BeamState:
    """One more token in every running text."""
    (B, K), C = state.scores.shape, plan.num_candidates
    V, L = logits_NV.shape[-1], state.text.tokens.shape[-1]
    rows_B1 = jnp.arange(B)[:, None]
    step = state.text.new[0]

    scores_NV = apply_logits_processors(jax.nn.log_softmax(logits_NV, axis=-1), state.text, rules, plan)
    sums_BKV = scores_NV.reshape(B, K, V) + state.scores[:, :, None]
    sums_BM = sums_BKV.reshape(B, K * V)
    drawn_BM = sums_BM
    if plan.do_sample:
        # The best C of scores with Gumbel noise are C draws without putting back (Kool et al.
        # 2019, section 2.3).
        drawn_BM = sums_BM + jax.random.gumbel(jax.random.fold_in(rng, step), sums_BM.shape)
    picked_BC = jax.lax.top_k(drawn_BM, C)[1]
    sums_BC = jnp.take_along_axis(sums_BM, picked_BC, axis=1)
    parents_BC, tokens_BC = picked_BC // V, picked_BC % V

    texts_BCL = state.text.tokens.reshape(B, K, L)[rows_B1, parents_BC]
    places_B = state.text.lengths[::K]
    texts_BCL = texts_BCL.at[rows_B1, jnp.arange(C), places_B[:, None]].set(tokens_BC, mode="drop")
    ends_BC = rules.is_end[tokens_BC] | (step + 1 >= rules.max_new_tokens)

    # Only the first K candidates may finish; the others are there to run on.
    finishing_BC = ends_BC & (jnp.arange(C) < K)
    old = state.finished
    closed_B = (old.filled.all(-1) & search.stop_when_full) | ~state.can_improve
    rated_BC = sums_BC / search.length_divisor[step]
    rated_BC = rated_BC + jnp.where(closed_B[:, None], NEG_INF, 0) + jnp.where(finishing_BC, 0, NEG_INF)
    lengths_BC = jnp.full((B, C), step + 1)
    merged = [jnp.concatenate(pair, axis=1) for pair in zip(
        old, (texts_BCL, rated_BC, lengths_BC, finishing_BC))]
    best_BK = jax.lax.top_k(merged[1], K)[1]
    finished = Finished(*(x[rows_B1, best_BK] for x in merged))

    running_BC = sums_BC + jnp.where(ends_BC, NEG_INF, 0)
    next_BK = jax.lax.top_k(running_BC, K)[1]
    scores_BK = running_BC[rows_B1, next_BK]
    parents_N = (parents_BC[rows_B1, next_BK] + rows_B1 * K).reshape(-1)
    text = state.text._replace(
        tokens=texts_BCL[rows_B1, next_BK].reshape(B * K, L), lengths=state.text.lengths + 1)
    cache = jax.tree.map(lambda x: x[parents_N], state.cache)

    hoped_B1 = scores_BK[:, :1] / search.best_divisor[step]
    worst_BK = jnp.where(finished.filled, finished.scores.min(-1, keepdims=True), NEG_INF)
    can_improve_B = state.can_improve & (hoped_B1 > worst_BK).any(-1)
    full = finished.filled.all() & search.stop_when_full
    running = can_improve_B.any() & ~full & ~ends_BC.all()
    return BeamState(text, scores_BK, finished, can_improve_B, running, cache)


@functools.partial(jax.jit, static_argnames=("model", "plan"))
def beam_search(
    model, params: dict, inputs: Inputs, rules: LogitsProcessorParams, search: Search, rng: Key[Array, ""], *,
    plan: StaticGenerationConfig,
) -> Finished:
    """The best texts of each row; scores are sums of log probabilities over length ** penalty."""
    B, K = len(inputs.prompt), plan.copies
    logits_NV, cache, source = prefill(model, params, inputs, plan.cache_length, K)
    text = init_sequences(inputs, rules, plan)
    # Beams begin alike: only the first may have continuations, or they would stay alike.
    scores_BK = jnp.where(jnp.arange(K) == 0, jnp.zeros((B, 1)), NEG_INF)
    finished = Finished(
        text.tokens.reshape(B, K, -1), jnp.full((B, K), NEG_INF), jnp.zeros((B, K), jnp.int32),
        jnp.zeros((B, K), bool),
    )
    state = BeamState(text, scores_BK, finished, jnp.ones(B, bool), jnp.bool_(True), cache)
    state = _select(state, logits_NV, rules, search, rng, plan)

    params = transpose_kernels(params, model.config.compute_dtype)

    def advance(state):
        last_N1 = state.text.lengths[:, None] - 1
        logits_N1V, cache = decode_step(
            model, params, state.text.at(last_N1), last_N1, state.cache, source)
        return _select(state._replace(cache=cache), logits_N1V[:, 0], rules, search, rng, plan)

    return jax.lax.while_loop(lambda state: state.running, advance, state).finished
