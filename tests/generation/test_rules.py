"""Each rule on numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.generation import logits_processors
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    Sequences,
    StaticGenerationConfig,
)

jitted = jax.jit(logits_processors.apply_logits_processors, static_argnames="plan")
V = 6
SCORES = np.array([[0.5, -1.0, 2.0, 0.0, -0.5, 1.0]], np.float32)
OUT = -np.inf
BIG = 99


def text(*rows, prompt=1, slots=8) -> Sequences:
    """Rows of tokens; behind them stand tokens that must not be looked at."""
    tokens = np.full((len(rows), slots), 5)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return Sequences(jnp.array(tokens), jnp.array(lengths), jnp.full(len(rows), prompt))


def forbidden(scores) -> list[list[int]]:
    return [np.flatnonzero(np.isneginf(row)).tolist() for row in np.asarray(scores)]


def many(count):
    return np.repeat(SCORES, count, axis=0)


def test_repetition_penalty():
    out = logits_processors.penalize_repetition(many(2), text([1, 2, 2], [0]), np.float32(2))
    np.testing.assert_array_equal(
        out, [[0.5, -2, 1, 0, -0.5, 1], [0.25, -1, 2, 0, -0.5, 1]])
    np.testing.assert_array_equal(
        logits_processors.penalize_repetition(SCORES, text([1, 2]), np.float32(1)), SCORES)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [[1, 2, 3], [4], [0], [1, 3, 4]]),
        (2, [[2, 3], [], [], [3]]),  # 1 3 and 1 2 were there, and the text ends with 1
        (3, [[2], [], [], [3]]),  # after 3 1 came 2; after 4 1 came 3
        (4, [[], [], [], []]),
        (9, [[], [], [], []]),  # longer than the slots
    ],
)
def test_no_repeated_ngrams(size, expected):
    texts = text([1, 3, 1, 2, 3, 1], [4], [0], [4, 1, 3, 4, 1])
    out = logits_processors.forbid_repeated_ngrams(many(4), texts, size)
    assert forbidden(out) == expected
    finite = np.isfinite(out)
    np.testing.assert_array_equal(np.asarray(out)[finite], many(4)[finite])


def test_ngrams_of_a_text_that_fills_its_slots():
    out = logits_processors.forbid_repeated_ngrams(SCORES, text([1, 2, 3, 1], slots=4), 2)
    assert forbidden(out) == [[2]]


def test_bad_words():
    words = np.array([[-1, -1, 4], [-1, 2, 3], [1, 2, 0], [-1, -1, -1]])
    out = logits_processors.forbid_words(many(4), text([0, 1, 2], [2], [0, 2, 1], [1]), words)
    # 4 always; 3 after 2; 0 after 1 2, but a text of one token has no two last ones.
    assert forbidden(out) == [[0, 3, 4], [3, 4], [4], [4]]


def test_suppress_and_force():
    out = logits_processors.suppress(many(2), np.array([[0, 1, 0, 0, 0, 1], [0] * 6], bool))
    assert forbidden(out) == [[1, 5], []]
    only = np.array([0, 0, 1, 0, 0, 1], bool)
    out = logits_processors.force(many(2), only, np.array([[True], [False]]))
    np.testing.assert_array_equal(out, [[OUT, OUT, 0, OUT, OUT, 0], SCORES[0]])
    np.testing.assert_array_equal(
        logits_processors.force(SCORES, np.zeros(V, bool), np.array([[True]])), SCORES)


P = np.array([[0.1, 0.4, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("rule", "value", "min_kept", "kept"),
    [
        ("keep_top_k", 2, 1, [1, 3]),
        ("keep_top_k", 1, 1, [1]),
        ("keep_top_k", 1, 2, [1, 3]),
        ("keep_top_k", 4, 1, [0, 1, 2, 3]),
        ("keep_top_k", BIG, 1, [0, 1, 2, 3]),
        ("keep_top_p", 0.65, 1, [1, 3]),  # 0.4 is not enough, 0.7 is
        ("keep_top_p", 0.75, 1, [1, 2, 3]),
        ("keep_top_p", 1e-6, 1, [1]),
        ("keep_top_p", 1e-6, 3, [1, 2, 3]),
        ("keep_top_p", 1.0, 1, [0, 1, 2, 3]),
        ("keep_min_p", 0.6, 1, [1, 3]),  # at least 0.24
        ("keep_min_p", 0.2, 1, [0, 1, 2, 3]),
        ("keep_min_p", 1.0, 1, [1]),
        ("keep_min_p", 1.0, 2, [1, 3]),
        ("keep_min_p", 1.0, BIG, [0, 1, 2, 3]),
        ("keep_min_p", 0.0, 1, [0, 1, 2, 3]),
    ],
)
def test_limits_of_sampling(rule, value, min_kept, kept):
    logits = np.log(P).astype(np.float32)
    kind = np.int32 if rule == "keep_top_k" else np.float32
    out = np.asarray(getattr(logits_processors, rule)(logits, kind(value), min_kept))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept
    np.testing.assert_array_equal(out[0, kept], logits[0, kept])


def test_no_nucleus_keeps_a_tail_that_rounding_would_lose():
    logits = np.array([[40.0, 0.0, -40.0]], np.float32)
    np.testing.assert_array_equal(logits_processors.keep_top_p(logits, np.float32(1)), logits)


def test_equals_stay_together():
    logits = np.array([[1.0, 0.0, 0.0, -1.0]], np.float32)
    assert forbidden(logits_processors.keep_top_k(logits, np.int32(2))) == [[3]]
    assert forbidden(logits_processors.keep_top_p(logits, np.float32(0.6))) == [[3]]


# ---- all of them together


def make(**changes) -> LogitsProcessorParams:
    none = np.zeros(V, bool)
    neutral = LogitsProcessorParams(
        max_new_tokens=np.int32(4), min_new_tokens=np.int32(0), pad_id=np.int32(0), is_end=none,
        forced_first=none, forced_last=none, suppressed=none, begin_suppressed=none,
        begin=np.int32(0), repetition_penalty=np.float32(1), bad_words=np.zeros((0, 1), np.int32),
        temperature=np.float32(1), top_k=np.int32(V), top_p=np.float32(1), min_p=np.float32(0),
    )
    return neutral._replace(**changes)


def only(*tokens):
    return np.isin(np.arange(V), tokens)


def test_no_rule_changes_nothing():
    for do_sample in (False, True):
        out = jitted(SCORES, text([1, 1, 1]), make(), StaticGenerationConfig(8, do_sample))
        np.testing.assert_array_equal(out, SCORES)


def test_rules_know_how_many_tokens_are_new():
    """Rows with 0, 1, 2 and 3 new tokens, of 4."""
    texts = text([1], [1, 1], [1, 1, 1], [1, 1, 1, 1])

    def run(**changes):
        return forbidden(jitted(many(4), texts, make(**changes), StaticGenerationConfig(8)))

    assert run(is_end=only(2, 3), min_new_tokens=np.int32(2)) == [[2, 3], [2, 3], [], []]
    assert run(forced_first=only(2)) == [[0, 1, 3, 4, 5], [], [], []]
    assert run(forced_last=only(2, 4)) == [[], [], [], [0, 1, 3, 5]]
    assert run(suppressed=only(5)) == [[5]] * 4
    assert run(begin_suppressed=only(5)) == [[5], [], [], []]
    assert run(begin_suppressed=only(5), begin=np.int32(1)) == [[], [5], [], []]
    # A forced token comes even if an end is too early, and a suppressed one does not.
    assert run(forced_first=only(2), is_end=only(2), min_new_tokens=np.int32(9))[0] == [
        0, 1, 3, 4, 5]
    assert run(forced_first=only(2), suppressed=only(2))[0] == [0, 1, 2, 3, 4, 5]
    assert run(bad_words=np.array([[1, 3]])) == [[3]] * 4


def test_limits_come_one_after_another():
    logits = np.log(P).astype(np.float32)

    def kept(**changes):
        rules = make(top_k=np.int32(4))._replace(**changes)
        rules = rules._replace(**{name: np.zeros(4, bool) for name in (
            "is_end", "forced_first", "forced_last", "suppressed", "begin_suppressed")})
        out = np.asarray(jitted(logits, text([1]), rules, StaticGenerationConfig(8, do_sample=True)))[0]
        best = np.flatnonzero(np.isfinite(out))
        np.testing.assert_allclose(out[best], logits[0, best] / rules.temperature, rtol=1e-6)
        return best.tolist()

    half = np.float32(0.5)
    # After the cut to two, 0.4 of 0.7 is 57 %: alone it reaches one half; of 0.9 it is 44 %.
    assert kept(top_k=np.int32(2), top_p=half) == [1]
    assert kept(top_k=np.int32(3), top_p=half) == [1, 3]
    # At temperature 1/2 probabilities go with squares: 16 of 30 parts are 53 %.
    assert kept(temperature=half, top_p=half) == [1]
    assert kept(temperature=half) == [0, 1, 2, 3]
    # 9 and 4 of 16 parts: 56 % and 25 % of the best.
    assert kept(temperature=half, min_p=half) == [1, 3]
    assert kept(top_p=np.float32(0.75), min_p=np.float32(0.7)) == [1, 3]


def test_greedy_looks_at_no_limit():
    out = jitted(SCORES, text([1]), make(top_k=np.int32(1)), StaticGenerationConfig(8))
    np.testing.assert_array_equal(out, SCORES)
