"""Speculative decoding: a draft model proposes tokens, one pass of the target model verifies them.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1. The
result is that of the target model alone: the same tokens without sampling, and the same
distribution with sampling. Rows may accept different numbers of tokens, because cache slots are
indexed by position.

Shape suffixes: B batch, L token slots of a row, G draft tokens, P = G + 1 verified positions,
V vocabulary.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.generation import decoding
from transformer_jax.generation.decoding import DecodeState, decode_step, select_token
from transformer_jax.generation.logits_processors import DecodingOptions, apply_logits_processors
from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer


class ModelPair(NamedTuple):
    """One value for the target model and one for the draft model (models, parameters, caches)."""

    target: Any
    draft: Any


def pair_with_draft(
    model: GPT | Transformer, params: dict, assistant_model: tuple[GPT | Transformer, dict]
) -> tuple[ModelPair, ModelPair]:
    """Checks the draft model. Returns the pairs of models and of their parameters."""
    try:
        draft, draft_params = assistant_model
    except TypeError:
        raise ValueError(f"assistant_model is a {type(assistant_model).__name__}; give the pair "
                         "(model, params)") from None
    if not any(isinstance(model, t) and isinstance(draft, t) for t in (GPT, Transformer)):
        raise ValueError(f"assistant_model is a {type(draft).__name__} and model a "
                         f"{type(model).__name__}; both must be GPT models, or both "
                         "encoder-decoders")
    sizes = model.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"assistant_model has a vocabulary of {sizes[1]} and model one of "
                         f"{sizes[0]}; they must share a tokenizer")
    return ModelPair(model, draft), ModelPair(params, draft_params)


def verify_greedy(
    scores: Float[Array, "B P V"], draft_tokens: Int[Array, "B G"]
) -> tuple[Int[Array, "B P"], Int[Array, "B"]]:
    """Accepts draft tokens up to the first that is not the target model's argmax.

    Returns the argmax tokens, and the number n of accepted draft tokens in each row. Append the
    first n + 1 tokens of a row, and ignore the rest.
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
    normalized, if a token was rejected, and from p otherwise. Scores are logits. Returns the
    resulting tokens and the numbers of accepted draft tokens, in the form of `verify_greedy`.
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


def start(
    models: ModelPair, params: ModelPair, inputs: decoding.GenerationInputs,
    options: DecodingOptions,
) -> tuple[ModelPair, DecodeState]:
    """Processes the prompts with both models; the target model selects the first tokens.

    Returns the parameters in the layout for `step`, and the state, whose cache is a `ModelPair`.
    """
    (target_params, state), (draft_params, draft_state) = (
        decoding.start(*pair, inputs, options) for pair in zip(models, params))
    state = state._replace(cache=ModelPair(state.cache, draft_state.cache))
    return ModelPair(target_params, draft_params), state


def step(
    models: ModelPair, params: ModelPair, state: DecodeState, options: DecodingOptions
) -> DecodeState:
    """Drafts G tokens, verifies them, and appends at least one token to each unfinished row."""
    G, sequences = options.num_draft_tokens, state.sequences
    draft_key, verify_key = jax.random.split(jax.random.fold_in(options.rng, state.num_steps))

    def draft_token(carry, key):
        # The last token is not in the draft cache, and neither is the one before it if all draft
        # tokens of the previous round were accepted; so each step processes the last two tokens.
        sequences, cache = carry
        positions_B2 = sequences.lengths[:, None] + jnp.array([-2, -1])
        logits_B2V, cache = decode_step(
            models.draft, params.draft, sequences.tokens_at(positions_B2), positions_B2, cache)
        scores_BV = apply_logits_processors(logits_B2V[:, 1], sequences, options)
        token_B = select_token(scores_BV, key, options.do_sample)
        outputs = token_B, scores_BV if options.do_sample else None
        return (sequences.append(token_B), cache), outputs

    (drafted, draft_cache), (draft_tokens_GB, draft_scores_GBV) = jax.lax.scan(
        draft_token, (sequences, state.cache.draft), jax.random.split(draft_key, G))
    draft_tokens_BG = draft_tokens_GB.T

    offsets_P = jnp.arange(G + 1)
    positions_BP = sequences.lengths[:, None] - 1 + offsets_P
    tokens_BP = jnp.concatenate(
        [sequences.tokens_at(positions_BP[:, :1]), draft_tokens_BG], axis=1)
    logits_BPV, cache = decode_step(
        models.target, params.target, tokens_BP, positions_BP, state.cache.target)
    scores_BPV = jax.vmap(
        lambda logits_BV, offset: apply_logits_processors(
            logits_BV, drafted._replace(lengths=sequences.lengths + offset), options),
        in_axes=(1, 0), out_axes=1,
    )(logits_BPV, offsets_P)
    if options.do_sample:
        draft_scores_BGV = jnp.moveaxis(draft_scores_GBV, 0, 1)
        new_BP, num_accepted_B = verify_sampled(
            scores_BPV, draft_scores_BGV, draft_tokens_BG, verify_key)
    else:
        new_BP, num_accepted_B = verify_greedy(scores_BPV, draft_tokens_BG)

    # Append up to the first end-of-sequence token, and at most `max_new_tokens` in all.
    is_new_BP = offsets_P <= num_accepted_B[:, None]
    is_eos_BP = options.is_eos[new_BP]
    is_after_eos_BP = (jnp.cumsum(is_eos_BP, axis=1) - is_eos_BP) > 0
    num_new_B = sequences.num_new_tokens
    is_within_BP = num_new_B[:, None] + offsets_P < options.max_new_tokens
    is_new_BP &= ~is_after_eos_BP & is_within_BP & ~state.is_finished[:, None]
    rows_B1 = jnp.arange(len(new_BP))[:, None]
    out_of_range = sequences.tokens.shape[1]
    slots_BP = jnp.where(is_new_BP, sequences.lengths[:, None] + offsets_P, out_of_range)
    sequences = sequences._replace(
        tokens=sequences.tokens.at[rows_B1, slots_BP].set(new_BP, mode="drop"),
        lengths=sequences.lengths + is_new_BP.sum(-1),
    )
    is_finished_B = (state.is_finished | (is_eos_BP & is_new_BP).any(-1)
                     | (sequences.num_new_tokens >= options.max_new_tokens))
    return DecodeState(
        sequences, is_finished_B, state.num_steps + 1, ModelPair(cache, draft_cache))
