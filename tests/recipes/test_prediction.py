"""`predict` and `evaluate` for every task type, and for pre-trained models."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_configs import ROWS

from transformer_jax.pretrained import load_run
from transformer_jax.recipes.finetuning import finetune
from transformer_jax.recipes.prediction import evaluate, load_task_model, predict

INPUTS = {  # without labels, in the forms that the table in `predict` lists
    "classification": [("one two", "two three"), {"text": "four", "text_b": "five six"}],
    "regression": [("one two", "two three"), ("four", "five six")],
    "multiple_choice": [("one two", ["two", "three four"]), ("four", ["five", "six"])],
    "token_classification": ["one two", ["three", "four", "five"]],
    "question_answering": [("one", "one two three"), ("four", "four five six")],
    "seq2seq": ["one two", "four five"],
}
MODELS = {"classification": "gpt", "multiple_choice": "gpt", "seq2seq": "gpt"}


@pytest.mark.slow
@pytest.mark.parametrize("task_type", INPUTS)
def test_predict_and_evaluate(task_type, pretrained, tmp_path):
    """The folder of a run and the result of `finetune` give the same predictions and scores."""
    model = MODELS.get(task_type, "bert")
    rows = [ROWS[task_type][i % 2] for i in range(8)]
    result = finetune(
        pretrained(f"{model}_python_docs"), rows, validation=rows[:2], out=tmp_path / "run",
        task_type=task_type, max_length=32, batch_size=8, num_steps=2, num_beams=1,
        target_length=8, max_question_length=8,
        gpt_special_tokens=model == "gpt" and task_type != "seq2seq")
    predictions = predict(tmp_path / "run", INPUTS[task_type])
    assert result.predict(INPUTS[task_type]) == predictions
    assert load_task_model(tmp_path / "run").task._replace(num_choices=0) == (
        result.task._replace(num_choices=0))
    lines = (tmp_path / "run" / "predictions.jsonl").read_text().splitlines()
    saved = list(map(json.loads, lines))
    for found, line, given in zip(predictions, saved, ROWS[task_type]):
        if task_type == "classification":
            assert found["label"] == line["prediction"]
            assert found["score"] == pytest.approx(max(found["probabilities"].values()))
            assert found["probabilities"]["yes"] == pytest.approx(line["p(yes)"], abs=1e-5)
        elif task_type == "regression":
            assert found["score"] == pytest.approx(line["prediction"], abs=1e-3)
        elif task_type == "multiple_choice":
            assert str(found["label"]) == line["prediction"]
            assert found["choice"] == given["choices"][found["label"]]
        elif task_type == "token_classification":
            assert found["labels"] == line["tags"] and found["words"] == given["words"]
            assert all(0 < score <= 1 for score in found["scores"])
        elif task_type == "question_answering":
            assert found["answer"] == line["prediction"]
            assert given["context"][found["start"] : found["stop"]] == found["answer"]
        else:
            assert found["text"] == line["prediction"]
    scores = evaluate(tmp_path / "run", rows[:2])
    metric = next(iter(scores))
    assert metric == next(iter(result.metrics))
    np.testing.assert_allclose(scores[metric], result.metrics[metric], rtol=1e-5, equal_nan=True)


def test_labels_of_other_data_are_mapped_by_name(pretrained, tmp_path):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(6) for word in ("good", "bad")]
    result = finetune(pretrained("bert_python_docs"), rows, validation=rows, max_length=16,
                      num_steps=2)
    expected = result.metrics["accuracy"]
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{r['text']}\t{r['label']}\n" for r in rows))
    assert evaluate(result, path)["accuracy"] == expected
    assert evaluate(result, rows)["accuracy"] == expected
    only_good = [row for row in rows if row["label"] == "good"]
    share = np.mean([p["label"] == "good" for p in result.predict(
        [row["text"] for row in only_good])])
    assert evaluate(result, only_good)["accuracy"] == share
    numbers = [{"text": row["text"], "label": int(row["label"] == "good")} for row in rows]
    assert evaluate(result, numbers)["accuracy"] == expected
    with pytest.raises(ValueError, match="ugly"):
        evaluate(result, [*rows, {"text": "x", "label": "ugly"}])


def test_inputs_from_dicts_and_files(pretrained, tmp_path):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(6) for word in ("good", "bad")]
    result = finetune(pretrained("bert_python_docs"), rows, validation=rows, max_length=16,
                      num_steps=2)
    expected = result.predict(["good 1", "bad 2"])
    (tmp_path / "inputs.txt").write_text("good 1\nbad 2\n")
    (tmp_path / "inputs.tsv").write_text("review\nd\n".replace("d\n", "good 1\nbad 2\n"))
    assert result.predict(tmp_path / "inputs.txt") == expected
    assert result.predict(str(tmp_path / "inputs.tsv"), columns={"text": "review"}) == expected
    dicts = [{"id": "a", "sentence": "good 1"}, {"id": "b", "sentence": "bad 2"}]
    found = result.predict(dicts)
    assert [x.pop("id") for x in found] == ["a", "b"] and found == expected
    with pytest.raises(ValueError, match="input 0 has no text"):
        result.predict({"words": "x"})
    with pytest.raises(ValueError, match="unknown option 'beams'"):
        result.predict("x", beams=2)
    with pytest.raises(ValueError, match="0 inputs"):
        result.predict([])


def test_a_checkpoint_with_a_head(exportable, tmp_path):
    rows = [{"text": f"{word} {i}", "label": word} for i in range(6) for word in ("good", "bad")]
    result = finetune(exportable, rows, validation=rows, max_length=64, num_steps=2)
    result.export(tmp_path)
    (found,) = predict(tmp_path, "good 1")
    (expected,) = result.predict("good 1")
    assert found["score"] == pytest.approx(expected["score"], abs=1e-4)
    loaded = predict((result.model, result.params, result.tokenizer), "good 1")
    assert loaded[0]["score"] == pytest.approx(expected["score"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "objective"), [
    ("gpt_python_docs", "causal_lm"), ("bert_python_docs", "mlm_nsp")])
def test_the_pre_training_loss(name, objective, pretrained, sentences, tmp_path):
    folder = pretrained(name)
    found = evaluate(folder)  # on the held-out rows
    assert found["objective"] == objective and np.isfinite(found["loss"])
    assert ("perplexity" in found) == (objective == "causal_lm")
    assert np.isfinite(evaluate(folder, sentences, num_rows=32)["loss"])
    run = load_run(folder)
    texts = Path(sentences).read_text().split("\n\n")
    assert np.isfinite(evaluate(tuple(run)[:3], texts)["loss"])
    with pytest.raises(ValueError, match="data is None"):
        evaluate(tuple(run)[:3])
    with pytest.raises(ValueError, match="has no task head"):
        predict(folder, "x")
