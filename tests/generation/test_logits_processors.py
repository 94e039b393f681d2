"""Each logits processor on numbers worked out by hand."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.generation import logits_processors as processors
from transformer_jax.generation.logits_processors import DecodingOptions, Sequences

jitted = jax.jit(processors.apply_logits_processors)
V = 6
SCORES = np.array([[0.5, -1.0, 2.0, 0.0, -0.5, 1.0]], np.float32)
NEG_INF = -np.inf
LARGE = 99


def sequences(*rows, prompt=1, slots=8) -> Sequences:
    """Rows of tokens. The slots after them hold tokens that must be ignored."""
    tokens = np.full((len(rows), slots), 5)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    lengths = np.array([len(row) for row in rows])
    return Sequences(jnp.array(tokens), jnp.array(lengths), jnp.full(len(rows), prompt))


def forbidden(scores) -> list[list[int]]:
    return [np.flatnonzero(np.isneginf(row)).tolist() for row in np.asarray(scores)]


def repeated_scores(count):
    return np.repeat(SCORES, count, axis=0)


def test_repetition_penalty():
    out = processors.penalize_repetition(
        repeated_scores(2), sequences([1, 2, 2], [0]), np.float32(2))
    np.testing.assert_array_equal(
        out, [[0.5, -2, 1, 0, -0.5, 1], [0.25, -1, 2, 0, -0.5, 1]])
    np.testing.assert_array_equal(
        processors.penalize_repetition(SCORES, sequences([1, 2]), np.float32(1)), SCORES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (1, [[1, 2, 3], [4], [0], [1, 3, 4]]),
        (2, [[2, 3], [], [], [3]]),  # it contains 1 3 and 1 2, and ends with 1
        (3, [[2], [], [], [3]]),  # 2 followed 3 1; 3 followed 4 1
        (4, [[], [], [], []]),
        (9, [[], [], [], []]),  # longer than the row
    ],
)
def test_forbid_repeated_ngrams(size, expected):
    rows = sequences([1, 3, 1, 2, 3, 1], [4], [0], [4, 1, 3, 4, 1])
    out = processors.forbid_repeated_ngrams(repeated_scores(4), rows, size)
    assert forbidden(out) == expected
    finite = np.isfinite(out)
    np.testing.assert_array_equal(np.asarray(out)[finite], repeated_scores(4)[finite])


def test_ngrams_of_a_sequence_that_fills_its_slots():
    out = processors.forbid_repeated_ngrams(SCORES, sequences([1, 2, 3, 1], slots=4), 2)
    assert forbidden(out) == [[2]]


def test_forbid_bad_words():
    words = np.array([[-1, -1, 4], [-1, 2, 3], [1, 2, 0], [-1, -1, -1]])
    rows = sequences([0, 1, 2], [2], [0, 2, 1], [1])
    out = processors.forbid_bad_words(repeated_scores(4), rows, words)
    # 4 always; 3 after 2; 0 after 1 2, which a sequence of one token cannot end with.
    assert forbidden(out) == [[0, 3, 4], [3, 4], [4], [4]]


def test_suppress_and_force():
    mask = np.array([[0, 1, 0, 0, 0, 1], [0] * 6], bool)
    out = processors.suppress_tokens(repeated_scores(2), mask)
    assert forbidden(out) == [[1, 5], []]
    only = np.array([0, 0, 1, 0, 0, 1], bool)
    out = processors.force_tokens(repeated_scores(2), only, np.array([[True], [False]]))
    np.testing.assert_array_equal(out, [[NEG_INF, NEG_INF, 0, NEG_INF, NEG_INF, 0], SCORES[0]])
    np.testing.assert_array_equal(
        processors.force_tokens(SCORES, np.zeros(V, bool), np.array([[True]])), SCORES)


P = np.array([[0.1, 0.4, 0.2, 0.3]])


@pytest.mark.parametrize(
    ("processor", "value", "min_tokens_to_keep", "kept"),
    [
        ("keep_top_k", 2, 1, [1, 3]),
        ("keep_top_k", 1, 1, [1]),
        ("keep_top_k", 1, 2, [1, 3]),
        ("keep_top_k", 4, 1, [0, 1, 2, 3]),
        ("keep_top_k", LARGE, 1, [0, 1, 2, 3]),
        ("keep_top_p", 0.65, 1, [1, 3]),  # 0.4 is not enough, 0.7 is
        ("keep_top_p", 0.75, 1, [1, 2, 3]),
        ("keep_top_p", 1e-6, 1, [1]),
        ("keep_top_p", 1e-6, 3, [1, 2, 3]),
        ("keep_top_p", 1.0, 1, [0, 1, 2, 3]),
        ("keep_min_p", 0.6, 1, [1, 3]),  # at least 0.24
        ("keep_min_p", 0.2, 1, [0, 1, 2, 3]),
        ("keep_min_p", 1.0, 1, [1]),
        ("keep_min_p", 1.0, 2, [1, 3]),
        ("keep_min_p", 1.0, LARGE, [0, 1, 2, 3]),
        ("keep_min_p", 0.0, 1, [0, 1, 2, 3]),
    ],
)
def test_top_k_top_p_and_min_p(processor, value, min_tokens_to_keep, kept):
    logits = np.log(P).astype(np.float32)
    dtype = np.int32 if processor == "keep_top_k" else np.float32
    apply = getattr(processors, processor)
    out = np.asarray(apply(logits, dtype(value), min_tokens_to_keep))
    assert np.flatnonzero(np.isfinite(out[0])).tolist() == kept
    np.testing.assert_array_equal(out[0, kept], logits[0, kept])


def test_top_p_of_one_keeps_tokens_of_negligible_probability():
    logits = np.array([[40.0, 0.0, -40.0]], np.float32)
    np.testing.assert_array_equal(processors.keep_top_p(logits, np.float32(1)), logits)


def test_ties_are_kept_together():
    logits = np.array([[1.0, 0.0, 0.0, -1.0]], np.float32)
    assert forbidden(processors.keep_top_k(logits, np.int32(2))) == [[3]]
    assert forbidden(processors.keep_top_p(logits, np.float32(0.6))) == [[3]]


# ---- all processors together


def make(**changes) -> DecodingOptions:
    none = np.zeros(V, bool)
    neutral = DecodingOptions(
        rng=jax.random.key(0), cache_length=8, max_new_tokens=np.int32(4),
        min_new_tokens=np.int32(0), pad_token_id=np.int32(0),
        is_eos=none, forced_bos=none, forced_eos=none, suppressed=none, begin_suppressed=none,
        begin_index=np.int32(0), repetition_penalty=np.float32(1),
        bad_words=np.zeros((0, 1), np.int32),
        temperature=np.float32(1), top_k=np.int32(V), top_p=np.float32(1), min_p=np.float32(0),
    )
    return dataclasses.replace(neutral, **changes)


def only(*tokens):
    return np.isin(np.arange(V), tokens)


def test_neutral_parameters_change_nothing():
    for do_sample in (False, True):
        out = jitted(SCORES, sequences([1, 1, 1]), make(do_sample=do_sample))
        np.testing.assert_array_equal(out, SCORES)


def test_processors_depend_on_the_number_of_new_tokens():
    """Rows with 0, 1, 2 and 3 new tokens, of 4."""
    rows = sequences([1], [1, 1], [1, 1, 1], [1, 1, 1, 1])

    def run(**changes):
        return forbidden(jitted(repeated_scores(4), rows, make(**changes)))

    assert run(is_eos=only(2, 3), min_new_tokens=np.int32(2)) == [[2, 3], [2, 3], [], []]
    assert run(forced_bos=only(2)) == [[0, 1, 3, 4, 5], [], [], []]
    assert run(forced_eos=only(2, 4)) == [[], [], [], [0, 1, 3, 5]]
    assert run(suppressed=only(5)) == [[5]] * 4
    assert run(begin_suppressed=only(5)) == [[5], [], [], []]
    assert run(begin_suppressed=only(5), begin_index=np.int32(1)) == [[], [5], [], []]
    # Forcing overrides min_new_tokens; suppressing overrides forcing.
    assert run(forced_bos=only(2), is_eos=only(2), min_new_tokens=np.int32(9))[0] == [
        0, 1, 3, 4, 5]
    assert run(forced_bos=only(2), suppressed=only(2))[0] == [0, 1, 2, 3, 4, 5]
    assert run(bad_words=np.array([[1, 3]])) == [[3]] * 4


def test_sampling_processors_apply_in_order():
    logits = np.log(P).astype(np.float32)

    def kept(**changes):
        masks = {name: np.zeros(4, bool) for name in (
            "is_eos", "forced_bos", "forced_eos", "suppressed", "begin_suppressed")}
        options = make(do_sample=True, **{"top_k": np.int32(4), **masks, **changes})
        out = np.asarray(jitted(logits, sequences([1]), options))[0]
        best = np.flatnonzero(np.isfinite(out))
        np.testing.assert_allclose(out[best], logits[0, best] / options.temperature, rtol=1e-6)
        return best.tolist()

    half = np.float32(0.5)
    # Of the two best, 0.4 is 57 % and reaches one half alone; of the three best it is 44 %.
    assert kept(top_k=np.int32(2), top_p=half) == [1]
    assert kept(top_k=np.int32(3), top_p=half) == [1, 3]
    # Temperature 1/2 squares probabilities: 16 of 30 parts are 53 %.
    assert kept(temperature=half, top_p=half) == [1]
    assert kept(temperature=half) == [0, 1, 2, 3]
    # Relative to the best: 9 / 16 is 56 %, 4 / 16 is 25 %.
    assert kept(temperature=half, min_p=half) == [1, 3]
    assert kept(top_p=np.float32(0.75), min_p=np.float32(0.7)) == [1, 3]


def test_greedy_decoding_ignores_sampling_parameters():
    out = jitted(SCORES, sequences([1]), make(top_k=np.int32(1)))
    np.testing.assert_array_equal(out, SCORES)


# ---- users' own processors


def test_own_processors_are_applied_before_the_sampling_processors():
    def double(scores, sequences):
        return jnp.where(sequences.num_new_tokens[:, None] == 0, 2 * scores, scores)

    def forbid_last(scores, sequences):
        return scores.at[jnp.arange(len(scores)), sequences.last_tokens].set(-jnp.inf)

    rows = sequences([1], [1, 2])
    own = {"logits_processors": (double, forbid_last)}
    out = jitted(repeated_scores(2), rows, make(**own))
    expected = np.concatenate([2 * SCORES, SCORES])
    expected[[0, 1], [1, 2]] = NEG_INF
    np.testing.assert_array_equal(out, expected)
    # With top_k=1, the best token that is left is kept.
    out = jitted(repeated_scores(2), rows, make(top_k=np.int32(1), do_sample=True, **own))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in out] == [[2], [5]]


@pytest.mark.parametrize(("processor", "found"), [
    (lambda scores, sequences: scores[:, :3], r"shape \(1, 3\)"),
    (lambda scores, sequences: None, "a NoneType"),
])
def test_own_processors_must_return_scores_of_the_same_shape(processor, found):
    with pytest.raises(ValueError, match=rf"<lambda> returned {found}; it must return scores of"):
        processors.apply_logits_processors(
            SCORES, sequences([1]), make(logits_processors=(processor,)))
