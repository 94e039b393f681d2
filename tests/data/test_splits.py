"""Labeled data in memory: lists of dicts, pandas DataFrames, and Hugging Face datasets."""

import csv
import json
import subprocess
import sys

import pytest

from transformer_jax.data import LabeledDataset, load_dataset, mapped_dataset, splits

try:
    import pandas
except ImportError:
    pandas = None
needs_pandas = pytest.mark.skipif(pandas is None, reason="pandas is not installed")

REVIEWS = [{"text": f"text {i}", "label": ("bad", "good")[i % 2]} for i in range(20)]
NLI_ROWS = [{"premise": f"p {i}", "hypothesis": f"h, {i}", "label": i % 3} for i in range(6)]
SCORES = [{"sentence1": f"a {i}", "sentence2": "b", "label": i / 2} for i in range(5)]
CHOICES = [{"text": f"q {i}", "choices": ["x", "y"], "label": i % 2} for i in range(4)]
TAGGED = [{"words": ["a", f"b{i}"], "tags": ["O", "B-LOC"]} for i in range(4)]
ANSWERS = [{"id": f"q{i}", "question": "who?", "context": f"It was Ann {i}.",
            "answers": {"text": ["Ann"], "answer_start": [7]}} for i in range(4)]
PAIRS = [{"dialogue": f"a {i}", "summary": f"s {i}"} for i in range(4)]
ROWS = {"classification": REVIEWS, "pairs": NLI_ROWS, "regression": SCORES,
        "multiple_choice": CHOICES, "token_classification": TAGGED,
        "question_answering": ANSWERS, "seq2seq": PAIRS}


class FakeDataset:
    """The interface of a `datasets.Dataset` that is used."""

    def __init__(self, rows, features):
        self.rows, self.features = rows, features

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


class FakeFeature:
    """A ClassLabel if it has names, or a list of `feature`."""

    def __init__(self, names=None, feature=None):
        if names is not None:
            self.names = names
        if feature is not None:
            self.feature = feature


def write_jsonl(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


# Equal datasets


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_memory_and_in_files_give_the_same_dataset(name, tmp_path):
    rows = ROWS[name]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    expected = load_dataset(path, validation=path)
    assert expected.task_type == {"pairs": "classification"}.get(name, name)
    assert load_dataset(rows, validation=rows) == expected
    assert load_dataset(tuple(rows), validation=iter(rows)) == expected
    assert load_dataset({"train": rows, "test": rows}) == expected
    assert load_dataset(rows, validation=path) == expected
    assert load_dataset(path, validation=rows) == expected
    dataset = FakeDataset(rows, dict.fromkeys(rows[0], FakeFeature()))
    assert load_dataset(dataset, validation=dataset) == expected
    if name in ("classification", "pairs", "regression", "seq2seq"):
        table = write_csv(tmp_path / "rows.csv", rows)
        assert load_dataset(table, validation=table) == expected


@needs_pandas
@pytest.mark.parametrize("name", ROWS)
def test_data_frames(name):
    frame = pandas.DataFrame(ROWS[name])
    expected = load_dataset(ROWS[name], validation=ROWS[name])
    assert load_dataset(frame, validation=frame) == expected
    assert load_dataset({"train": ROWS[name], "test": frame}) == expected


@pytest.mark.parametrize("name", ROWS)
def test_hugging_face_datasets(name):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS[name])
    expected = load_dataset(ROWS[name], validation=ROWS[name])
    assert load_dataset(dataset, validation=dataset) == expected
    assert load_dataset(datasets.DatasetDict({"train": dataset, "validation": dataset})) == expected


def test_options_apply_to_data_in_memory():
    rows = [{**row, "fold": i % 4} for i, row in enumerate(REVIEWS)]
    found = load_dataset(rows, validation_filter={"fold": [3]}, columns={"text": "label"}, limit=6)
    assert len(found.train) == 6 and len(found.validation) == 5
    assert {example["text"] for example in found.validation} == {"good"}
    found = load_dataset(rows, validation_fraction=0.25, label_names=("good", "bad"))
    assert len(found.validation) == 5 and found.label_names == ("good", "bad")
    rows = [{"premise": "a", "hypothesis": "b", "label": i} for i in (0, 1, 2, -1)]
    found = load_dataset(rows, validation=rows, like="hf:snli")
    assert found.label_names == ("entailment", "neutral", "contradiction")
    assert found.dropped["train"] == {"no label": 1}


# Labels


def test_class_names_of_hugging_face_features():
    features = {"text": FakeFeature(), "label": FakeFeature(("no", "yes"))}
    dataset = FakeDataset([{"text": "a", "label": 1}, {"text": "b", "label": 0},
                           {"text": "c", "label": -1}], features)
    found = load_dataset(dataset, validation=dataset)
    assert found.label_names == ("no", "yes") and found.dropped["train"] == {"no label": 1}
    assert [example["label"] for example in found.train] == [1, 0]
    assert load_dataset(dataset, validation=[{"text": "d", "label": "yes"}]).validation == [
        {"text": "d", "label": 1}]
    features = {"tokens": FakeFeature(), "ner_tags": FakeFeature(feature=FakeFeature(["O", "LOC"]))}
    dataset = FakeDataset([{"tokens": ["a", "b"], "ner_tags": [0, 1]}], features)
    found = load_dataset(dataset, validation=dataset)
    assert found.label_names == ("O", "LOC") and found.train[0]["tags"] == [0, 1]


def test_class_names_of_hugging_face_datasets():
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    dataset = dataset.cast_column("label", datasets.ClassLabel(names=["no", "yes"]))
    assert load_dataset(dataset, validation=dataset).label_names == ("no", "yes")


@pytest.mark.parametrize(("labels", "task_type", "label_names"), [
    (("b", "a", "b"), "classification", ("a", "b")),
    ((10, 9, 10), "classification", ("9", "10")),
    ((1.0, 0.0, 1.0), "classification", ("0", "1")),
    ((True, False, True), "classification", ("false", "true")),
    ((0.5, 1, 2), "regression", ()),
])
def test_kinds_of_labels(labels, task_type, label_names):
    rows = [{"text": "t", "label": label} for label in labels]
    for data in (rows, pandas.DataFrame(rows)) if pandas else (rows,):
        found = load_dataset(data, validation=data)
        assert (found.task_type, found.label_names) == (task_type, label_names)


@needs_pandas
def test_missing_values_of_a_data_frame():
    frame = pandas.DataFrame({"text": ["a", None, "c", "d"], "label": [1, 0, None, 0]})
    found = load_dataset(frame, validation=frame, on_bad_rows="drop")
    assert found.train == [{"text": "a", "label": 1}, {"text": "d", "label": 0}]
    assert found.dropped["train"] == {"empty text": 1, "empty label": 1}
    with pytest.raises(ValueError, match="row 1 of data: the text in column 'text' is empty"):
        load_dataset(frame, validation=frame)


# Validation split


@pytest.mark.parametrize(("num_rows", "num_validation"), [(2, 1), (20, 2), (26, 3)])
def test_a_tenth_is_held_out_without_validation(num_rows, num_validation, capsys):
    rows = [{"source": f"s{i}", "target": "t"} for i in range(num_rows)]
    found = load_dataset(rows)
    assert (len(found.train), len(found.validation)) == (num_rows - num_validation, num_validation)
    sources = [example["source"] for example in [*found.train, *found.validation]]
    assert sorted(sources) == sorted(row["source"] for row in rows)
    printed = capsys.readouterr().out.splitlines()
    assert printed == [f"no validation data was given: {num_validation} of {num_rows} rows, drawn "
                       "at random with seed 0, are held out for validation"]
    assert load_dataset({"train": rows}) == found
    assert num_rows == 2 or load_dataset(rows, seed=1).validation != found.validation


def test_one_row_cannot_be_divided():
    with pytest.raises(ValueError, match="data has 1 row and no validation split; give at least 2"):
        load_dataset(PAIRS[:1])


def test_nothing_is_printed_with_a_validation_split(capsys):
    load_dataset(REVIEWS, validation=REVIEWS)
    load_dataset({"train": REVIEWS, "dev": REVIEWS})
    load_dataset(REVIEWS, validation_fraction=0.5)
    assert capsys.readouterr().out == ""


def test_which_split_of_a_dict_is_the_validation_split():
    splits = {name: [{"source": name, "target": "t"}] for name in ("train", "test", "dev", "other")}

    def validation(data, **options):
        return load_dataset(data, **options).validation[0]["source"]

    assert validation(splits) == "dev"
    assert validation(splits, validation="test") == "test"
    assert validation(splits, validation="other") == "other"
    assert validation({"train": splits["train"], "test": splits["test"]}) == "test"
    matched = {"train": splits["train"], "validation_matched": splits["test"]}
    assert validation(matched) == "test"
    matched["validation_mismatched"] = splits["other"]
    with pytest.raises(ValueError, match="has 2 splits with the word validation in their names"):
        load_dataset(matched)
    assert validation(matched, validation="validation_mismatched") == "other"
    assert validation(splits["train"], validation={"test": splits["test"]}) == "test"
    assert validation(splits["train"], validation={"any": splits["other"]}) == "other"
    with pytest.raises(ValueError, match="validation is a dict without a validation split"):
        load_dataset(PAIRS, validation={"a": PAIRS, "b": PAIRS})


# Labeled datasets


def test_a_labeled_dataset_is_returned_as_it_is():
    found = load_dataset(REVIEWS, validation=REVIEWS)
    assert load_dataset(found) is found
    with pytest.raises(ValueError, match="columns, limit would have no effect"):
        load_dataset(found, columns={"text": "label"}, limit=3)


@pytest.mark.parametrize("name", ROWS)
def test_a_labeled_dataset_with_another_validation_split(name):
    found = load_dataset(ROWS[name], validation=ROWS[name])
    half = found._replace(train=found.train[:1], validation=found.validation[:2])
    assert isinstance(half, LabeledDataset)
    assert load_dataset(found, validation=half) == found._replace(validation=half.validation)
    # The validation rows need columns with the names of the fields.
    assert load_dataset(found, validation=found.validation[:2]) == load_dataset(
        found, validation=half)


# Errors


@pytest.mark.parametrize(("data", "options", "message"), [
    (42, {}, "data is of type int, which is not supported; supported: a list of dicts, a pandas"),
    (None, {}, "data is of type NoneType.*hf:NAME, .*or the path of a .tsv"),
    (b"data.csv", {}, "data is of type bytes"),
    ([], {}, "data has 0 rows; give at least 1"),
    (REVIEWS, {"validation": []}, "validation has 0 rows"),
    (REVIEWS, {"validation": 3}, "validation is of type int, which is not supported"),
    ([{"text": "a"}, "b"], {}, "row 1 of data is of type str; give a dict such as"),
    (["a"], {}, "row 0 of data is of type str"),
    ({}, {}, "data is a dict with the keys  and without 'train'"),
    ({"text": ["a"], "label": [1]}, {}, "data is a dict with the keys 'text', 'label' and without"),
    ({"train": ["a"], "test": ["b"]}, {}, r"row 0 of data\['train'\] is of type str"),
    ({"train": REVIEWS, "test": REVIEWS}, {"validation": "dev"},
     "data has no split 'dev'; it has 'train', 'test'"),
    (REVIEWS, {"validation": "dev"}, "validation is 'dev', which is neither a file nor a split"),
    (REVIEWS, {"header": ["text"]}, r"header is \['text'\], but data is not a file"),
    (REVIEWS, {"validation": REVIEWS, "validation_fraction": 0.1}, "give one of validation"),
    ([*REVIEWS, {"text": "a"}], {"validation": REVIEWS}, "row 20 of data: no column 'label'"),
    (REVIEWS, {"validation": [*REVIEWS, {"text": "a", "label": "fair"}]},
     "row 20 of validation: label 'fair' is not among the training labels bad, good"),
    ({"train": ANSWERS, "test": [{**ANSWERS[0], "answers": {"text": ["Bo"], "answer_start": [7]}}]},
     {}, r"row 0 of data\['test'\] \(id q0\): the answer 'Bo' is not at character 7"),
    ([{"foo": 1}] * 2, {}, "row [01] of data: the task type cannot be inferred from the columns"),
])
def test_errors(data, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(data, **options)


@needs_pandas
def test_errors_of_data_frames():
    frame = pandas.DataFrame([["a", 1, 2]], columns=["text", "label", "label"])
    with pytest.raises(ValueError, match="data has two columns 'label'; rename one of them"):
        load_dataset(frame, validation=frame)
    frame = pandas.DataFrame([["a", 1], ["b", 0]])
    with pytest.raises(ValueError, match="of validation: no column 'text'; choose one of 0, 1"):
        load_dataset(REVIEWS, validation=frame)
    found = load_dataset(frame, validation=frame, columns={"text": "0", "label": "1"})
    assert found.train[0] == {"text": "a", "label": 1}


def test_splits_of_a_library_are_tables():
    rows = mapped_dataset.MappedDataset([0, 1], lambda i: {"text": "a", "label": i},
                                        {"label": ("no", "yes")})
    assert splits.from_table(rows, "data").class_names == {"label": ("no", "yes")}
    assert load_dataset(rows, validation=rows).label_names == ("no", "yes")


def test_no_optional_library_is_imported():
    script = ("import sys\n"
              "from transformer_jax.data import load_dataset\n"
              "rows = [{'source': 'a', 'target': 'b'}]\n"
              "load_dataset(rows, validation=rows)\n"
              "assert not {'pandas', 'datasets', 'jax'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", script], check=True)
