"""`mask_tokens`: rates, whole words, and the maximum number of predictions.

Observed rates must lie within four standard deviations of the binomial distribution.
"""

import numpy as np
import pytest

from transformer_jax.objectives.mlm_nsp import mask_tokens

V, MASK, FIRST = 5000, 4, 10
TOKENS = np.random.default_rng(0).integers(FIRST, V, 64).astype(np.int32)
MASKABLE = np.ones(64, bool)
MASKABLE[[0, 31, 63]] = False  # [CLS], [SEP], padding
OPTIONS = {"maskable": MASKABLE, "vocab_size": V, "mask_id": MASK, "max_predictions": 12,
           "min_random_id": FIRST}


def masked(seed: int, tokens=TOKENS, **changes) -> dict:
    return mask_tokens(tokens, np.random.default_rng(seed), **{**OPTIONS, **changes})


def assert_rate(count: int, n: int, p: float):
    assert abs(count - n * p) < 4 * (n * p * (1 - p)) ** 0.5, (count / n, p)


def selected(row) -> np.ndarray:
    return row["masked_positions"][row["masked_weights"] > 0]


def test_rates_and_positions():
    n = 3000
    replaced = np.zeros(3, int)  # counts of [MASK], random token, kept token
    position_counts = np.zeros(64, int)
    replacements = []
    for seed in range(n):
        row = masked(seed)
        at = selected(row)
        assert len(at) == 9  # round(0.15 * 61)
        assert (np.diff(at) > 0).all()
        position_counts[at] += 1
        np.testing.assert_array_equal(row["masked_targets"][:9], TOKENS[at])
        new = row["tokens"][at]
        mask, kept = new == MASK, new == TOKENS[at]
        replaced += [mask.sum(), (~mask & ~kept).sum(), kept.sum()]
        replacements.extend(new[~mask & ~kept])
        untouched = np.delete(np.arange(64), at)
        np.testing.assert_array_equal(row["tokens"][untouched], TOKENS[untouched])
    for count, rate in zip(replaced, (0.8, 0.1, 0.1)):
        assert_rate(count, 9 * n, rate)
    assert not position_counts[~MASKABLE].any()
    for count in position_counts[MASKABLE]:
        assert_rate(count, n, 9 / 61)
    replacements = np.array(replacements)
    assert FIRST <= replacements.min() < FIRST + 30 and V - 30 < replacements.max() < V
    assert abs(replacements.mean() - (FIRST + V) / 2) < 4 * V / (12 * len(replacements)) ** 0.5


def test_shapes_dtypes_and_padding():
    row = masked(0)
    assert {k: (v.shape, v.dtype.name) for k, v in row.items()} == {
        "tokens": ((64,), "int32"), "masked_positions": ((12,), "int32"),
        "masked_targets": ((12,), "int32"), "masked_weights": ((12,), "float32"),
    }
    assert row["masked_weights"].tolist() == [1] * 9 + [0] * 3
    assert not row["masked_positions"][9:].any() and not row["masked_targets"][9:].any()


def test_rows_are_deterministic_and_the_input_is_not_modified():
    before = TOKENS.copy()
    for name, values in masked(5).items():
        np.testing.assert_array_equal(values, masked(5)[name])
    assert any((masked(5)[name] != masked(6)[name]).any() for name in masked(5))
    np.testing.assert_array_equal(TOKENS, before)


@pytest.mark.parametrize(
    ("maskable", "changes", "count"),
    [
        (MASKABLE, {"max_predictions": 4}, 4),
        (MASKABLE, {"mask_rate": 0.5}, 12),  # 30 tokens, but at most 12
        (np.arange(64) < 3, {}, 1),  # at least one
        (np.arange(64) < 1, {"mask_rate": 1.0}, 1),
        (np.zeros(64, bool), {}, 0),
    ],
)
def test_number_of_predictions(maskable, changes, count):
    for seed in range(5):
        row = masked(seed, maskable=maskable, **changes)
        assert row["masked_weights"].sum() == len(set(selected(row))) == count
        assert maskable[selected(row)].all()


# Words of 1 to 4 subwords; ids below 2500 begin a word.
WORD_STARTS = np.arange(V) < 2500
LENGTHS = [1, 3, 2, 1, 4, 2, 1, 1, 3, 2, 1, 1, 2, 4, 1, 1, 2, 1, 3, 1]
WORDS = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
SUBWORDS = np.where(np.diff(WORDS, prepend=-1) > 0, 100 + WORDS, 3000 + WORDS).astype(np.int32)
SUBWORDS = np.concatenate([[1], SUBWORDS, [2]]).astype(np.int32)  # [CLS] and [SEP] around them
IS_WORD = (np.arange(len(SUBWORDS)) > 0) & (np.arange(len(SUBWORDS)) < len(SUBWORDS) - 1)
WHOLE_WORDS = {"tokens": SUBWORDS, "maskable": IS_WORD, "word_starts": WORD_STARTS,
               "mask_rate": 0.3}


def test_whole_words_are_masked_together():
    mask_counts = np.zeros(len(LENGTHS), int)
    for seed in range(400):
        at = selected(masked(seed, **WHOLE_WORDS)) - 1
        assert 0 < len(at) <= round(0.3 * len(WORDS))
        words, counts = np.unique(WORDS[at], return_counts=True)
        assert counts.tolist() == [LENGTHS[word] for word in words]
        mask_counts[words] += 1
    assert mask_counts.min() > 40  # words of every position and length
    tokens = masked(3, **WHOLE_WORDS)["tokens"]
    np.testing.assert_array_equal(tokens, masked(3, **WHOLE_WORDS)["tokens"])


def test_without_word_starts_words_are_split():
    split = 0
    for seed in range(50):
        at = selected(masked(seed, **{**WHOLE_WORDS, "word_starts": None})) - 1
        words, counts = np.unique(WORDS[at], return_counts=True)
        split += counts.tolist() != [LENGTHS[word] for word in words]
    assert split > 40


def test_an_unmaskable_token_ends_a_word():
    # Subword 3001 before and after [SEP]: the second continues a word whose start is missing.
    tokens = np.array([1, 100, 3001, 2, 3001, 3001], np.int32)
    maskable = np.array([False, True, True, False, True, True])
    seen = set()
    for seed in range(40):
        row = masked(seed, tokens, maskable=maskable, word_starts=WORD_STARTS, mask_rate=0.5)
        seen.add(tuple(selected(row)))
    assert seen == {(1, 2), (4, 5)}


def test_words_longer_than_the_number_of_predictions():
    """The first subwords of a random word are masked, so that there is always a prediction."""
    tokens = np.array([100, 3001, 3001, 101, 3001, 3001], np.int32)
    seen = set()
    for seed in range(40):
        row = masked(seed, tokens, maskable=np.ones(6, bool), word_starts=WORD_STARTS,
                     mask_rate=0.3)
        seen.add(tuple(selected(row)))
    assert seen == {(0, 1), (3, 4)}
