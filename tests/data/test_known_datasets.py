"""Known labeled datasets: TFDS, Hugging Face, and the Python documentation."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from transformer_jax.data import known_datasets, load_dataset, mapped_dataset, sources

# TFDS

TFDS = [*known_datasets.TFDS, "wmt14_translate/de-en", "ted_hrlr_translate/pt_to_en",
        "imdb_reviews/plain_text", "squad/v1.1:3.0.0", "paws_wiki/labeled_final_raw"]


def made_up(feature, i, name=""):
    """Example i of a feature, in the form in which a TFDS data source returns it."""
    if isinstance(feature, tfds.features.Sequence):
        if hasattr(feature.feature, "items"):
            return {key: [made_up(item, i, key)] for key, item in feature.feature.items()}
        return [made_up(feature.feature, i)] * 4
    if hasattr(feature, "items"):
        return {key: made_up(item, i, key) for key, item in feature.items()}
    if isinstance(feature, tfds.features.ClassLabel):
        return np.int64(i % feature.num_classes)
    if feature.np_dtype in (np.object_, str):
        return f"né {i}".encode()
    return np.asarray(0 if name == "answer_start" else i % 4, feature.np_dtype)


@pytest.mark.parametrize("name", TFDS)
def test_columns_of_known_tfds_datasets(name, tmp_path):
    def as_data_source(self, split, **_):
        return [made_up(self.info.features, i) for i in range(8)]

    with tfds.testing.mock_data(as_data_source_fn=as_data_source):
        features = mapped_dataset._tfds_builder(name, data_dir=tmp_path).info.features
        found = load_dataset(f"tfds:{name}", data_dir=tmp_path)
    known = known_datasets.get(f"tfds:{name}")
    assert found.task_type == known.task_type and len(found.train) == len(found.validation) == 8
    assert found.dropped == {"train": {}, "validation": {}}
    assert ("id" in found.train[0]) == ("id" in known.columns)
    if known.task_type == "classification":
        names = features[known.columns["label"]].names
        assert [e["label"] for e in found.train] == [i % len(names) for i in range(8)]
        assert found.label_names == known.label_names and len(names) == len(found.label_names)
        if name.split("/")[0] not in ("imdb_reviews", "yelp_polarity_reviews"):
            assert tuple(names) == found.label_names
    if known.task_type == "seq2seq":
        assert found.train[3]["source"] == "né 3" == found.train[3]["target"]
    if known.task_type == "multiple_choice":
        assert [e["label"] for e in found.train] == [
            i % len(found.train[0]["choices"]) for i in range(8)]
    if known.task_type == "token_classification":
        assert found.label_names[:3] == ("O", "B-PER", "I-PER")
        assert found.train[1]["tags"] == [1] * 4
    if known.task_type == "question_answering":
        assert found.train[2]["answers"] == [{"text": "né 2", "start": 0}]


@pytest.mark.parametrize("name", ["glue/sst2", "glue/mnli", "snli", "cosmos_qa", "samsum"])
def test_known_tfds_datasets_with_mocked_data(name):
    with tfds.testing.mock_data(num_examples=3):
        found = load_dataset(f"tfds:{name}", allow_empty_classes=True)
    assert len(found.train) + sum(found.dropped["train"].values()) == 3 and found.validation


def test_validation_splits_and_metrics_of_tfds_datasets():
    """TFDS knows the splits of prepared datasets only, so the expected ones are listed here."""
    splits = {name: known.validation for name, known in known_datasets.TFDS.items()
              if known.validation}
    assert splits == {
        "glue/mnli": "validation_matched", "multi_nli": "validation_matched",
        "imdb_reviews": "test", "yelp_polarity_reviews": "test", "ag_news_subset": "test"}
    metrics = {name: known_datasets.find(f"tfds:{name}").metric for name in TFDS}
    assert {k: v for k, v in metrics.items() if v} == {
        "glue/cola": "matthews", "glue/mrpc": "f1", "glue/qqp": "f1",
        "wmt14_translate/de-en": "bleu", "ted_hrlr_translate/pt_to_en": "bleu"}


class TinyAnswers(tfds.core.GeneratorBasedBuilder):
    """Answers and tags, whose form after a round trip through array_record is tested."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        f = tfds.features
        return tfds.core.DatasetInfo(builder=self, features=f.FeaturesDict({
            "id": f.Text(), "question": f.Text(), "context": f.Text(),
            "answers": f.Sequence({"text": f.Text(), "answer_start": np.int32}),
            "tokens": f.Sequence(f.Text()), "ner": f.Sequence(f.ClassLabel(names=["O", "LOC"]))}))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(3), "validation": self._generate_examples(1)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = {"text": ["né", "e"], "answer_start": [2, 5]} if i else {
                "text": [], "answer_start": []}
            yield i, {"id": f"q{i}", "question": "?", "context": "a né e", "answers": answers,
                      "tokens": ["a", "né"], "ner": ["O", "LOC"]}


def test_a_prepared_tfds_dataset(tmp_path):
    found = load_dataset("tfds:tiny_answers", data_dir=tmp_path, download=True)
    by_id = {e["id"]: e for e in found.train}
    assert found.task_type == "question_answering" and by_id["q0"]["answers"] == []
    assert by_id["q2"]["answers"] == [{"text": "né", "start": 2}, {"text": "e", "start": 5}]
    found = load_dataset("tfds:tiny_answers", data_dir=tmp_path, like="tfds:conll2003")
    assert found.label_names == ("O", "LOC")
    assert found.validation == [{"words": ["a", "né"], "tags": [0, 1]}]


# Hugging Face


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Saves rows with their features, and loads them as a known dataset."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets = pytest.importorskip("datasets")

    def load(name, rows, classes=None, **options):
        made = datasets.Dataset.from_list(rows)
        for column, feature in (classes or {}).items():
            made = made.cast_column(column, feature(datasets))
        split = known_datasets.get(f"hf:{name}").validation or "validation"
        datasets.DatasetDict({"train": made, split: made}).save_to_disk(tmp_path / "set")
        return load_dataset(f"hf:{tmp_path / 'set'}", like=f"hf:{name}", **options)

    return load


def classes(*names):
    return lambda datasets: datasets.ClassLabel(names=names)


def test_hf_class_labels(saved):
    rows = [{"premise": "a", "hypothesis": "b", "label": i, "idx": i} for i in (0, 1, 2, -1)]
    for name in ("snli", "glue/mnli"):
        found = saved(name, rows, {"label": classes(*known_datasets.NLI)})
        assert found.label_names == known_datasets.NLI
        assert found.dropped == {"train": {"no label": 1}, "validation": {"no label": 1}}
        assert [e["label"] for e in found.train] == [0, 1, 2]
    assert found.train[1] == {"id": 1, "text": "a", "text_b": "b", "label": 1}
    assert saved("snli", rows, columns={"text": "hypothesis"}).train[0] == {"text": "b", "label": 0}
    rows = [{"sentence1": "a", "sentence2": "b", "label": i, "id": i} for i in (0, 1)]
    found = saved("paws", rows, {"label": classes("0", "1")})
    assert found.label_names == known_datasets.PARAPHRASE
    rows = [{"question": "a", "passage": "b", "answer": i} for i in (True, False)]
    assert [e["label"] for e in saved("boolq", rows).train] == [1, 0]
    rows = [{"sentence1": "a", "sentence2": "b", "label": x, "idx": 0} for x in (5.0, 3.0)]
    found = saved("glue/stsb", rows)
    assert found.label_range == (0.0, 5.0) and [e["label"] for e in found.train] == [5.0, 3.0]


def test_hf_other_task_types(saved):
    found = saved("commonsense_qa", [{"id": "1", "question": "q", "answerKey": "B", "choices": {
        "label": ["A", "B"], "text": ["x", "y"]}}])
    assert found.train == [{"id": "1", "text": "q", "choices": ["x", "y"], "label": 1}]
    found = saved("hellaswag", [{"ctx": "q", "endings": ["x", "y"], "label": "1"}])
    assert found.train == [{"text": "q", "choices": ["x", "y"], "label": 1}]
    found = saved("squad_v2", [{"id": "1", "question": "q", "context": "a b", "title": "",
                                "answers": {"text": ["b"], "answer_start": [2]}}])
    assert found.train[0]["answers"] == [{"text": "b", "start": 2}]
    found = saved("conll2003", [{"id": "0", "tokens": ["a", "b"], "ner_tags": [1, 0]}], {
        "ner_tags": lambda datasets: datasets.List(datasets.ClassLabel(names=["O", "B-PER"]))})
    assert found.label_names == ("O", "B-PER") and found.train[0]["tags"] == [1, 0]
    found = saved("wmt14/de-en", [{"translation": {"de": "ja", "en": "yes"}}])
    assert found.train == [{"source": "ja", "target": "yes"}] and found.metric == "bleu"


def test_hf_names_are_resolved_to_paths_and_configs(monkeypatch, tmp_path):
    asked = []

    def load_hf(name, split):
        asked.append((name, split))
        return [{"sentence": "a", "label": 0, "idx": 0}, {"sentence": "b", "label": 1, "idx": 1}]

    monkeypatch.setattr(sources, "load_hf", load_hf)
    for name in ("glue/cola", "nyu-mll/glue/cola"):
        assert load_dataset(f"hf:{name}").metric == "matthews"
        assert asked.pop(0) == ("nyu-mll/glue/cola", "train")
        assert asked.pop(0) == ("nyu-mll/glue/cola", "validation")
    # `like` describes the columns; the data is still the user's.
    load_dataset("hf:me/mine/big", validation="test", like="hf:glue/cola")
    assert asked == [("me/mine/big", "train"), ("me/mine/big", "test")]
    assert known_datasets.find("hf:rajpurkar/squad") is known_datasets.HF["squad"]
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a single split; give validation_filter or"):
        load_dataset(f"hf:{tmp_path}")


# Python's documentation


def test_python_docs(monkeypatch):
    asked = []

    def load_source(spec, split, **options):
        asked.append((spec, split))
        return mapped_dataset.MappedDataset(
            [{"text": "a", "label": 1}, {"text": "b", "label": 0}], dict, {"label": ("no", "yes")})

    monkeypatch.setattr(sources, "load_source", load_source)
    found = load_dataset("python_docs/topics", validation="test")
    assert found.label_names == ("no", "yes") and found.train[0] == {"text": "a", "label": 1}
    assert asked == [("python_docs/topics", "train"), ("python_docs/topics", "test")]
    with pytest.raises(ValueError, match=r"header is \['a'\], but data is not a file"):
        load_dataset("python_docs/topics", header=["a"])
