"""Optimal buckets, and length-bucketed batches that contain every example."""

import itertools
import json

import numpy as np
import pytest

from transformer_jax.data.batching import (
    LengthBucketedBatches,
    TokenBudgetBatches,
    choose_buckets,
)
from transformer_jax.objectives import seq2seq


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


# Batches of pairs by tokens

COUNT = 200


def pair_row(pair, length):
    return seq2seq.prepare(pair, source_length=length, target_length=length, start_id=2, eos_id=3,
                           pad_id=1)


def make(count=COUNT, **options):
    """Batches of pairs of 1 to 20 tokens, whose ids encode the number of the pair."""
    rng = np.random.default_rng(0)
    examples = [{"source": np.full(rng.integers(1, 21), 10 + i), "target": np.full(
        rng.integers(1, 21), 10 + i)} for i in range(count)]
    options = {"buckets": (8, 16, 32), "tokens_per_batch": 64, **options}
    return TokenBudgetBatches(examples, pair_row, **options)


def numbers(batch):
    return batch["tokens"][batch["padding_mask"].any(1), 0] - 10


def test_batch_shapes_and_token_budget():
    data = make()
    shapes = {data[i]["tokens"].shape for i in range(data.batches_per_epoch)}
    assert shapes == {(8, 8), (4, 16), (2, 32)}
    for i in range(data.batches_per_epoch):
        batch = data[i]
        assert batch["tokens"].size <= 64
        longest = max(batch["padding_mask"].sum(1).max(), batch["weights"].sum(1).max())
        bucket = batch["tokens"].shape[1]
        assert bucket == min(b for b in (8, 16, 32) if b >= longest)


def test_an_epoch_repeats_no_pair_and_omits_different_pairs_than_the_next():
    data = make()
    epochs = [np.concatenate([numbers(data[e * data.batches_per_epoch + i])
                              for i in range(data.batches_per_epoch)]) for e in range(3)]
    for found in epochs:
        assert len(set(found)) == len(found) >= COUNT - (7 + 3 + 1)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert len(set(np.concatenate(epochs))) > len(epochs[0])


def test_the_seed_determines_the_batches_and_the_state_resumes():
    first, again, other = make(), make(), make(seed=1)
    same = [np.array_equal(first[i]["tokens"], again[i]["tokens"]) for i in range(30)]
    assert all(same)
    assert not all(first[i]["tokens"].shape == other[i]["tokens"].shape
                   and np.array_equal(first[i]["tokens"], other[i]["tokens"]) for i in range(30))
    loader = make().loader()
    seen = [next(loader) for _ in range(5)]
    state = json.loads(json.dumps(loader.get_state()))
    expected = next(loader)
    resumed = make().loader()
    resumed.set_state(state)
    np.testing.assert_array_equal(next(resumed)["tokens"], expected["tokens"])
    assert len(seen) == 5


def test_evaluation_batches_contain_every_pair_once():
    data = make()
    batches = data.evaluation_batches()
    assert sorted(np.concatenate([numbers(batch) for batch in batches])) == list(range(COUNT))
    assert {b["tokens"].shape for b in batches} == {(8, 8), (4, 16), (2, 32)}
    lengths = sum(len(p["target"]) + 1 for p in data.examples)
    assert sum(b["weights"].sum() for b in batches) == lengths


def test_each_process_gets_its_slice_of_every_batch_of_pairs():
    single = make()
    processes = [make(process_index=i, process_count=2) for i in range(2)]
    for i in range(6):
        rows = np.concatenate([data[i]["tokens"] for data in processes])
        np.testing.assert_array_equal(rows, single[i]["tokens"])


def test_batch_size_multiple_and_small_batches_of_few_pairs():
    data = make(batch_size_multiple=2)
    assert all(data[i]["tokens"].shape[0] % 2 == 0 for i in range(data.batches_per_epoch))
    small = make(count=3, buckets=(32,), tokens_per_batch=320)
    assert small[0]["tokens"].shape == (3, 32)


def test_too_few_pairs_for_a_batch_can_only_be_evaluated():
    data = make(count=3, batch_size_multiple=8, tokens_per_batch=256)
    assert sum(batch["weights"].any(1).sum() for batch in data.evaluation_batches()) == 3
    with pytest.raises(ValueError, match="3 pairs do not fill a batch of 8 rows in any bucket"):
        data.loader()


def test_long_pairs_are_truncated_and_counted():
    data = make(buckets=(8, 12))
    longest = [max(len(p["source"]), len(p["target"])) + 1 for p in data.examples]
    assert data.num_truncated == sum(n > 12 for n in longest) > 0
    assert max(data[i]["tokens"].shape[1] for i in range(data.batches_per_epoch)) == 12


@pytest.mark.parametrize(("options", "message"), [
    ({"count": 0}, "there are 0 examples"),
    ({"buckets": (16, 8)}, r"buckets are \[16, 8\]; give positive lengths"),
    ({"buckets": (1, 8)}, "give lengths above the 1 special"),
    ({"tokens_per_batch": 20}, "20 has no room for 1 rows of 32 tokens; use at least 32"),
    ({"batch_size_multiple": 8}, "use at least 256"),
])
def test_errors_in_options_of_pairs(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
