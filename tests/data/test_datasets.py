"""Labeled datasets from files: inferred task types, errors, and balanced subsamples."""

import gzip
import json

import numpy as np
import pytest

from transformer_jax.data import DatasetConfig, known_datasets, load_dataset, subsample_balanced

# Files


def write(path, lines, header=None):
    """Writes rows of strings as .tsv, or dicts as .jsonl."""
    if path.suffix == ".jsonl":
        text = "\n".join(map(json.dumps, lines))
    else:
        text = "\n".join("\t".join(row) for row in ([header] if header else []) + lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "my_train.tsv", [["good", "pos"], ["bad", "neg"], ["fine", "pos"]],
          ["sentence", "label"])
    write(tmp_path / "dev.tsv", [["awful", "neg"]], ["sentence", "label"])
    return tmp_path


def test_columns_and_classes_are_inferred_from_a_folder(folder):
    found = load_dataset(folder)
    assert found.task_type == "classification" and found.metric == "accuracy"
    assert found.label_names == ("neg", "pos") and found.label_range is None
    assert found.train == [{"text": "good", "label": 1}, {"text": "bad", "label": 0},
                           {"text": "fine", "label": 1}]
    assert found.validation == [{"text": "awful", "label": 0}]
    assert found.dropped == {"train": {}, "validation": {}}
    assert load_dataset(folder / "my_train.tsv", validation=folder / "dev.tsv") == found
    assert load_dataset(folder, validation="dev.tsv") == found


def test_files_without_header_byte_order_marks_and_declared_labels(tmp_path):
    (tmp_path / "train.txt").write_text("1\t1\ta \"b\tc\n2\t2\td\te\n3\t3\tf\tg\n")
    (tmp_path / "dev.tsv").write_text("h\ti\t0\nj\tk\t2\n")
    found = load_dataset(
        tmp_path, header=("label", "again", "premise", "hypothesis"),
        validation_header=("premise", "hypothesis", "label"),
        label_names={"3": "entailment", "1": "neutral", "2": "contradiction"},
        validation_label_names=("entailment", "neutral", "contradiction"))
    assert found.label_names == ("entailment", "neutral", "contradiction")
    assert found.train[0] == {"text": 'a "b', "text_b": "c", "label": 1}
    assert [e["label"] for e in found.train] == [1, 2, 0]
    assert [e["label"] for e in found.validation] == [0, 2]

    (tmp_path / "mrpc.tsv").write_text("\ufeffQuality\t#1 String\n10\ta\n9\tb\n10\tc\n")
    found = load_dataset(tmp_path / "mrpc.tsv", validation=tmp_path / "mrpc.tsv",
                           columns={"text": "#1 String", "label": "Quality"}, metric="f1")
    assert found.label_names == ("9", "10") and found.metric == "f1"
    assert [e["label"] for e in found.train] == [1, 0, 1]


def test_validation_rows_are_held_out_from_the_training_file(tmp_path):
    rows = [{"text": f"t{i}", "label": i % 2, "fold": i % 5} for i in range(20)]
    path = tmp_path / "reviews.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    found = load_dataset(path, validation_filter={"fold": [1, "4"]})
    assert [e["text"] for e in found.validation] == [
        f"t{i}" for i in range(20) if i % 5 in (1, 4)]
    assert len(found.train) == 12
    assert load_dataset(tmp_path, validation_filter={"fold": [1, 4]}) == found

    drawn = load_dataset(path, validation_fraction=0.2, seed=1)
    assert len(drawn.validation) == 4 and drawn == load_dataset(
        path, validation_fraction=0.2, seed=1)
    texts = [e["text"] for e in [*drawn.train, *drawn.validation]]
    assert sorted(texts) == sorted(row["text"] for row in rows)
    assert drawn.validation != load_dataset(path, validation_fraction=0.2, seed=2).validation
    few = load_dataset(path, validation_filter={"fold": [0]}, limit=8, seed=3)
    assert len(few.train) == 8 and len(few.validation) == 4

    for options, message in [
        ({"validation_filter": {"fold": [7]}}, "selects 0 of 20 rows"),
        ({"validation_filter": {"fould": [1]}}, "line 1: no column 'fould'; did you mean fold"),
        ({"validation_fraction": 1.5}, "validation_fraction is 1.5; it must be between 0 and 1"),
        ({"validation_fraction": 0.1, "validation_filter": {"fold": [1]}},
         "give one of validation, validation_filter"),
        ({"validation_fraction": 0.1, "limit": 0}, "limit is 0; it must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_dataset(path, **options)


def test_task_types_are_inferred_from_the_columns(tmp_path):
    def load(row, other, **options):
        write(tmp_path / "train.jsonl", [row, other])
        write(tmp_path / "test.jsonl", [row])
        found = load_dataset(tmp_path, **options)
        return found.task_type, found.train[0], found

    task_type, example, found = load({"sentence1": "a", "sentence2": "b", "label": 4},
                                {"sentence1": "c", "sentence2": "d", "label": 1.5})
    assert task_type == "regression" and example == {"text": "a", "text_b": "b", "label": 4.0}
    assert found.label_range == (1.5, 4.0) and found.label_names == ()
    assert found.metric == "pearson_spearman"
    task_type, example, found = load({"text": "a", "label": 4.0}, {"text": "b", "label": 1.0})
    assert task_type == "classification" and found.label_names == ("1", "4")
    task_type, _, found = load({"text": "a", "label": 4}, {"text": "b", "label": 1},
                               task_type="regression", label_range=(0, 5))
    assert task_type == "regression" and found.label_range == (0, 5)
    _, example, found = load({"text": "a", "label": True}, {"text": "b", "label": False})
    assert found.label_names == ("false", "true") and example["label"] == 1

    choices = {"text": "q", "choices": ["x", "y"], "label": 1}
    task_type, example, _ = load(choices, choices)
    assert task_type == "multiple_choice" and example == choices
    row = {"stem": "q", "a": "x", "b": "y", "key": "B"}
    _, example, _ = load(row, row, task_type="multiple_choice",
                         columns={"text": "stem", "choices": ["a", "b"], "label": "key"})
    assert example == choices
    tagged = {"words": ["a", "b"], "tags": ["O", "LOC"]}
    task_type, example, found = load(tagged, {"words": "c d", "tags": "O O"})
    assert task_type == "token_classification" and found.label_names == ("LOC", "O")
    assert example == {"words": ["a", "b"], "tags": [1, 0]}
    # Without B- and I- tags there are no entities, whose F1 would be the metric.
    assert found.metric == "accuracy"
    entities = {"words": ["a", "b"], "tags": ["O", "B-LOC"]}
    assert load(entities, entities)[2].metric == "f1"
    assert found.train[1] == {"words": ["c", "d"], "tags": [1, 1]}
    pair = {"id": 7, "dialogue": "a b", "summary": "c"}
    task_type, example, found = load(pair, pair)
    assert task_type == "seq2seq" and example == {"id": 7, "source": "a b", "target": "c"}
    assert found.metric == "rouge"


def test_three_formats_of_answers(tmp_path):
    base = {"id": "q1", "question": "who?", "context": "It was Ann."}
    wanted = {**base, "answers": [{"text": "Ann", "start": 7}]}
    for row in ({**base, "answers": {"text": ["Ann"], "answer_start": [7], "other": [1]}},
                {**base, "answers": [{"text": "Ann", "start": 7}]},
                {**base, "answer": "Ann", "start": "7"}):
        path = write(tmp_path / "a.jsonl", [row])
        found = load_dataset(path, validation=path)
        assert found.task_type == "question_answering" and found.metric == "squad"
        assert found.train == [wanted]
    path = write(tmp_path / "a.jsonl", [{**base, "answers": {"text": [], "answer_start": []}}])
    assert load_dataset(path, validation=path).train[0]["answers"] == []

    off = {**base, "id": "q2", "answers": [{"text": "Ann", "start": 6}]}
    path = write(tmp_path / "a.jsonl", [wanted, off])
    with pytest.raises(ValueError, match=r"a\.jsonl line 2 \(id q2\): the answer 'Ann' is not at "
                                         "character 6 of the context, which has ' An' there"):
        load_dataset(path, validation=path)
    found = load_dataset(path, validation=path, on_bad_rows="drop")
    assert found.train == [wanted]
    assert found.dropped["train"] == {"answer not in its context": 1}
    path = write(tmp_path / "a.jsonl", [off])
    with pytest.raises(ValueError, match="all other rows of this split were left out"):
        load_dataset(path, validation=path, on_bad_rows="drop")


GOOD = [["a", "x"], ["b", "y"]]


@pytest.mark.parametrize(("train", "options", "message"), [
    (GOOD, {"columns": {"text": "sentense", "label": "label"}},
     r"train\.tsv line 2: no column 'sentense'; did you mean sentence\? Choose one of "
     "sentence, label"),
    (GOOD, {"columns": {"text": "sentence", "label": "lable"}},
     r"line 2: no column 'lable'; did you mean label"),
    (GOOD, {"columns": {"texd": "sentence"}},
     r"columns has the unknown field 'texd'; did you mean text or text_b\? Choose one of id"),
    (GOOD, {"task_type": "seq2seq"}, "no column for source, target of seq2seq; set it in columns"),
    (GOOD, {"task_type": "sorting"}, "unknown task_type 'sorting'; choose one of classification"),
    (GOOD, {"on_bad_rows": "skip"}, "unknown on_bad_rows 'skip'; choose one of error, drop"),
    (GOOD, {"task_type": "regression"}, "line 2: label 'x' is not a number"),
    ([["a", "1"], ["b", "7.5"]], {"label_range": (0, 5)},
     "line 3: label 7.5 is outside the range 0 to 5"),
    ([["a", "1.5"], ["b", "2"]], {"label_range": (5, 5)}, r"label_range is \(5, 5\)"),
    ([["a", "1.5"], ["b", "1.5"]], {}, r"all training labels are 1\.5; a regression needs"),
    ([["a", "1.5"], ["b", ""]], {}, "line 3: the label is empty"),
    (GOOD, {"metric": "acuracy"},
     "metric 'acuracy' is not supported for classification; did you mean accuracy"),
    (GOOD, {"metric": "bleu"}, "metric 'bleu' is not supported for classification"),
    ([*GOOD, [" ", "x"]], {}, "line 4: the text in column 'sentence' is empty"),
    ([*GOOD, ["c", ""]], {}, "line 4: the label is empty"),
    ([["a", "x"]], {}, "all labels in column 'label' are 'x'"),
    (GOOD, {"label_names": ("x", "y", "z")}, "none of the 2 training examples has the label 'z'"),
    (GOOD, {"label_names": ("x", "x")}, "give at least 2 names, all different"),
    (GOOD, {"label_names": ("x", "w")}, "line 3: label 'y' is not among the training labels x, w"),
    (GOOD, {"validation_label_names": ("x", "w")},
     "the validation split has a class 'w' that is missing in the training split, which has x, y"),
    (GOOD, {"like": "hf:snly"}, "unknown labeled dataset 'hf:snly'; did you mean hf:snli"),
    (GOOD, {"like": "hf:snli"}, "no column 'premise'"),
])
def test_errors_name_the_line_and_the_column(tmp_path, train, options, message):
    write(tmp_path / "train.tsv", train, ["sentence", "label"])
    write(tmp_path / "dev.tsv", train[:1], ["sentence", "label"])
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path, **options)


def test_errors_in_the_validation_split(folder):
    write(folder / "dev.tsv", [["a", "pos"], ["b", "neutral"]], ["sentence", "label"])
    with pytest.raises(ValueError, match=r"dev\.tsv line 3: label 'neutral' is not among the "
                                         "training labels neg, pos"):
        load_dataset(folder)
    with pytest.raises(ValueError, match="has no validation split; give a file as validation"):
        load_dataset(folder / "my_train.tsv")
    with pytest.raises(FileNotFoundError, match=r"no\.tsv does not exist"):
        load_dataset(folder, validation="no.tsv")
    (folder / "other_dev.tsv").write_text("x")
    with pytest.raises(ValueError, match="has 2 tables with the word dev in their names"):
        load_dataset(folder)
    braces = folder.rename(folder.with_name("a{b}"))
    with pytest.raises(ValueError, match=r"a\{b\} has 2 tables with the word dev"):
        load_dataset(braces)
    braces.rename(folder)
    (folder / "my_train.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="no table with the word train"):
        load_dataset(folder)
    with pytest.raises(FileNotFoundError, match=r"unknown dataset .*also supported: tfds:NAME"):
        load_dataset(folder / "none")


def test_errors_in_rows_of_other_task_types(tmp_path):
    def load(*rows, **options):
        path = write(tmp_path / "rows.jsonl", list(rows))
        return load_dataset(path, validation=path, **options)

    two = {"choices": ["a", "b"], "label": 0}
    for rows, message in [
        ((two, {"choices": ["a", "b", "c"], "label": 2}), "examples have 2, 3 choices"),
        ((two, {"choices": ["a", "b"], "label": 2}), "line 2: label 2 is out of range for 2"),
        ((two, {"choices": ["a", "b"], "label": "best"}), "label 'best' is not the index of a"),
        ((two, {"choices": ["a", ""], "label": 0}), "line 2: one of the choices"),
        ((two, {"choices": ["a", None], "label": 0}), "line 2: one of the choices"),
        ((two, {"choices": "red apple|pear", "label": 0}),
         "line 2: column 'choices' holds the text 'red apple.*give a list such as"),
        ((two, {"choices": ["a"], "label": 0}), "line 2: there are 1 choices"),
        (({"choices": {"text": ["a", "b"]}, "label": 0},),
         "name one of its items, .*'choices.text'"),
        (({"choices": 3, "label": 0},), "line 1: column 'choices' holds 3; give a list"),
        (({"question": "q", "context": "a", "answers": {"text": ["a"], "start": []}},),
         "line 1: the answers are .*; give a list of"),
        (({"question": "q", "context": "a", "answers": "a"},), "the answers are a; give a list"),
        (({"words": ["a"], "tags": ["O", "X"]},), "line 1: there are 1 words but 2 tags"),
        (({"words": ["a", " "], "tags": ["O", "X"]},),
         "line 1: column 'words' has no words or an empty word"),
        (({"source": "a", "target": ""},), "line 1: the text in column 'target' is empty"),
        (({"foo": "a"},), "line 1: the task type cannot be inferred from the columns 'foo'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(*rows)
    found = load({"source": "a", "target": ""}, {"source": "a", "target": "b"}, on_bad_rows="drop")
    assert len(found.train) == 1 and found.dropped["validation"] == {"empty text": 1}


def test_choices_in_csv_missing_labels_and_missing_ids(tmp_path):
    (tmp_path / "a.csv").write_text('text,choices,label\nq,"[""red"", ""green pear""]",1\n')
    found = load_dataset(tmp_path / "a.csv", validation=tmp_path / "a.csv")
    assert found.train == [{"text": "q", "choices": ["red", "green pear"], "label": 1}]
    rows = [{"text": "a", "label": x} for x in (1.5, None, 0.25, float("nan"), 2)]
    path = write(tmp_path / "b.jsonl", rows)
    found = load_dataset(path, validation=path, on_bad_rows="drop")
    assert found.task_type == "regression" and found.label_range == (0.25, 2.0)
    assert found.dropped["train"] == {"empty label": 2}
    # Rows without an id are accepted.
    write(tmp_path / "c.jsonl", [{"text": "a", "label": "x", "id": 7}, {"text": "b", "label": "y"}])
    found = load_dataset(tmp_path / "c.jsonl", validation=tmp_path / "c.jsonl")
    assert found.train[0]["id"] == 7 and "id" not in found.train[1]


def test_unlabeled_rows_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.tsv", [["a", "-"], ["b", "x"], ["c", "y"], ["d", "-1"]],
                 ["text", "label"])
    found = load_dataset(path, validation=path, label_names=("x", "y"))
    assert len(found.train) == 2 and found.dropped["train"] == {"no label": 2}
    found = load_dataset(path, validation=path, label_names=("x", "y", "z"),
                           allow_empty_classes=True)
    assert found.label_names == ("x", "y", "z")
    signs = write(tmp_path / "b.tsv", [["a", "-1"], ["b", "1"]], ["text", "label"])
    assert load_dataset(signs, validation=signs).label_names == ("-1", "1")


def test_texts_are_not_lists_or_dicts(tmp_path):
    for value in (["a", "b"], {"de": "a"}):
        path = write(tmp_path / "t.jsonl", [{"source": value, "target": "b"}])
        with pytest.raises(ValueError, match=r"line 1: column 'source' holds a .*; name"):
            load_dataset(path, validation=path)


def test_a_dataset_config_and_its_overrides(folder):
    config = DatasetConfig(str(folder), label_names={"pos": "good", "neg": "bad"})
    found = load_dataset(config)
    assert found.label_names == ("good", "bad") and len(found.train) == 3
    assert load_dataset(config, limit=1, allow_empty_classes=True).train in (
        [e] for e in found.train)
    rows = [{"sentence": "so so", "label": "neg"}, {"sentence": "great", "label": "pos"}]
    assert load_dataset(config, rows, validation=rows).train[0] == {"text": "so so", "label": 1}
    joined = load_dataset(rows, validation=rows, columns={"text": "sentence+label"})
    assert joined.train[0]["text"] == "so so neg"
    plus = [{"a+b": "x", "a": "y", "b": "z", "label": i} for i in range(2)]
    assert load_dataset(plus, validation=plus, columns={"text": "a+b"}).train[0]["text"] == "x"
    folds = [{"text": f"t{i}", "label": i % 2, "fold": i} for i in range(4)]
    assert [e["text"] for e in load_dataset(folds, validation_folds=(3,)).validation] == ["t3"]
    for arguments, options, message in (
            ((config,), {"colums": {}}, "unknown option 'colums'; did you mean columns"),
            ((str(folder), rows), {}, "two datasets were given"),
            ((config,), {"label_names": {"pos": "x", "neg": "x"}}, "give at least 2 classes")):
        with pytest.raises(ValueError, match=message):
            load_dataset(*arguments, **options)


# Subsamples


def test_balanced_subsamples():
    examples = [{"label": int(i % 10 == 0), "n": i} for i in range(100)]
    assert subsample_balanced(examples) is examples
    drawn = subsample_balanced(examples, 10, seed=1)
    assert np.bincount([e["label"] for e in drawn]).tolist() == [10, 10]
    with pytest.raises(ValueError, match=r"11 labels per class .* fewer examples: \{1: 10\}"):
        subsample_balanced(examples, 11)
    small, large = (subsample_balanced(examples, total=n, seed=2) for n in (8, 32))
    assert large[:8] == small and large == subsample_balanced(examples, total=32, seed=2)
    assert large != subsample_balanced(examples, total=32, seed=3)
    assert np.bincount([e["label"] for e in small]).tolist() == [4, 4]
    assert np.bincount([e["label"] for e in large]).tolist() == [22, 10]
    assert len({e["n"] for e in subsample_balanced(examples, total=100)}) == 100
    with pytest.raises(ValueError, match="101 examples were requested, but there are 100"):
        subsample_balanced(examples, total=101)
    with pytest.raises(ValueError, match="give one of the two numbers"):
        subsample_balanced(examples, 1, total=1)
    with pytest.raises(ValueError, match="0 labels per class were requested; it must be at"):
        subsample_balanced(examples, 0)
    scores = [{"label": float(i)} for i in range(9)]
    assert subsample_balanced(scores, total=4) == subsample_balanced(scores, total=9)[:4]


# Real data

SENTENCES = {"text": "sentence_A", "text_b": "sentence_B"}
REAL = {
    "sst2": ({}, 67349, 872, ("0", "1")),
    "sick": ({"columns": {**SENTENCES, "label": "entailment_judgment"}}, 4500, 500,
             ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")),
    "rte": ({}, 2490, 277, ("entailment", "not_entailment")),
    "snli": ({"header": ("label", "label2", "premise", "hypothesis"),
              "validation_header": ("premise", "hypothesis", "label"),
              "label_names": {"3": "entailment", "1": "neutral", "2": "contradiction"},
              "validation_label_names": known_datasets.NLI}, 18000, 9842, known_datasets.NLI),
    "cola": ({"header": ("source", "label", "star", "sentence")}, 8551, 527, ("0", "1")),
    "mrpc": ({"columns": {"text": "#1 String", "text_b": "#2 String", "label": "Quality"},
              "validation_fraction": 0.1}, 3668, 408, ("0", "1")),
    "squad": ({}, 87599, 10570, ()),
    "movie_reviews": ({"validation_filter": {"fold": [9]}}, 1800, 200, ("neg", "pos")),
    "dialogsum": ({}, 12460, 500, ()),
}


@pytest.mark.parametrize("name", REAL)
def test_real_datasets(name, real_data):
    options, train, validation, names = REAL[name]
    found = load_dataset(real_data / name, **options)
    assert (len(found.train), len(found.validation)) == (train, validation)
    assert found.label_names == names and not any(found.dropped.values())


def test_real_regression(real_data):
    found = load_dataset(real_data / "sick", columns={**SENTENCES, "label": "relatedness_score"})
    assert found.task_type == "regression" and found.label_range == (1.0, 5.0)
