"""Optimal buckets, and length-bucketed batches that contain every example."""

import itertools

import numpy as np
import pytest

from transformer_jax.data.length_buckets import LengthBucketedBatches, choose_buckets


def padded(lengths, buckets) -> int:
    return sum(min(b for b in buckets if b >= min(n, buckets[-1])) for n in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_chosen_buckets_minimize_padding(seed):
    rng = np.random.default_rng(seed)
    lengths, limit = rng.integers(1, 70, rng.integers(1, 40)), int(rng.integers(10, 80))
    max_buckets = int(rng.integers(1, 5))
    found = choose_buckets(lengths, limit, max_buckets)
    edges = sorted({min(-(-int(n) // 8) * 8, limit) for n in lengths})
    others = [padded(lengths, [*some, edges[-1]]) for count in range(max_buckets)
              for some in itertools.combinations(edges[:-1], count)]
    assert padded(lengths, found) == min(others)
    assert len(found) <= max_buckets and found == sorted(set(found)) and found[-1] == edges[-1]


def test_choose_buckets_by_hand():
    assert choose_buckets([3, 3, 3, 30], 64, 1) == [32]  # the longest row decides
    assert choose_buckets([3, 3, 3, 30], 64, 2) == [8, 32]
    assert choose_buckets([3, 9, 90], 50, 8) == [8, 16, 50]  # longer rows are truncated
    assert choose_buckets([5, 5], 64, 8) == [8]
    for arguments in (([], 8, 1), ([1], 0, 1), ([1], 8, 0)):
        with pytest.raises(ValueError, match="give at least 1 of each"):
            choose_buckets(*arguments)


LENGTHS = np.random.default_rng(0).integers(1, 40, 70)


def batches(**options) -> LengthBucketedBatches:
    def row(example: int, length: int) -> dict:
        held = np.arange(length) < LENGTHS[example]
        return {"number": np.int32(example), "tokens": held, "weights": np.float32(1)}

    options = {"buckets": [8, 16, 32], "batch_size": 4, "seed": 3, "group_size": 4, **options}
    return LengthBucketedBatches(range(70), LENGTHS, row, **options)


def test_an_epoch_contains_every_example_once_in_the_smallest_bucket():
    data = batches()
    found = [data[i] for i in range(140)]  # eight epochs are 35 groups of 4 batches of 4
    numbers = np.concatenate([b["number"] for b in found])
    assert np.all(np.bincount(numbers, minlength=70) == 8)
    # The first four groups lie within the first epoch of 70 examples.
    assert len(set(numbers[:64])) == 64
    for b in found:
        assert b["tokens"].shape[1] == min(x for x in (8, 16, 32)
                                           if x >= min(LENGTHS[b["number"]].max(), 32))
    again = batches()
    np.testing.assert_array_equal(again[20]["number"], found[20]["number"])
    assert not np.array_equal(batches(seed=4)[0]["number"], found[0]["number"])


def test_batches_are_not_sorted_by_length_with_a_single_bucket():
    data = batches(buckets=[32])
    spread = [np.ptp(LENGTHS[data[i]["number"]]) for i in range(17)]
    assert np.median(spread) > 15 > np.median(
        [np.ptp(LENGTHS[batches()[i]["number"]]) for i in range(16)])


def test_evaluation_batches_contain_every_example_once_and_pad_the_last_batch():
    found = batches().evaluation_batches(16)
    number = np.concatenate([b["index"] for b in found])
    weight = np.concatenate([b["weights"] for b in found])
    assert sorted(number[number >= 0]) == list(range(70))
    np.testing.assert_array_equal(weight, number >= 0)
    assert all(len(b["index"]) == 16 for b in found) and np.sum(number < 0) == 10


def test_each_process_gets_its_slice_of_every_batch():
    single = batches()
    processes = [batches(process_index=i, process_count=2) for i in range(2)]
    for i in range(5):
        numbers = np.concatenate([data[i]["number"] for data in processes])
        np.testing.assert_array_equal(numbers, single[i]["number"])
        assert len({data[i]["tokens"].shape for data in processes}) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"buckets": [16, 8]}, "give positive lengths in ascending order"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 3, "process_count": 2}, "cannot be split evenly among 2 processes"),
])
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)
