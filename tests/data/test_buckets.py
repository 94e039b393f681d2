"""Buckets that pad the least, and batches of like lengths that lose no row."""

import itertools

import numpy as np
import pytest

from transformer_jax.data.length_buckets import LengthBucketedBatches, choose_buckets


def padded(lengths, buckets) -> int:
    return sum(min(b for b in buckets if b >= min(n, buckets[-1])) for n in lengths)


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_pads_less(seed):
    rng = np.random.default_rng(seed)
    lengths, limit = rng.integers(1, 70, rng.integers(1, 40)), int(rng.integers(10, 80))
    most = int(rng.integers(1, 5))
    found = choose_buckets(lengths, limit, most)
    edges = sorted({min(-(-int(n) // 8) * 8, limit) for n in lengths})
    others = [padded(lengths, [*some, edges[-1]]) for count in range(most)
              for some in itertools.combinations(edges[:-1], count)]
    assert padded(lengths, found) == min(others)
    assert len(found) <= most and found == sorted(set(found)) and found[-1] == edges[-1]


def test_buckets_by_hand():
    assert choose_buckets([3, 3, 3, 30], 64, 1) == [32]  # no longer than the longest row
    assert choose_buckets([3, 3, 3, 30], 64, 2) == [8, 32]
    assert choose_buckets([3, 9, 90], 50, 8) == [8, 16, 50]  # what is longer is cut
    assert choose_buckets([5, 5], 64, 8) == [8]
    for wrong in (([], 8, 1), ([1], 0, 1), ([1], 8, 0)):
        with pytest.raises(ValueError, match="give at least 1"):
            choose_buckets(*wrong)


LENGTHS = np.random.default_rng(0).integers(1, 40, 70)


def batches(**options) -> LengthBucketedBatches:
    def row(example: int, length: int) -> dict:
        held = np.arange(length) < LENGTHS[example]
        return {"number": np.int32(example), "tokens": held, "weights": np.float32(1)}

    options = {"buckets": [8, 16, 32], "batch_size": 4, "seed": 3, "group": 4, **options}
    return LengthBucketedBatches(range(70), LENGTHS, row, **options)


def test_an_epoch_holds_every_row_once_in_the_bucket_of_its_batch():
    data = batches()
    found = [data[i] for i in range(140)]  # eight epochs are 35 groups of 4 batches of 4
    numbers = np.concatenate([b["number"] for b in found])
    assert np.all(np.bincount(numbers, minlength=70) == 8)
    # A group may hold the end of one epoch and the beginning of the next, and no more of them.
    assert len(set(numbers[:64])) == 64
    for b in found:
        assert b["tokens"].shape[1] == min(x for x in (8, 16, 32)
                                           if x >= min(LENGTHS[b["number"]].max(), 32))
    again = batches()
    np.testing.assert_array_equal(again[20]["number"], found[20]["number"])
    assert not np.array_equal(batches(seed=4)[0]["number"], found[0]["number"])


def test_rows_are_not_sorted_into_like_batches_where_all_are_padded_alike():
    data = batches(buckets=[32])
    spread = [np.ptp(LENGTHS[data[i]["number"]]) for i in range(17)]
    assert np.median(spread) > 15 > np.median(
        [np.ptp(LENGTHS[batches()[i]["number"]]) for i in range(16)])


def test_evaluation_holds_every_row_once_and_fills_the_last_batch():
    found = batches().evaluation(16)
    number = np.concatenate([b["index"] for b in found])
    weight = np.concatenate([b["weights"] for b in found])
    assert sorted(number[number >= 0]) == list(range(70))
    np.testing.assert_array_equal(weight, number >= 0)
    assert all(len(b["index"]) == 16 for b in found) and np.sum(number < 0) == 10


def test_processes_share_each_batch():
    whole = batches()
    parts = [batches(process_index=i, process_count=2) for i in range(2)]
    for i in range(5):
        together = np.concatenate([part[i]["number"] for part in parts])
        np.testing.assert_array_equal(together, whole[i]["number"])
        assert len({part[i]["tokens"].shape for part in parts}) == 1


@pytest.mark.parametrize(("options", "message"), [
    ({"buckets": [16, 8]}, "give ascending lengths"),
    ({"batch_size": 0}, "batch_size 0"),
    ({"batch_size": 3, "process_count": 2}, "cannot be shared by 2 processes"),
])
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        batches(**options)
