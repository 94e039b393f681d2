"""`finetune`: files of a run, kinds of data in memory, options, and errors before training."""

import json

import jax
import numpy as np
import pytest

from transformer_jax import tree
from transformer_jax.data import load_dataset
from transformer_jax.finetuning import adapter_io, peft
from transformer_jax.generation import generation_options
from transformer_jax.models import build_model
from transformer_jax.pretrained import load_pretrained, load_run, save_pretrained
from transformer_jax.recipes import encoding, finetuning, finetuning_run, retention
from transformer_jax.recipes.config import DatasetConfig, TrainingConfig
from transformer_jax.recipes.finetuning import FinetuneConfig, finetune, finetune_config
from transformer_jax.recipes.finetuning_run import initial_params

SHORT = TrainingConfig(max_length=16, num_steps=2)
EXAMPLES = [{"sentence": f"it is {label} {i}", "label": label}
            for i in range(12) for label in ("good", "bad")]
OPTIONS = {"columns": {"text": "sentence"}, "max_length": 16, "num_steps": 2, "batch_size": 8,
           "trainable": "lora:2"}


def write_tsv(path) -> str:
    path.write_text("sentence\tlabel\n" + "".join(
        f"{row['sentence']}\t{row['label']}\n" for row in EXAMPLES))
    return str(path)


class FakeDataset:
    """The methods of a `datasets.Dataset` that `data.splits` uses."""

    features: dict = {"sentence": None, "label": None}  # noqa: RUF012

    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, i):
        return EXAMPLES[i]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_python_docs", "bert_python_docs"])
def test_files_of_a_run(name, pretrained, tmp_path):
    path = write_tsv(tmp_path / "train.tsv")
    out = tmp_path / "tuned"
    config = FinetuneConfig(
        pretrained=str(pretrained(name)), out=out, trainable="last_k:1", training=SHORT,
        dataset=DatasetConfig(path, validation=path, columns={"text": "sentence"}))
    result = finetune(config)
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert np.sum(metrics["confusion"]) == 24  # every example exactly once
    assert 0 < metrics["share_trained"] < 1 and metrics["held_out_after"] > 0
    assert len((out / "predictions.jsonl").read_text().splitlines()) == 24
    tuned, base = load_run(out), load_run(pretrained(name))
    assert tuned.label_names == ["bad", "good"]
    again = finetune(config)  # the same call on a finished run
    np.testing.assert_array_equal(again.metrics["confusion"], result.metrics["confusion"])
    assert again.history == []
    # The adapter on the base is the fine-tuned model.
    start = initial_params(tuned.model, base.params)
    adapter = adapter_io.load_adapter(out / finetuning.ADAPTER_DIR, start)
    assert adapter.manifest["label_names"] == ["bad", "good"]
    applied = tree.flatten_paths(adapter_io.apply_adapter(start, adapter))
    for path, leaf in tree.flatten_paths(tuned.params).items():
        np.testing.assert_array_equal(applied[path], leaf)


@pytest.mark.slow
def test_all_kinds_of_data_give_the_same_result(pretrained, tmp_path):
    folder = pretrained("bert_python_docs")
    path = write_tsv(tmp_path / "train.tsv")
    kinds = {"list": EXAMPLES, "path": path, "dataset": FakeDataset()}
    try:
        import pandas
    except ModuleNotFoundError:
        pass
    else:
        kinds["frame"] = pandas.DataFrame(EXAMPLES)
    results = {name: finetune(folder, data, validation=data, **OPTIONS)
               for name, data in kinds.items()}
    results["loaded"] = finetune(tuple(load_run(folder))[:3], EXAMPLES, validation=path, **OPTIONS)
    labeled = load_dataset(EXAMPLES, validation=EXAMPLES, columns={"text": "sentence"})
    results["labeled"] = finetune(folder, labeled, **{
        name: x for name, x in OPTIONS.items() if name != "columns"})
    expected = results["list"]
    assert expected.task_type == "classification" and expected.label_names == ("bad", "good")
    assert "held_out_after" not in expected.metrics
    for result in results.values():
        assert result.predictions == expected.predictions
        for a, b in zip(jax.tree.leaves(result.params), jax.tree.leaves(expected.params)):
            np.testing.assert_array_equal(a, b)


def test_a_tenth_is_held_out_and_no_files_are_written(pretrained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    result = finetune(pretrained("bert_python_docs"), EXAMPLES, **OPTIONS,
                      retention_data="python_docs/documents")
    assert len(result.predictions) == 2 and result.metrics["labels"] == 22
    assert "2 of 24 rows" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    assert result.metrics["held_out_before"] > 0 and result.history[-1]["step"] == 2
    (prediction,) = result.predict("it is good")
    assert prediction["label"] in ("good", "bad")


@pytest.mark.slow
def test_export_merges_lora(exportable, tmp_path):
    result = finetune(exportable, EXAMPLES, validation=EXAMPLES, **OPTIONS, peak_lr=0.1,
                      frozen_dtype="bfloat16")
    result.export(tmp_path / "exported")
    found = load_pretrained(tmp_path / "exported")
    assert found.model.task == "classification"
    tokens = np.arange(5, 15)[None]
    logits = [model.apply({"params": params}, tokens, method="classification_logits")
              for model, params in ((result.model, result.params), (found.model, found.params))]
    np.testing.assert_allclose(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_config_of_a_checkpoint_is_kept_in_its_exports(exportable, tmp_path):
    """What its config.json and generation_config.json contain beyond the architecture."""
    save_pretrained(tmp_path / "base", *exportable)
    path, other = tmp_path / "base" / "config.json", tmp_path / "base" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"my_note": [1]}))
    other.write_text('{"max_new_tokens": 7}')
    result = finetune(tmp_path / "base", EXAMPLES, validation=EXAMPLES, **OPTIONS,
                      out=tmp_path / "run", dropout_rate=0.2)
    assert load_run(tmp_path / "run").model == result.model
    assert generation_options(result.model) == {"max_new_tokens": 7}
    result.export(tmp_path / "exported")
    model, params, tokenizer, _ = load_run(tmp_path / "run")
    save_pretrained(tmp_path / "converted", model, peft.merge(params), tokenizer)
    for folder in ("exported", "converted"):
        fields = json.loads((tmp_path / folder / "config.json").read_text())
        assert (fields["my_note"], fields["hidden_dropout_prob"]) == ([1], 0.2)
        assert (tmp_path / folder / other.name).read_text() == '{\n  "max_new_tokens": 7\n}\n'


def test_options_by_name():
    config = finetune_config(
        "gpt2", data="reviews.csv", columns={"text": "review"}, epochs=3, peak_lr=1e-4,
        schedule="cosine", trainable="lora:8", seed=5, validation_fraction=0.2)
    assert config.dataset == DatasetConfig(
        "reviews.csv", columns={"text": "review"}, validation_fraction=0.2)
    assert config.training.epochs == 3 and config.training.optimizer.peak_lr == 1e-4
    assert config.training.optimizer.schedule == "cosine"
    assert config.training.optimizer.b2 == TrainingConfig().optimizer.b2
    assert (config.pretrained, config.trainable, config.seed) == ("gpt2", "lora:8", 5)
    changed = finetune_config("gpt2", training=SHORT, batch_size=4)
    assert changed.training.max_length == 16 and changed.training.batch_size == 4


def test_unknown_options_suggest_known_ones(pretrained):
    with pytest.raises(ValueError, match=r"unknown option 'peak_rate'.*did you mean .*peak_lr"):
        finetune(pretrained("bert_python_docs"), EXAMPLES, peak_rate=1e-3)
    with pytest.raises(ValueError, match="data is None"):
        finetune(pretrained("bert_python_docs"))
    with pytest.raises(ValueError, match="a FinetuneConfig and other settings"):
        finetune(FinetuneConfig(pretrained="a"), epochs=3)


def test_a_missing_retention_text_is_an_error_before_training(pretrained, tmp_path, monkeypatch):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\na\tx\nb\ty\n")
    monkeypatch.setattr(finetuning, "finetune_params",
                        lambda *args, **options: pytest.fail("it trained"))
    monkeypatch.setattr(retention, "is_run", lambda source: False)
    with pytest.raises(FileNotFoundError, match=r"nosuch\.txt"):
        finetune(FinetuneConfig(
            pretrained=str(pretrained("gpt_python_docs")), out=tmp_path / "out",
            retention_data=str(tmp_path / "nosuch.txt"), training=SHORT,
            dataset=DatasetConfig(str(path), validation=str(path))))


def test_runs_that_differ_in_the_seed_share_their_step(pretrained):
    base = load_run(pretrained("bert_python_docs"))
    model = build_model(base.model.config, 2, "classification")
    steps = [finetuning_run.make_finetune_step(model, "bitfit", training, "classification")
             for training in (SHORT, TrainingConfig(max_length=16, num_steps=2))]
    assert steps[0] is steps[1]


@pytest.mark.slow
@pytest.mark.parametrize("ema", [None, 0.5])
def test_evaluation_while_training_early_stopping_and_the_best_parameters(
        pretrained, tmp_path, monkeypatch, ema):
    evaluate, evaluated = encoding.EncodedDataset.evaluate, []

    def scripted(self, params):
        evaluated.append(jax.tree.map(np.asarray, params))
        scores, lines = evaluate(self, params)
        return scores | {"accuracy": values[len(evaluated) - 1]}, lines

    monkeypatch.setattr(encoding.EncodedDataset, "evaluate", scripted)
    folder = pretrained("bert_python_docs")
    options = OPTIONS | {"num_steps": 20, "eval_every": 2, "patience": 2, "keep_best": True,
                         "ema": ema, "peak_lr": 1e-2}
    for out in (None, tmp_path / "run"):
        values, _ = [0.5, 0.9, 0.6, 0.7, 0.9, 0.9], evaluated.clear()
        result = finetune(folder, EXAMPLES, validation=EXAMPLES, out=out, **options)
        assert len(evaluated) == 5  # at steps 2, 4, 6, 8, and of the result
        assert (result.metrics["best_step"], result.metrics["steps"]) == (4, 8)
        assert result.metrics["stopped_early"].startswith("eval_accuracy has not improved since "
                                                          "step 4 (2 evaluations)")
        assert [row["eval_accuracy"] for row in result.history
                if "eval_accuracy" in row] == values[:4]
        jax.tree.map(np.testing.assert_array_equal, result.params, evaluated[1])
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, evaluated[1:3])))
    metrics = json.loads((out / "results.json").read_text())["metrics"]
    assert metrics["best_step"] == 4 and "eval_accuracy" in metrics["history"][-1]
    again = finetune(folder, EXAMPLES, validation=EXAMPLES, out=out, **options)
    assert again.history == [] and again.metrics["best_step"] == 4
    jax.tree.map(np.testing.assert_array_equal, again.params, result.params)


@pytest.mark.parametrize("options", [{"patience": 2}, {"keep_best": True}])
def test_early_stopping_needs_evaluations(pretrained, options):
    with pytest.raises(ValueError, match=r"eval_every is 0, but patience is .* set eval_every"):
        finetune(pretrained("bert_python_docs"), EXAMPLES, **OPTIONS, **options)
