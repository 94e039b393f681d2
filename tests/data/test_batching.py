"""Batch loaders: order, exact resumption, padding, and slices of several processes."""

import json
import time
from itertools import islice

import numpy as np
import pytest

from transformer_jax.data import batching, packing

T = 8


def corpus_of(*lengths: int) -> packing.Corpus:
    """A corpus of documents of the given lengths, whose tokens are 1, 2, 3, ..."""
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return packing.Corpus(np.arange(1, starts[-1] + 1, dtype=np.uint16), starts, starts)


def numbers(n: int) -> list[dict]:
    return [{"x": np.int32(i + 1)} for i in range(n)]


def rows(loader, count=None) -> list[int]:
    return [int(x) for batch in islice(loader, count) for x in batch["x"]]


# Loaders


def draw(example, rng):
    return {**example, "noise": rng.random(2)}


SOURCES = {
    "rows": (numbers(11), None),
    "drawn": (numbers(11), draw),
    "packed": (packing.PackedTokens(corpus_of(5, 9, 70), T), None),
}


def test_each_epoch_contains_every_example_once_in_a_new_order():
    found = rows(batching.make_loader(numbers(11), 4), 11)  # 44 rows, 4 epochs
    epochs = [found[i : i + 11] for i in range(0, 44, 11)]
    assert all(sorted(epoch) == list(range(1, 12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert epochs[0] != sorted(epochs[0])


def test_the_seed_determines_the_order():
    first, again, other = (rows(batching.make_loader(numbers(50), 5, seed=s), 10)
                           for s in (3, 3, 4))
    assert first == again != other


def test_order_without_shuffling():
    assert rows(batching.make_loader(numbers(6), 2, shuffle=False, num_epochs=2)) == [
        1, 2, 3, 4, 5, 6] * 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_restored_state_continues_with_the_next_batch(kind, prefetch):
    source, transform = SOURCES[kind]

    def loader():
        return batching.make_loader(source, 4, transform=transform, seed=1, prefetch=prefetch)

    one = loader()
    for _ in range(5):
        next(one)
    state = json.loads(json.dumps(one.get_state()))
    expected = list(islice(one, 4))
    fresh = loader()
    fresh.set_state(state)
    moved = one
    moved.set_state(state)
    for again in (fresh, moved):
        for batch in expected:
            for name, value in next(again).items():
                np.testing.assert_array_equal(value, batch[name])


def test_random_transforms_differ_between_examples_and_epochs():
    loader = batching.make_loader(numbers(4), 4, transform=draw, shuffle=False)
    noise = np.concatenate([next(loader)["noise"] for _ in range(3)])
    assert noise.shape == (12, 2) and len(np.unique(noise)) == 24


@pytest.mark.parametrize("kind", SOURCES)
def test_evaluation_contains_every_example_once_in_full_batches(kind):
    source, transform = SOURCES[kind]
    batches = list(batching.make_loader(source, 4, transform=transform, shuffle=False,
                                        num_epochs=1, drop_remainder=False))
    key = "x" if "x" in batches[0] else "tokens"
    assert len(batches) == 3 and all(len(batch[key]) == 4 for batch in batches)
    found = np.concatenate([batch[key] for batch in batches])
    expected = np.stack([source[i][key] for i in range(len(source))])
    np.testing.assert_array_equal(found[: len(source)], expected)
    assert all(not value[-1].any() for value in batches[-1].values())
    assert batches[0][key].dtype == batches[-1][key].dtype == np.int32


def test_a_batch_larger_than_the_source_is_padded():
    (batch,) = batching.make_loader(numbers(3), 8, num_epochs=1, drop_remainder=False)
    assert sorted(batch["x"]) == [0] * 5 + [1, 2, 3]


def test_the_remainder_of_the_last_epoch_is_dropped():
    assert len(rows(batching.make_loader(numbers(11), 4, num_epochs=1))) == 8
    assert len(rows(batching.make_loader(numbers(11), 4, num_epochs=3))) == 32


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("num_epochs", [None, 1])
def test_slices_of_all_processes_make_up_the_global_batch(kind, num_epochs):
    source, transform = SOURCES[kind]

    def batches(**options):
        return islice(batching.make_loader(
            source, 4, transform=transform, seed=2, num_epochs=num_epochs, drop_remainder=False,
            **options), 6)

    processes = zip(*(batches(process_index=i, process_count=2) for i in range(2)))
    for batch, slices in zip(batches(), processes, strict=True):
        for name, value in batch.items():
            joined = np.concatenate([rows[name] for rows in slices])
            np.testing.assert_array_equal(joined, value)


def test_errors_of_a_transform_are_raised():
    def fail(example, rng):
        raise ValueError("label 7 is out of range")

    with pytest.raises(ValueError, match="label 7 is out of range"):
        next(batching.make_loader(numbers(3), 2, transform=fail))


@pytest.mark.parametrize(("options", "message"), [
    ({"source": []}, "0 examples"),
    ({"batch_size": 12, "num_epochs": 1}, "batch_size 12 is larger than the 11 examples"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 5, "process_count": 2}, "batch_size 5 cannot be split evenly among 2"),
    ({"process_index": 2, "process_count": 2}, "process_index 2 is out of range for 2 processes"),
])
def test_errors_of_make_loader(options, message):
    with pytest.raises(ValueError, match=message):
        batching.make_loader(**{"source": numbers(11), "batch_size": 4, **options})


def test_a_batch_larger_than_the_source_repeats_examples():
    assert len(rows(batching.make_loader(numbers(3), 8), 2)) == 16


def test_packing_is_fast_enough():
    """Half of the target of 2 million tokens per second, because tests may share the machine."""
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.unique(rng.integers(1, 10**6, 2000)), [10**6]])
    corpus = packing.Corpus(rng.integers(0, 4000, 10**6).astype(np.uint16), starts, starts)
    loader = batching.make_loader(packing.PackedTokens(corpus, 128), 32, prefetch=0)
    next(loader)
    began = time.process_time()
    for _ in range(100):
        next(loader)
    assert 100 * 32 * 128 / (time.process_time() - began) > 1e6


# Checks


def test_check_batch_ids():
    packed = packing.PackedTokens(corpus_of(5, 9), T)[0]
    batching.check_batch_ids(packed, vocab_size=15, max_length=8)
    batching.check_batch_ids(packed["tokens"], vocab_size=15, max_length=8)
    with pytest.raises(ValueError, match="target id 9 is outside the vocabulary of 9"):
        batching.check_batch_ids(packed, vocab_size=9, max_length=8)
    with pytest.raises(ValueError, match="token id -1 is outside the vocabulary of 9"):
        batching.check_batch_ids(np.array([[3, -1]]), vocab_size=9, max_length=8)
    with pytest.raises(ValueError, match="8 tokens is longer than the 7 positions"):
        batching.check_batch_ids(packed["tokens"], vocab_size=15, max_length=7)
    with pytest.raises(ValueError, match="5 tokens is longer than the 4 positions"):
        batching.check_batch_ids(packed, vocab_size=15, max_length=4)
    masked = {"tokens": np.zeros((1, 4), int), "masked_targets": np.array([[5]])}
    with pytest.raises(ValueError, match="masked target id 5 is outside"):
        batching.check_batch_ids(masked, vocab_size=5, max_length=4)
