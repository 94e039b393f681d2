"""Parallel texts: aligned files, tables and datasets by name."""

import gzip
import json

import pytest

from transformer_jax.data import load_dataset, load_pairs, sources


@pytest.fixture
def parallel(tmp_path):
    (tmp_path / "train.de").write_text("Ein Hund.\nZwei Katzen.\n", encoding="utf-8")
    (tmp_path / "train.en").write_text("A dog.\nTwo cats.\n", encoding="utf-8")
    with gzip.open(tmp_path / "val.jsonl.gz", "wt") as file:
        file.write(json.dumps({"de": "Käse", "en": "cheese"}) + "\n")
    return tmp_path


EXPECTED = [{"source": "Ein Hund.", "target": "A dog."},
            {"source": "Zwei Katzen.", "target": "Two cats."}]


def test_aligned_files_and_tables(parallel):
    assert load_pairs(parallel, "train", "de", "en") == EXPECTED
    cheese = [{"source": "Käse", "target": "cheese"}]
    assert load_pairs(parallel, "val", "de", "en") == cheese
    assert load_pairs(parallel / "val.jsonl.gz", "any", "de", "en") == cheese


@pytest.mark.parametrize(("name", "text", "error", "message"), [
    ("train.en", "A dog.\n", ValueError, "has 2 lines and .*train.en has 1; line n"),
    ("train.en", "A dog.\n \n", ValueError,
     "train.de and train.en line 2: the text in column 'en' is empty"),
    ("test.de", "Ein Hund.\n", FileNotFoundError,
     "has no split 'test'; give a folder with test.de"),
])
def test_errors_in_parallel_files(parallel, name, text, error, message):
    (parallel / name).write_text(text)
    with pytest.raises(error, match=message):
        load_pairs(parallel, name.partition(".")[0], "de", "en")


def test_aligned_files_are_a_labeled_dataset(parallel):
    columns = {"source": "de", "target": "en"}
    found = load_dataset(parallel, columns=columns, validation_fraction=0.5)
    assert found.task_type == "seq2seq" and sorted(
        [*found.train, *found.validation], key=str) == EXPECTED
    with pytest.raises(ValueError, match=r"has no validation split; add files such as dev\.de"):
        load_dataset(parallel, columns=columns)
    for side in ("de", "en"):
        (parallel / f"dev.{side}").write_text(side)
        (parallel / f"test2.{side}").write_text(side * 2)
    assert load_dataset(parallel, columns=columns).validation == [{"source": "de", "target": "en"}]
    assert load_dataset(parallel, columns=columns, validation="test2").validation == [
        {"source": "dede", "target": "enen"}]
    (parallel / "train.jsonl").write_text("{}")  # aligned files take precedence
    assert load_dataset(parallel, columns=columns).train == EXPECTED


def test_pairs_by_name(monkeypatch):
    rows = [{"translation": {"de": "Hund", "en": "dog"}},
            {"de": "Katze", "en": "cat", "translation": "free"}]
    monkeypatch.setattr(sources, "load_source", lambda spec, split, **options: rows)
    assert load_pairs("tfds:some/de-en", "train", "de", "en") == [
        {"source": "Hund", "target": "dog"}, {"source": "Katze", "target": "cat"}]
    with pytest.raises(ValueError, match="train example 0: no column 'fr'; choose one of de, en"):
        load_pairs("hf:some", "train", "de", "fr")
