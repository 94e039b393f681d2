"""The commands `evaluate`, `predict` and `classify`, on runs of tiny models."""

import io
import json

import pytest

pytestmark = pytest.mark.slow


def test_classify_prints_classes_by_probability(saved, run):
    status, out, _ = run("classify", saved / "topics", "the cat", "a dog")
    assert status == 0
    lines = out.splitlines()
    assert lines[::2] == ["the cat", "a dog"]
    for line in lines[1::2]:
        words = [word.split() for word in line.strip().split(", ")]
        assert {name for name, _ in words} == {"zoo", "park", "house"}
        probabilities = [float(p) for _, p in words]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=0.01)


def test_predict_gives_the_same_for_texts_file_and_standard_input(saved, run, tmp_path,
                                                                  monkeypatch):
    status, out, _ = run("predict", saved / "topics", "the cat", "a dog\tthe park")
    found = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(found) == 2
    assert found[0]["label"] in ("zoo", "park", "house") and len(found[0]["probabilities"]) == 3
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat\na dog\tthe park\n"))
    assert run("predict", saved / "topics")[1] == out
    (tmp_path / "inputs.jsonl").write_text(
        '{"first": "the cat"}\n{"first": "a dog", "text_b": "the park"}\n')
    path = tmp_path / "out" / "predictions.jsonl"
    status, printed, _ = run("predict", saved / "topics", "--data", tmp_path / "inputs.jsonl",
                             "--columns", "text", "first", "--out", path)
    assert status == 0 and printed.strip() == f"{path}: 2 predictions"
    assert [json.loads(line) for line in path.read_text().splitlines()] == found


def test_evaluate_prints_scores_and_writes_all_metrics(saved, run, tmp_path):
    (tmp_path / "test.tsv").write_text("sentence\tlabel\nthe cat\tzoo\na dog\tpark\n")
    status, out, _ = run("evaluate", saved / "topics", "--data", tmp_path / "test.tsv",
                         "--columns", "text", "sentence", "label", "label",
                         "--out", tmp_path / "metrics.json")
    assert status == 0
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert out.splitlines()[0] == f"accuracy: {metrics['accuracy']:.4g}"
    assert len(metrics["confusion"]) == 3


def test_evaluate_pretrained_model_on_text(saved, run, tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat\n\na dog ran in the park\n" * 30)
    status, out, _ = run("evaluate", saved / "gpt", "--data", tmp_path / "text.txt",
                         "--num-rows", "32")
    values = dict(line.split(": ") for line in out.splitlines())
    assert status == 0 and values["objective"] == "causal_lm"
    assert float(values["perplexity"]) > 1


@pytest.mark.parametrize(("arguments", "message"), [
    (("classify", "bert", "x"), "has no classifier; fine-tune it first"),
    (("predict", "bert", "x"), "has no task head"),
    (("predict", "topics", "x", "--data", "y.txt"), "--data and texts are both given"),
    (("evaluate", "topics"), "give labeled examples of classification"),
    (("evaluate", "topics", "--data", "nowhere.tsv"), "nowhere.tsv"),
    (("evaluate", "nowhere"), "nowhere"),
])
def test_wrong_input_is_one_line(saved, run, arguments, message):
    command, name, *rest = arguments
    status, _, err = run(command, saved / name, *rest)
    line = err.splitlines()[-1]
    assert status == 2 and line.startswith("error: ") and message in line
    assert "Traceback" not in err
