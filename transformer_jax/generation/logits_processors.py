"""What may be written next: rules that change the scores of the next token, as pure functions.

A rule takes the scores `[B, V]` of the next token, logits or log probabilities, and what it has to
know of the texts so far, and returns scores, -inf where a token is forbidden. `restrict` applies
all of them in the order of Hugging Face Transformers.

Shape suffixes: B rows, L slots of a text, V vocabulary, W forbidden words, M their length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int


class Sequences(NamedTuple):
    """What is written so far. Slot `s` of a row holds its token at position `s`; slots from
    `lengths` on are not looked at."""

    tokens: Int[Array, "B L"]
    lengths: Int[Array, "B"]  # with the prompt
    prompt_lengths: Int[Array, "B"]

    @property
    def new(self) -> Int[Array, "B"]:
        """How many tokens were added to the prompt."""
        return self.lengths - self.prompt_lengths

    @property
    def last(self) -> Int[Array, "B"]:
        return self.at(self.lengths[:, None] - 1)[:, 0]

    def at(self, places: Int[Array, "B T"]) -> Int[Array, "B T"]:
        """The tokens at these positions; what lies outside the slots is whatever."""
        return jnp.take_along_axis(self.tokens, places, axis=1, mode="clip")

    def append(self, token_B: Int[Array, "B"]) -> "Sequences":
        """With one more token in each row; beyond the last slot it is dropped."""
        rows_B = jnp.arange(len(token_B))
        tokens_BL = self.tokens.at[rows_B, self.lengths].set(token_B, mode="drop")
        return self._replace(tokens=tokens_BL, lengths=self.lengths + 1)


class LogitsProcessorParams(NamedTuple):
    """The values of all rules. They are traced: another value does not compile again."""

    max_new_tokens: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    pad_id: Int[Array, ""]
    is_end: Bool[Array, "V"]
    forced_first: Bool[Array, "V"]  # none True: not forced
    forced_last: Bool[Array, "V"]
    suppressed: Bool[Array, "V"]
    begin_suppressed: Bool[Array, "V"]
    begin: Int[Array, ""]  # which new token `begin_suppressed` is for
    repetition_penalty: Float[Array, ""]  # 1 for none
    bad_words: Int[Array, "W M"]  # aligned on the right; -1 before a word
    temperature: Float[Array, ""]
    top_k: Int[Array, ""]  # V for no limit
    top_p: Float[Array, ""]  # 1 for no limit
    min_p: Float[Array, ""]  # 0 for no limit


class StaticGenerationConfig(NamedTuple):
    """What compiled code depends on besides shapes; static."""

    cache_length: int
    do_sample: bool = False
    copies: int = 1  # rows for each prompt: beams, or samples
    ngram_size: int = 0  # 0 for no rule
    num_candidates: int = 0  # of a beam search, at each step
    draft_length: int = 0  # tokens that a draft model proposes at a time
    min_kept: int = 1  # tokens that sampling limits leave at the least


def apply_logits_processors(
    scores: Float[Array, "B V"], text: Sequences, rules: LogitsProcessorParams, plan: StaticGenerationConfig
) -> Float[Array, "B V"]:
    """All rules one after another."""
    r, new_B1 = rules, text.new[:, None]
    scores = penalize_repetition(scores, text, r.repetition_penalty)
    if plan.ngram_size:
        scores = forbid_repeated_ngrams(scores, text, plan.ngram_size)
    if len(r.bad_words):
        scores = forbid_words(scores, text, r.bad_words)
    scores = suppress(scores, r.is_end & (new_B1 < r.min_new_tokens))
    scores = force(scores, r.forced_first, new_B1 == 0)
    scores = force(scores, r.forced_last, new_B1 == r.max_new_tokens - 1)
    scores = suppress(scores, r.suppressed)
    scores = suppress(scores, r.begin_suppressed & (new_B1 == r.begin))
    if plan.do_sample:
        scores = scores / r.temperature
        scores = keep_top_k(scores, r.top_k, plan.min_kept)
        scores = keep_top_p(scores, r.top_p, plan.min_kept)
        scores = keep_min_p(scores, r.min_p, plan.min_kept)
    return scores


def suppress(scores: Float[Array, "B V"], where: Bool[Array, "..."]) -> Float[Array, "B V"]:
    """Tokens that may not come."""
    return jnp.where(where, -jnp.inf, scores)


def force(
    scores: Float[Array, "B V"], forced: Bool[Array, "V"], when: Bool[Array, "B 1"]
) -> Float[Array, "B V"]:
    """Only `forced` tokens may come in rows where `when` is True, all with score 0; if no token is
    forced, nothing changes."""
    return jnp.where(when & forced.any(), jnp.where(forced, 0.0, -jnp.inf), scores)


def penalize_repetition(
    scores: Float[Array, "B V"], text: Sequences, penalty: Float[Array, ""]
) -> Float[Array, "B V"]:
    """Scores of tokens that the text has, divided by `penalty` where positive and multiplied by it
    where negative (Keskar et al. 2019, "CTRL", section 4.1; the sign by Transformers)."""
    def penalized(scores):
        written_BL = jnp.arange(text.tokens.shape[1]) < text.lengths[:, None]
        seen_BV = _tokens_to_mask(text.tokens, written_BL, scores.shape[1])
        return jnp.where(seen_BV, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)

    return jax.lax.cond(penalty != 1, penalized, lambda scores: scores, scores)


def forbid_repeated_ngrams(
    scores: Float[Array, "B V"], text: Sequences, size: int
) -> Float[Array, "B V"]:
    """No sequence of `size` tokens comes twice in a text with its prompt (Paulus et al. 2017,
    "A Deep Reinforced Model for Abstractive Summarization", section 2.5)."""
    L = text.tokens.shape[1]
    count = max(L - size + 1, 0)  # windows of `size` slots
    starts_W = jnp.arange(count)
    last_B = text.lengths - size + 1  # where the unfinished window starts
    repeated_BW = starts_W + size <= text.lengths[:, None]
    for i in range(size - 1):
        begun_B1 = text.at((last_B + i)[:, None])
        repeated_BW &= text.tokens[:, i : i + count] == begun_B1
    ends_BW = text.tokens[:, size - 1 :]
    return suppress(scores, _tokens_to_mask(ends_BW, repeated_BW, scores.shape[1]))


def forbid_words(
    scores: Float[Array, "B V"], text: Sequences, words: Int[Array, "W M"]
) -> Float[Array, "B V"]:
    """The last token of a word may not come where the text ends with what goes before it."""
    M = words.shape[1]
    places_BM = text.lengths[:, None] + jnp.arange(1 - M, 0)
    tail_BM = jnp.where(places_BM < 0, -2, text.at(places_BM))  # -2: no token, and so no match
    begins_WM, ends_W = words[:, :-1], words[:, -1]
    begun_BW = ((begins_WM == -1) | (begins_WM == tail_BM[:, None])).all(-1)
    ends_BW = jnp.broadcast_to(ends_W, begun_BW.shape)
    return suppress(scores, _tokens_to_mask(ends_BW, begun_BW & (ends_W >= 0), scores.shape[1]))


def _tokens_to_mask(tokens_BW, chosen_BW, V):
    """[B, V], True at the chosen tokens of each row."""
    rows_B1 = jnp.arange(len(tokens_BW))[:, None]
    mask_BV = jnp.zeros((len(tokens_BW), V), bool)
    return mask_BV.at[rows_B1, jnp.where(chosen_BW, tokens_BW, V)].set(True, mode="drop")


def keep_top_k(
    scores: Float[Array, "B V"], k: Int[Array, ""], min_kept: int = 1
) -> Float[Array, "B V"]:
    """Tokens as good as the k-th best (Fan et al. 2018, "Hierarchical Neural Story Generation",
    section 5.4); at least `min_kept`."""
    V = scores.shape[-1]

    def kept(scores):
        place = jnp.clip(jnp.maximum(k, min_kept), 1, V) - 1
        worst_B1 = jax.lax.dynamic_slice_in_dim(_descending(scores), place, 1, axis=-1)
        return suppress(scores, scores < worst_B1)

    return jax.lax.cond(k < V, kept, lambda scores: scores, scores)


def keep_top_p(
    scores: Float[Array, "B V"], p: Float[Array, ""], min_kept: int = 1
) -> Float[Array, "B V"]:
    """The nucleus: the smallest set of tokens, best first, whose probability reaches `p` (Holtzman
    et al. 2019, section 3.1); at least `min_kept`. Tokens as good as the last of them stay too."""
    def kept(scores):
        sorted_BV = _descending(scores)
        probabilities_BV = jax.nn.softmax(sorted_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        inside_BV = (before_BV < p) | (jnp.arange(scores.shape[-1]) < min_kept)
        worst_B1 = jnp.where(inside_BV, sorted_BV, jnp.inf).min(-1, keepdims=True)
        return suppress(scores, scores < worst_B1)

    return jax.lax.cond(p < 1, kept, lambda scores: scores, scores)


def keep_min_p(
    scores: Float[Array, "B V"], p: Float[Array, ""], min_kept: int = 1
) -> Float[Array, "B V"]:
    """Tokens at least `p` times as probable as the best (Nguyen et al. 2024, "Turning Up the Heat:
    Min-p Sampling", section 3); at least `min_kept`."""
    probabilities_BV = jax.nn.softmax(scores, axis=-1)
    low_BV = probabilities_BV < p * probabilities_BV.max(-1, keepdims=True)
    if min_kept > 1:
        best_BK = jax.lax.top_k(scores, min(min_kept, scores.shape[-1]))[0]
        low_BV &= scores < best_BK[:, -1:]
    return suppress(scores, low_BV)


def _descending(scores_BV):
    return -jnp.sort(-scores_BV, axis=-1)
