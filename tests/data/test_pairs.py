"""Pairs from files, and token-budget batches of pairs."""

import functools
import gzip
import json

import numpy as np
import pytest

from transformer_jax.data import pairs
from transformer_jax.objectives import seq2seq

ROW = functools.partial(seq2seq.prepare, start_id=2, eos_id=3, pad_id=1)


COUNT = 200


def make(count=COUNT, **options):
    """Batches of pairs of 1 to 20 tokens, whose ids encode the number of the pair."""
    rng = np.random.default_rng(0)
    examples = [{"source": np.full(rng.integers(1, 21), 10 + i), "target": np.full(
        rng.integers(1, 21), 10 + i)} for i in range(count)]
    options = {"buckets": (8, 16, 32), "tokens_per_batch": 64, **options}
    return pairs.TokenBudgetBatches(examples, ROW, **options)


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
    lengths = sum(len(p["target"]) + 1 for p in data.pairs)
    assert sum(b["weights"].sum() for b in batches) == lengths


def test_each_process_gets_its_slice_of_every_batch():
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
    longest = [max(len(p["source"]), len(p["target"])) + 1 for p in data.pairs]
    assert data.num_truncated == sum(n > 12 for n in longest) > 0
    assert max(data[i]["tokens"].shape[1] for i in range(data.batches_per_epoch)) == 12


@pytest.mark.parametrize(("options", "message"), [
    ({"count": 0}, "there are 0 pairs"),
    ({"buckets": (16, 8)}, r"buckets are \[16, 8\]; give ascending"),
    ({"buckets": (1, 8)}, "give ascending lengths above 1"),
    ({"tokens_per_batch": 20}, "20 has no room for 1 rows of 32 tokens; use at least 32"),
    ({"batch_size_multiple": 8}, "use at least 256"),
])
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "train.de").write_text("Ein Hund.\nZwei Katzen.\n", encoding="utf-8")
    (tmp_path / "train.en").write_text("A dog.\nTwo cats.\n", encoding="utf-8")
    with gzip.open(tmp_path / "val.jsonl.gz", "wt") as file:
        file.write(json.dumps({"de": "Käse", "en": "cheese"}) + "\n")
    return tmp_path


EXPECTED = [{"source": "Ein Hund.", "target": "A dog."},
            {"source": "Zwei Katzen.", "target": "Two cats."}]


def test_aligned_files_and_tables(folder):
    assert pairs.load_pairs(folder, "train", "de", "en") == EXPECTED
    cheese = [{"source": "Käse", "target": "cheese"}]
    assert pairs.load_pairs(folder, "val", "de", "en") == cheese
    assert pairs.load_pairs(folder / "val.jsonl.gz", "any", "de", "en") == cheese


@pytest.mark.parametrize(("name", "text", "error", "message"), [
    ("train.en", "A dog.\n", ValueError, "has 2 lines and .*train.en has 1; line n"),
    ("train.en", "A dog.\n \n", ValueError, "pair 2 of .* has the target ''; give text"),
    ("test.de", "Ein Hund.\n", FileNotFoundError,
     "has no split 'test'; give a folder with test.de"),
])
def test_errors_in_files(folder, name, text, error, message):
    (folder / name).write_text(text)
    with pytest.raises(error, match=message):
        pairs.load_pairs(folder, name.partition(".")[0], "de", "en")
    with pytest.raises(FileNotFoundError, match="does not exist; give a file"):
        pairs.load_aligned_files(folder / "train.de", folder / "nowhere")


def test_datasets_by_name(monkeypatch):
    rows = [{"translation": {"de": "Hund", "en": "dog"}}, {"de": "Katze", "en": "cat"}]
    monkeypatch.setattr(pairs, "load_source", lambda spec, split: rows)
    assert pairs.load_pairs("tfds:some/de-en", "train", "de", "en") == [
        {"source": "Hund", "target": "dog"}, {"source": "Katze", "target": "cat"}]
    with pytest.raises(ValueError, match="has no column 'fr'; it has de, en"):
        pairs.load_pairs("hf:some", "train", "de", "fr")
