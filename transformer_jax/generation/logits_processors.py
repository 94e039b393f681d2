"""Logits processors: pure functions that modify the scores of the next token.

A processor takes scores `[B, V]` (logits, or log-probabilities in a beam search) and returns scores
of the same shape, in which forbidden tokens are -inf. Users' own processors are functions too:

    def forbid_token_7(scores, sequences):
        return scores.at[:, 7].set(-jnp.inf)

    generate(model, params, prompts, logits_processors=[forbid_token_7])

Shape suffixes: B decoded rows (each beam or sample of a prompt is one), L token slots of a row,
V vocabulary, W n-gram windows or forbidden token sequences, M length of the longest forbidden
token sequence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key


class Sequences(NamedTuple):
    """The token ids of each row so far: the prompt, then the generated tokens.

    Slot `s` of a row holds the token at position `s`. `lengths` includes the prompt; the contents
    of slots at and after it are ignored.
    """

    tokens: Int[Array, "B L"]
    lengths: Int[Array, "B"]
    prompt_lengths: Int[Array, "B"]

    @property
    def num_new_tokens(self) -> Int[Array, "B"]:
        """The number of generated tokens of each row."""
        return self.lengths - self.prompt_lengths

    @property
    def last_tokens(self) -> Int[Array, "B"]:
        """The last token of each row."""
        return self.tokens_at(self.lengths[:, None] - 1)[:, 0]

    def tokens_at(self, positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """Returns the tokens at `positions`, which are clipped to the slots of the row."""
        return jnp.take_along_axis(self.tokens, positions, axis=1, mode="clip")

    def append(
        self, token_B: Int[Array, "B"], is_extended_B: Bool[Array, "B"] | bool = True
    ) -> "Sequences":
        """Appends one token to some rows. Tokens beyond the last slot are dropped."""
        B, L = self.tokens.shape
        slots_B = jnp.where(is_extended_B, self.lengths, L)
        tokens_BL = self.tokens.at[jnp.arange(B), slots_B].set(token_B, mode="drop")
        return self._replace(tokens=tokens_BL, lengths=self.lengths + is_extended_B)


LogitsProcessor = Callable[[Float[Array, "B V"], Sequences], Float[Array, "B V"]]
"""A function `(scores, sequences) -> scores`: the float32 scores of the next token, and the tokens
of each row so far (`sequences.tokens` up to `sequences.lengths`, `sequences.num_new_tokens`)."""


def _static(default: Any) -> Any:
    return dataclasses.field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """Options of the decoding algorithms: a pytree of arrays, with static fields.

    New values of the arrays do not recompile; new values of the static fields do. Fields without a
    comment are those of `GenerateOptions`.
    """

    rng: Key[Array, ""]
    max_new_tokens: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    pad_token_id: Int[Array, ""]
    is_eos: Bool[Array, "V"]  # True at the end-of-sequence tokens
    forced_bos: Bool[Array, "V"]  # True at the only tokens allowed as the first; all False if free
    forced_eos: Bool[Array, "V"]  # likewise for new token number `max_new_tokens`
    suppressed: Bool[Array, "V"]
    begin_suppressed: Bool[Array, "V"]  # applies to new token number `begin_index`
    begin_index: Int[Array, ""]  # 0, or 1 if the first new token is forced
    repetition_penalty: Float[Array, ""]
    bad_words: Int[Array, "W M"]  # aligned on the right and padded with -1 on the left
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # V for no limit
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    # Beam search only. At index n - 1: n ** length_penalty, and m ** length_penalty for the final
    # length m that the stopping rule assumes for a running sequence of n new tokens.
    length_divisor: Float[Array, "L"] | None = None
    best_case_divisor: Float[Array, "L"] | None = None
    early_stopping: Bool[Array, ""] | None = None  # True; "never" is in `best_case_divisor`
    cache_length: int = _static(0)  # number of slots of the KV cache, and of tokens, of each row
    do_sample: bool = _static(False)
    rows_per_prompt: int = _static(1)  # beams or samples
    no_repeat_ngram_size: int = _static(0)
    num_beam_candidates: int = _static(0)  # for each prompt and step; 0 without beam search
    num_draft_tokens: int = _static(0)  # in one round; 0 without a draft model
    min_tokens_to_keep: int = _static(1)  # by `top_k`, `top_p` and `min_p`
    logits_processors: tuple[LogitsProcessor, ...] = _static(())


def apply_logits_processors(
    scores: Float[Array, "B V"], sequences: Sequences, options: DecodingOptions
) -> Float[Array, "B V"]:
    """Applies all logits processors, in the order of Hugging Face Transformers.

    The user's own processors follow the constraints. Temperature, top-k, top-p and min-p come last,
    and only if `options.do_sample`.
    """
    p, step_B1 = options, sequences.num_new_tokens[:, None]
    scores = penalize_repetition(scores, sequences, p.repetition_penalty)
    if p.no_repeat_ngram_size:
        scores = forbid_repeated_ngrams(scores, sequences, p.no_repeat_ngram_size)
    if len(p.bad_words):
        scores = forbid_bad_words(scores, sequences, p.bad_words)
    scores = suppress_tokens(scores, p.is_eos & (step_B1 < p.min_new_tokens))
    scores = force_tokens(scores, p.forced_bos, step_B1 == 0)
    scores = force_tokens(scores, p.forced_eos, step_B1 == p.max_new_tokens - 1)
    scores = suppress_tokens(scores, p.suppressed)
    scores = suppress_tokens(scores, p.begin_suppressed & (step_B1 == p.begin_index))
    for processor in p.logits_processors:
        scores = _apply_custom(processor, scores, sequences)
    if p.do_sample:
        scores = scores / p.temperature
        scores = keep_top_k(scores, p.top_k, p.min_tokens_to_keep)
        scores = keep_top_p(scores, p.top_p, p.min_tokens_to_keep)
        scores = keep_min_p(scores, p.min_p, p.min_tokens_to_keep)
    return scores


def _apply_custom(processor: LogitsProcessor, scores: Array, sequences: Sequences) -> Any:
    out = processor(scores, sequences)
    if getattr(out, "shape", None) != scores.shape:
        found = f"shape {out.shape}" if hasattr(out, "shape") else f"a {type(out).__name__}"
        raise ValueError(f"the logits processor {getattr(processor, '__name__', processor)} "
                         f"returned {found}; it must return scores of shape {scores.shape}")
    return out


def suppress_tokens(scores: Float[Array, "B V"], mask: Bool[Array, "..."]) -> Float[Array, "B V"]:
    """Sets scores to -inf where `mask` is True."""
    return jnp.where(mask, -jnp.inf, scores)


def force_tokens(
    scores: Float[Array, "B V"], forced: Bool[Array, "V"], rows: Bool[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Allows only the tokens `forced` (if any), with score 0, in the rows where `rows` is True."""
    return jnp.where(rows & forced.any(), jnp.where(forced, 0.0, -jnp.inf), scores)


def penalize_repetition(
    scores: Float[Array, "B V"], sequences: Sequences, penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Penalizes tokens that occur in the sequence (Keskar et al. 2019, "CTRL", section 4.1).

    Their scores are divided by `penalty` where positive and multiplied by it where negative; the
    case of negative scores is as in Hugging Face Transformers.
    """
    def penalized(scores):
        is_token_BL = jnp.arange(sequences.tokens.shape[1]) < sequences.lengths[:, None]
        seen_BV = _tokens_to_mask(sequences.tokens, is_token_BL, scores.shape[1])
        return jnp.where(seen_BV, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)

    return jax.lax.cond(penalty != 1, penalized, lambda scores: scores, scores)


def forbid_repeated_ngrams(
    scores: Float[Array, "B V"], sequences: Sequences, size: int
) -> Float[Array, "B V"]:
    """Forbids tokens that would complete an n-gram of `size` tokens for the second time.

    Paulus et al. 2017, "A Deep Reinforced Model for Abstractive Summarization", section 2.5.
    N-grams of the prompt count.
    """
    L = sequences.tokens.shape[1]
    num_windows = max(L - size + 1, 0)
    starts_W = jnp.arange(num_windows)
    last_start_B = sequences.lengths - size + 1  # of the n-gram that the next token completes
    matches_BW = starts_W + size <= sequences.lengths[:, None]
    for i in range(size - 1):
        token_B1 = sequences.tokens_at((last_start_B + i)[:, None])
        matches_BW &= sequences.tokens[:, i : i + num_windows] == token_B1
    last_tokens_BW = sequences.tokens[:, size - 1 :]
    return suppress_tokens(scores, _tokens_to_mask(last_tokens_BW, matches_BW, scores.shape[1]))


def forbid_bad_words(
    scores: Float[Array, "B V"], sequences: Sequences, bad_words: Int[Array, "W M"]
) -> Float[Array, "B V"]:
    """Forbids tokens that would complete a row of `bad_words` (see `DecodingOptions`)."""
    M = bad_words.shape[1]
    positions_BM = sequences.lengths[:, None] + jnp.arange(1 - M, 0)
    # Positions before the start of a sequence get -2, which matches no token.
    suffix_BM = jnp.where(positions_BM < 0, -2, sequences.tokens_at(positions_BM))
    prefixes_WM, last_tokens_W = bad_words[:, :-1], bad_words[:, -1]
    matches_BW = ((prefixes_WM == -1) | (prefixes_WM == suffix_BM[:, None])).all(-1)
    last_tokens_BW = jnp.broadcast_to(last_tokens_W, matches_BW.shape)
    mask_BV = _tokens_to_mask(last_tokens_BW, matches_BW & (last_tokens_W >= 0), scores.shape[1])
    return suppress_tokens(scores, mask_BV)


def _tokens_to_mask(tokens_BW, is_selected_BW, V):
    """Returns a mask `[B, V]` that is True at the selected tokens of each row."""
    rows_B1 = jnp.arange(len(tokens_BW))[:, None]
    mask_BV = jnp.zeros((len(tokens_BW), V), bool)
    return mask_BV.at[rows_B1, jnp.where(is_selected_BW, tokens_BW, V)].set(True, mode="drop")


def keep_top_k(
    scores: Float[Array, "B V"], k: Int[Array, ""], min_tokens_to_keep: int = 1
) -> Float[Array, "B V"]:
    """Keeps the k tokens with the highest scores, and those that tie with the k-th.

    Fan et al. 2018, "Hierarchical Neural Story Generation", section 5.4.
    """
    V = scores.shape[-1]

    def kept(scores):
        index = jnp.clip(jnp.maximum(k, min_tokens_to_keep), 1, V) - 1
        threshold_B1 = jax.lax.dynamic_slice_in_dim(_sort_descending(scores), index, 1, axis=-1)
        return suppress_tokens(scores, scores < threshold_B1)

    return jax.lax.cond(k < V, kept, lambda scores: scores, scores)


def keep_top_p(
    scores: Float[Array, "B V"], p: Float[Array, ""], min_tokens_to_keep: int = 1
) -> Float[Array, "B V"]:
    """Keeps the nucleus: the smallest set of most probable tokens with total probability >= p.

    Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration", section 3.1. Tokens that
    tie with the last one of the set are kept too.
    """
    def kept(scores):
        sorted_BV = _sort_descending(scores)
        probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
        sum_before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
        in_nucleus_BV = (sum_before_BV < p) | (jnp.arange(scores.shape[-1]) < min_tokens_to_keep)
        threshold_B1 = jnp.where(in_nucleus_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        return suppress_tokens(scores, scores < threshold_B1)

    return jax.lax.cond(p < 1, kept, lambda scores: scores, scores)


def keep_min_p(
    scores: Float[Array, "B V"], p: Float[Array, ""], min_tokens_to_keep: int = 1
) -> Float[Array, "B V"]:
    """Keeps tokens whose probability is at least `p` times that of the most probable token.

    Nguyen et al. 2024, "Turning Up the Heat: Min-p Sampling", section 3.
    """
    probs_BV = jax.nn.softmax(scores, axis=-1)
    is_low_BV = probs_BV < p * probs_BV.max(-1, keepdims=True)
    if min_tokens_to_keep > 1:
        top_BK = jax.lax.top_k(scores, min(min_tokens_to_keep, scores.shape[-1]))[0]
        is_low_BV &= scores < top_BK[:, -1:]
    return suppress_tokens(scores, is_low_BV)


def _sort_descending(scores_BV):
    return -jnp.sort(-scores_BV, axis=-1)
