"""Sentence pairs of next-sentence prediction, on a corpus whose token ids are their positions."""

from types import SimpleNamespace

import numpy as np
import pytest

from transformer_jax.objectives.mlm_nsp import SentencePairs, prepare, sample_pair

CLS, SEP, MASK, FIRST = 1, 2, 3, 10
SPECIAL = {"cls_id": CLS, "sep_id": SEP, "mask_id": MASK}


def make_corpus(*documents: list[int]) -> SimpleNamespace:
    """Documents as lists of sentence lengths; token i is FIRST + i."""
    lengths = [n for document in documents for n in document]
    sizes = [sum(document) for document in documents]
    return SimpleNamespace(
        tokens=FIRST + np.arange(sum(lengths)),
        sentence_starts=np.concatenate([[0], np.cumsum(lengths)]),
        document_starts=np.concatenate([[0], np.cumsum(sizes)]),
    )


_RNG = np.random.default_rng(0)
CORPUS = make_corpus(*(_RNG.integers(2, 12, n).tolist() for n in (14, 9, 1, 23, 2, 17)))
N = len(CORPUS.tokens)
DOCUMENT = np.searchsorted(CORPUS.document_starts, np.arange(N), side="right") - 1
SENTENCE = np.searchsorted(CORPUS.sentence_starts, np.arange(N), side="right") - 1
LENGTH = 40


def corpus_positions(tokens) -> np.ndarray:
    return np.asarray(tokens) - FIRST


def test_ranges_cover_every_sentence_once_and_stay_inside_documents():
    pairs = SentencePairs(CORPUS, LENGTH - 3)
    covered = []
    for i in range(len(pairs)):
        item = pairs[i]
        first, stop = int(item["first"]), int(item["stop"])
        assert stop - first >= 2
        tokens = corpus_positions(pairs.tokens(first, stop))
        assert set(DOCUMENT[tokens]) == {int(item["document"])}
        if stop - first > 3:  # a range of two or three sentences may be longer
            assert len(tokens) - (SENTENCE[tokens] == stop - 1).sum() <= LENGTH - 3
        covered.extend(range(first, stop))
    alone = SENTENCE[np.flatnonzero(DOCUMENT == 2)[0]]
    assert sorted(covered) == [s for s in range(SENTENCE[-1] + 1) if s != alone]
    assert len(pairs) > 8  # ranges are about as long as a row


def test_sampled_pairs_before_truncation():
    pairs = SentencePairs(CORPUS, LENGTH - 3)
    rng = np.random.default_rng(1)
    n, random_pairs, others = 2000, 0, set()
    for i in range(n):
        item = pairs[i % len(pairs)]
        a, b, label = sample_pair(pairs, item, rng, LENGTH - 3)
        a, b = corpus_positions(a), corpus_positions(b)
        assert a[0] == CORPUS.sentence_starts[item["first"]]
        for part in (a, b):  # whole sentences of one document
            assert (np.diff(part) == 1).all()
            assert part[0] in CORPUS.sentence_starts and part[-1] + 1 in CORPUS.sentence_starts
            assert len(set(DOCUMENT[part])) == 1
        if label == 0:
            assert b[0] == a[-1] + 1 and b[-1] + 1 == CORPUS.sentence_starts[item["stop"]]
            assert DOCUMENT[b[0]] == DOCUMENT[a[0]]
        else:
            assert DOCUMENT[b[0]] != DOCUMENT[a[0]]
            others.add(int(DOCUMENT[b[0]]))
            room = max(LENGTH - 3 - len(a), 1)
            assert len(b) <= room or len(set(SENTENCE[b])) == 1
        random_pairs += label
    assert abs(random_pairs - n / 2) < 4 * (n / 4) ** 0.5
    assert others == set(range(6))  # the document of one sentence included


def row(seed: int, length: int = LENGTH, **changes) -> dict:
    pairs = SentencePairs(CORPUS, length - 3)
    options = {"pairs": pairs, "length": length, "max_predictions": 6, "vocab_size": FIRST + N,
               "min_random_id": FIRST, **SPECIAL, **changes}
    return prepare(pairs[seed % len(pairs)], np.random.default_rng(seed), **options)


def unmasked(made: dict) -> np.ndarray:
    tokens = made["tokens"].copy()
    used = made["masked_weights"] > 0
    tokens[made["masked_positions"][used]] = made["masked_targets"][used]
    return tokens


@pytest.mark.parametrize("length", [LENGTH, 12])  # 12: nearly every pair is truncated
def test_rows(length):
    labels, short = [], 0
    for seed in range(300):
        made = row(seed, length)
        tokens, padding_mask = unmasked(made), made["padding_mask"]
        size = padding_mask.sum()
        assert padding_mask.tolist() == [True] * size + [False] * (length - size)
        assert not tokens[size:].any() and not made["segment_ids"][size:].any()
        assert tokens[0] == CLS and tokens[size - 1] == SEP
        middle = int(np.flatnonzero(tokens == SEP)[0])
        assert np.flatnonzero(tokens == SEP).tolist() == [middle, size - 1]
        assert made["segment_ids"][:size].tolist() == [0] * (middle + 1) + [1] * (size - middle - 1)
        a, b = corpus_positions(tokens[1:middle]), corpus_positions(tokens[middle + 1 : size - 1])
        assert len(a) and len(b)
        for part in (a, b):
            assert (np.diff(part) == 1).all()
        label = int(made["nsp_labels"])
        labels.append(label)
        assert (DOCUMENT[a[0]] != DOCUMENT[b[0]]) == label
        if label == 0:
            assert a[-1] < b[0]
        at = made["masked_positions"][made["masked_weights"] > 0]
        assert 1 <= len(at) <= 6
        assert not set(at) & {0, middle, size - 1} and at.max() < size
        assert made["nsp_weights"] == 1
        short += size < 0.6 * length
    assert abs(np.mean(labels) - 0.5) < 4 * 0.5 / 300**0.5
    assert short > 0


def test_shapes_and_dtypes():
    made = row(0)
    assert {k: (v.shape, v.dtype.name) for k, v in made.items()} == {
        "tokens": ((LENGTH,), "int32"), "segment_ids": ((LENGTH,), "int32"),
        "padding_mask": ((LENGTH,), "bool"), "masked_positions": ((6,), "int32"),
        "masked_targets": ((6,), "int32"), "masked_weights": ((6,), "float32"),
        "nsp_labels": ((), "int32"), "nsp_weights": ((), "float32"),
    }


def test_rows_are_deterministic_and_other_seeds_give_other_pairs():
    for name, values in row(3).items():
        np.testing.assert_array_equal(values, row(3)[name])
    pairs = SentencePairs(CORPUS, LENGTH - 3)
    made = {
        unmasked(prepare(pairs[0], np.random.default_rng(seed), pairs=pairs, length=LENGTH,
                         max_predictions=6, vocab_size=FIRST + N, **SPECIAL)).tobytes()
        for seed in range(20)
    }
    assert len(made) > 10  # every epoch samples other pairs from the same range


def test_short_sequence_rate():
    sizes = {rate: [row(seed, short_sequence_rate=rate)["padding_mask"].sum()
                    for seed in range(200)] for rate in (0.0, 1.0)}
    assert np.mean(sizes[1.0]) < 0.7 * np.mean(sizes[0.0])
    assert min(sizes[1.0]) < 10


def test_the_shortest_row_of_a_pair():
    for seed in range(30):
        made = row(seed, length=5, short_sequence_rate=1.0)
        assert made["padding_mask"].all()


def test_a_row_too_short_for_a_pair_raises():
    with pytest.raises(ValueError, match="length 4"):
        row(0, length=4)


def test_empty_documents_are_ignored():
    corpus = make_corpus([3, 4], [], [5, 2], [])
    pairs = SentencePairs(corpus, 10)
    assert len(pairs) == 2
    rng = np.random.default_rng(0)
    for i in range(60):
        _, b, label = sample_pair(pairs, pairs[i % 2], rng, 10)
        assert len(b)
        assert (corpus_positions(b)[0] >= 7) == ((i % 2) ^ label)


@pytest.mark.parametrize(
    "documents", [([3, 4, 5],), ([3], [4]), ([3, 4], []), ()],
    ids=["one_document", "single_sentences", "empty_document", "no_document"],
)
def test_a_corpus_without_pairs_raises(documents):
    with pytest.raises(ValueError, match="needs at least 2 documents and 1 range: separate"):
        SentencePairs(make_corpus(*documents), 10)
