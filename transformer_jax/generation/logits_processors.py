"""Logits processors: pure functions that modify the scores of the next token.

A processor takes scores `[B, V]` (logits, or log-probabilities in a beam search) and returns scores
of the same shape, in which forbidden tokens are -inf. `apply_logits_processors` applies all of them
in the order of Hugging Face Transformers.

Shape suffixes: B batch, L token slots of a row, V vocabulary, W n-gram windows or forbidden token
sequences, M length of the longest forbidden token sequence.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


class Sequences(NamedTuple):
    """The token ids of each row so far: the prompt, then the generated tokens.

    Slot `s` of a row holds the token at position `s`. The contents of slots at and after `lengths`
    are ignored.

    Attributes:
        tokens: token ids by position.
        lengths: number of tokens of each row, the prompt included.
        prompt_lengths: number of prompt tokens of each row.
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

    def append(self, token_B: Int[Array, "B"]) -> "Sequences":
        """Appends one token to each row. Tokens beyond the last slot are dropped."""
        rows_B = jnp.arange(len(token_B))
        tokens_BL = self.tokens.at[rows_B, self.lengths].set(token_B, mode="drop")
        return self._replace(tokens=tokens_BL, lengths=self.lengths + 1)


class LogitsProcessorParams(NamedTuple):
    """Parameters of the logits processors.

    They are traced arguments of the compiled functions, so that new values do not recompile.

    Attributes:
        max_new_tokens: maximum number of generated tokens.
        min_new_tokens: number of tokens before which no end-of-sequence token is generated.
        pad_token_id: token id that fills rows which are finished.
        is_eos: True at the end-of-sequence tokens.
        forced_bos: the first new token is forced to be one where this is True; all False for none.
        forced_eos: likewise for the last token of a sequence of `max_new_tokens` tokens.
        suppressed: True at tokens that are never generated.
        begin_suppressed: True at tokens that are not generated as new token number `begin_index`.
        begin_index: 0, or 1 if the first new token is forced.
        repetition_penalty: 1 for no penalty.
        bad_words: forbidden token sequences, aligned on the right and padded with -1 on the left.
        temperature: divisor of the scores when sampling.
        top_k: V for no limit.
        top_p: 1 for no limit.
        min_p: 0 for no limit.
    """

    max_new_tokens: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    pad_token_id: Int[Array, ""]
    is_eos: Bool[Array, "V"]
    forced_bos: Bool[Array, "V"]
    forced_eos: Bool[Array, "V"]
    suppressed: Bool[Array, "V"]
    begin_suppressed: Bool[Array, "V"]
    begin_index: Int[Array, ""]
    repetition_penalty: Float[Array, ""]
    bad_words: Int[Array, "W M"]
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]


class StaticGenerationConfig(NamedTuple):
    """Static (compile-time) configuration of a decoding loop: new values recompile.

    Attributes:
        cache_length: number of slots of the KV cache, and of tokens, of each row.
        do_sample: sample instead of taking the argmax.
        rows_per_prompt: sequences decoded in parallel for each prompt (beams or samples).
        no_repeat_ngram_size: length of n-grams that may not repeat; 0 for no limit.
        num_beam_candidates: continuations considered at each step of a beam search, for each
            prompt; 0 without beam search.
        num_draft_tokens: tokens that the draft model proposes in one round of speculative decoding.
        min_tokens_to_keep: minimum number of tokens that `top_k`, `top_p` and `min_p` keep.
    """

    cache_length: int
    do_sample: bool = False
    rows_per_prompt: int = 1
    no_repeat_ngram_size: int = 0
    num_beam_candidates: int = 0
    num_draft_tokens: int = 0
    min_tokens_to_keep: int = 1


def apply_logits_processors(
    scores: Float[Array, "B V"],
    sequences: Sequences,
    processor_params: LogitsProcessorParams,
    static_config: StaticGenerationConfig,
) -> Float[Array, "B V"]:
    """Applies all logits processors, in the order of Hugging Face Transformers.

    Temperature, top-k, top-p and min-p apply only if `static_config.do_sample`.

    Args:
        scores: logits or log-probabilities of the next token.
        sequences: the tokens of each row so far.
        processor_params: parameters of the processors.
        static_config: compile-time configuration.

    Returns:
        The processed scores; -inf at forbidden tokens.
    """
    p, step_B1 = processor_params, sequences.num_new_tokens[:, None]
    scores = penalize_repetition(scores, sequences, p.repetition_penalty)
    if static_config.no_repeat_ngram_size:
        scores = forbid_repeated_ngrams(scores, sequences, static_config.no_repeat_ngram_size)
    if len(p.bad_words):
        scores = forbid_bad_words(scores, sequences, p.bad_words)
    scores = suppress_tokens(scores, p.is_eos & (step_B1 < p.min_new_tokens))
    scores = force_tokens(scores, p.forced_bos, step_B1 == 0)
    scores = force_tokens(scores, p.forced_eos, step_B1 == p.max_new_tokens - 1)
    scores = suppress_tokens(scores, p.suppressed)
    scores = suppress_tokens(scores, p.begin_suppressed & (step_B1 == p.begin_index))
    if static_config.do_sample:
        min_tokens_to_keep = static_config.min_tokens_to_keep
        scores = scores / p.temperature
        scores = keep_top_k(scores, p.top_k, min_tokens_to_keep)
        scores = keep_top_p(scores, p.top_p, min_tokens_to_keep)
        scores = keep_min_p(scores, p.min_p, min_tokens_to_keep)
    return scores


def suppress_tokens(scores: Float[Array, "B V"], mask: Bool[Array, "..."]) -> Float[Array, "B V"]:
    """Sets scores to -inf where `mask` is True."""
    return jnp.where(mask, -jnp.inf, scores)


def force_tokens(
    scores: Float[Array, "B V"], forced: Bool[Array, "V"], rows: Bool[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Allows only the tokens `forced`, each with score 0, in the rows where `rows` is True.

    If no token is forced, the scores are unchanged.
    """
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

    Prompt tokens count (Paulus et al. 2017, "A Deep Reinforced Model for Abstractive
    Summarization", section 2.5).
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
    """Forbids tokens that would complete a forbidden token sequence.

    Args:
        scores: scores of the next token.
        sequences: the tokens of each row so far.
        bad_words: forbidden token sequences, aligned on the right and padded with -1 on the left.

    Returns:
        The scores with forbidden tokens at -inf.
    """
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

    At least `min_tokens_to_keep` tokens are kept (Fan et al. 2018, "Hierarchical Neural Story
    Generation", section 5.4).

    Example:
        >>> import jax.numpy as jnp
        >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0, 0.0]]), 2).tolist()
        [[-inf, 3.0, 2.0, -inf]]
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

    Tokens that tie with the last one of the set are kept too, and at least `min_tokens_to_keep`
    tokens are kept (Holtzman et al. 2019, "The Curious Case of Neural Text Degeneration",
    section 3.1).

    Example:
        >>> import jax.numpy as jnp
        >>> probs = jnp.array([[0.1, 0.4, 0.2, 0.3]])
        >>> jnp.isfinite(keep_top_p(jnp.log(probs), 0.65)).tolist()
        [[False, True, False, True]]
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

    At least `min_tokens_to_keep` tokens are kept (Nguyen et al. 2024, "Turning Up the Heat: Min-p
    Sampling", section 3).
    """
    probs_BV = jax.nn.softmax(scores, axis=-1)
    is_low_BV = probs_BV < p * probs_BV.max(-1, keepdims=True)
    if min_tokens_to_keep > 1:
        top_BK = jax.lax.top_k(scores, min(min_tokens_to_keep, scores.shape[-1]))[0]
        is_low_BV &= scores < top_BK[:, -1:]
    return suppress_tokens(scores, is_low_BV)


def _sort_descending(scores_BV):
    return -jnp.sort(-scores_BV, axis=-1)
