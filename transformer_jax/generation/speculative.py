"""Speculative decoding: a small model proposes tokens, the large one judges them all at once.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1. The
text is the large model's: without sampling the very tokens it would have written alone, with
sampling drawn from the very same distribution. Rows may accept unequal numbers of tokens, as the
cache of a row is by position.

Shape suffixes: B rows, G proposed tokens, P = G + 1 judged places, V vocabulary.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.generation.decode_loop import init_sequences, pick
from transformer_jax.generation.kernel_layout import transpose_kernels
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    Sequences,
    StaticGenerationConfig,
    apply_logits_processors,
)
from transformer_jax.generation.prefill import decode_step, prefill


class ModelPair(NamedTuple):
    """What the large model has, and its like of the small one."""

    target: Any
    draft: Any


class SpeculativeState(NamedTuple):
    """Between two rounds. Rows that are done get no more tokens."""

    text: Sequences
    done: Bool[Array, "B"]
    rounds: Int[Array, ""]
    caches: ModelPair


def verify_greedy(
    scores: Float[Array, "B P V"], proposed: Int[Array, "B G"]
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """The best tokens, and how many of them were proposed before the first that was not."""
    best_BP = scores.argmax(-1).astype(jnp.int32)
    return best_BP, _run_length(best_BP[:, :-1] == proposed)


def verify_sampled(
    scores: Float[Array, "B P V"],
    draft_scores: Float[Array, "B G V"],
    proposed: Int[Array, "B G"],
    key: Key[Array, ""],
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """Accept a token drawn from q with probability min(1, p / q); after the first refusal draw
    from max(0, p - q), normalised, and after none from p (algorithm 1)."""
    B, G = proposed.shape
    rows_B = jnp.arange(B)
    key, next_key = jax.random.split(key)
    p_BPV, q_BGV = jax.nn.softmax(scores, -1), jax.nn.softmax(draft_scores, -1)
    p_BG, q_BG = (jnp.take_along_axis(x[:, :G], proposed[..., None], axis=2)[..., 0]
                  for x in (p_BPV, q_BGV))
    accepted_B = _run_length(jax.random.uniform(key, (B, G)) * q_BG < p_BG)
    p_BV = p_BPV[rows_B, accepted_B]
    q_BV = jnp.pad(q_BGV, ((0, 0), (0, 1), (0, 0)))[rows_B, accepted_B]
    rest_BV = jnp.maximum(p_BV - q_BV, 0)
    # Where p and q are equal but for rounding there is no rest, and p is as good.
    rest_BV = jnp.where(rest_BV.sum(-1, keepdims=True) > 0, rest_BV, p_BV)
    next_B = jax.random.categorical(next_key, jnp.log(rest_BV)).astype(jnp.int32)
    tokens_BP = jnp.pad(proposed, ((0, 0), (0, 1))).at[rows_B, accepted_B].set(next_B)
    return tokens_BP, accepted_B


def _run_length(flags_BG):
    return jnp.cumprod(flags_BG.astype(jnp.int32), axis=-1).sum(-1)


def _begin(models, params, inputs, rules, rng, plan):
    (logits_BV, cache, source), (_, draft_cache, draft_source) = (
        prefill(models[i], params[i], inputs[i], plan.cache_length, plan.copies) for i in (0, 1))
    text = init_sequences(inputs.target, rules, plan)
    key = jax.random.fold_in(rng, 0)
    token_B = pick(apply_logits_processors(logits_BV, text, rules, plan), key, plan)
    done_B = rules.is_end[token_B] | (rules.max_new_tokens <= 1)
    state = SpeculativeState(text.append(token_B), done_B, jnp.int32(1), ModelPair(cache, draft_cache))
    return state, ModelPair(source, draft_source)


def _advance(models, params, sources, state, rules, rng, plan):
    """One round: G tokens proposed, judged, and at least one more in each row that is not done."""
    G, text = plan.draft_length, state.text
    key, judge_key = jax.random.split(jax.random.fold_in(rng, state.rounds))

    def propose(carry, key):
        # The draft has not seen the last token, nor the one before it where that is the end of a
        # proposal accepted in full.
        text, cache = carry
        places_B2 = text.lengths[:, None] + jnp.array([-2, -1])
        logits_B2V, cache = decode_step(models[1], params[1], text.at(places_B2), places_B2, cache,
                                    sources.draft)
        scores_BV = apply_logits_processors(logits_B2V[:, 1], text, rules, plan)
        token_B = pick(scores_BV, key, plan)
        return (text.append(token_B), cache), (token_B, scores_BV if plan.do_sample else None)

    (drafted, draft_cache), (proposed_GB, draft_scores_GBV) = jax.lax.scan(
        propose, (text, state.caches.draft), jax.random.split(key, G))
    proposed_BG = proposed_GB.T

    ahead_P = jnp.arange(G + 1)
    places_BP = text.lengths[:, None] - 1 + ahead_P
    tokens_BP = jnp.concatenate([text.at(places_BP[:, :1]), proposed_BG], axis=1)
    logits_BPV, cache = decode_step(models[0], params[0], tokens_BP, places_BP, state.caches.target,
                                sources.target)
    scores_BPV = jax.vmap(
        lambda logits_BV, n: apply_logits_processors(
            logits_BV, drafted._replace(lengths=text.lengths + n), rules, plan),
        in_axes=(1, 0), out_axes=1,
    )(logits_BPV, ahead_P)
    if plan.do_sample:
        draft_scores_BGV = jnp.moveaxis(draft_scores_GBV, 0, 1)
        new_BP, accepted_B = verify_sampled(scores_BPV, draft_scores_BGV, proposed_BG, judge_key)
    else:
        new_BP, accepted_B = verify_greedy(scores_BPV, proposed_BG)

    # The text goes on to the first end token, and not beyond its greatest length.
    is_new_BP = ahead_P <= accepted_B[:, None]
    is_end_BP = rules.is_end[new_BP]
    after_end_BP = (jnp.cumsum(is_end_BP, axis=1) - is_end_BP) > 0
    within_BP = text.new[:, None] + ahead_P < rules.max_new_tokens
    is_new_BP &= ~after_end_BP & within_BP & ~state.done[:, None]
    rows_B1 = jnp.arange(len(new_BP))[:, None]
    slots_BP = jnp.where(is_new_BP, text.lengths[:, None] + ahead_P, text.tokens.shape[1])
    text = text._replace(
        tokens=text.tokens.at[rows_B1, slots_BP].set(new_BP, mode="drop"),
        lengths=text.lengths + is_new_BP.sum(-1),
    )
    done_B = state.done | (is_end_BP & is_new_BP).any(-1) | (text.new >= rules.max_new_tokens)
    return SpeculativeState(text, done_B, state.rounds + 1, ModelPair(cache, draft_cache))


@functools.partial(jax.jit, static_argnames="models")
def _by_outputs(models, params):
    return ModelPair(*(transpose_kernels(p, m.config.compute_dtype) for m, p in zip(models, params)))


@functools.partial(jax.jit, static_argnames=("models", "plan"))
def decode_speculative(
    models: ModelPair, params: ModelPair, inputs: ModelPair, rules: LogitsProcessorParams, rng: Key[Array, ""], *, plan: StaticGenerationConfig
) -> tuple[Int[Array, "B L"], Int[Array, "B"], Int[Array, ""]]:
    """Tokens of each row by position, the number of new ones, and how many rounds it took."""
    state, sources = _begin(models, params, inputs, rules, rng, plan)
    params = _by_outputs(models, params)
    state = jax.lax.while_loop(
        lambda state: ~state.done.all(),
        lambda state: _advance(models, params, sources, state, rules, rng, plan),
        state,
    )
    return state.text.tokens, state.text.new, state.rounds


_first = jax.jit(_begin, static_argnames=("models", "plan"))
_next = jax.jit(_advance, static_argnames=("models", "plan"), donate_argnames="state")


def decode_speculative_streaming(
    models: ModelPair, params: ModelPair, inputs: ModelPair, rules: LogitsProcessorParams, rng, *, plan: StaticGenerationConfig,
    streamer: Callable[[Int[np.ndarray, "B"]], None],
) -> tuple[Int[Array, "B L"], Int[Array, "B"], Int[Array, ""]]:
    """As `write`; a column of tokens is given to `streamer` as soon as every row has it."""
    state, sources = _first(models, params, inputs, rules, rng, plan=plan)
    params = _by_outputs(models, params)
    told = 0
    while True:
        tokens, new, done = (np.array(x) for x in (state.text.tokens, state.text.new, state.done))
        starts = np.array(state.text.prompt_lengths)
        known = new.max() if done.all() else new[~done].min()
        for step in range(told, known):  # slots behind the end of a row hold padding
            streamer(tokens[np.arange(len(new)), starts + step])
        told = max(told, known)
        if done.all():
            return state.text.tokens, state.text.new, state.rounds
        state = _next(models, params, sources, state, rules, rng, plan=plan)
