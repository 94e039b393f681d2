"""Two steps of every config, and the scripts one after another on the embedded corpus."""

import dataclasses
import functools
import json
import shutil

import common
import configs
import finetune
import forgetting
import generate
import jax
import numpy as np
import pretrain
import pytest
import quickstart
import supervised
import sweep
import translate
from settings import Data, Mesh, Pretrain, Settings, Sweep
from settings_seq2seq import Translate

from transformer_jax import models, tree
from transformer_jax.data import LabeledDataset
from transformer_jax.finetuning import adapter_io

SHORT = finetune.Settings(length=16, num_steps=2)
TINY = {"num_layers": 1, "d_model": 16, "num_heads": 2, "mlp_dim": 16, "max_length": 64}


def tiny(c, out, **changes):
    """The config with a model small enough for a test, and two steps."""
    changes = {"num_steps": 2, "eval_batches": 1, "length": 24, "batch_size": 8, "log_every": 1,
               "mesh": Mesh(data=-1), **changes}
    model = c.model.replace(**TINY, vocab_size=min(c.model.vocab_size, 600))
    optimizer = dataclasses.replace(c.optimizer, warmup_steps=1)
    return dataclasses.replace(c, out=out, model=model, optimizer=optimizer, **changes)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A text file that every config can be pointed to."""
    path = tmp_path_factory.mktemp("data") / "input.txt"
    lines = [f"Document {d} says in sentence {s} that {d} times {s} is {d * s}."
             for d in range(30) for s in range(6)]
    path.write_text("\n\n".join("\n".join(lines[i : i + 6]) for i in range(0, len(lines), 6)))
    return str(path)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, sentences):
    """The folder of two steps of a config, trained when it is first asked for."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name):
        pretrain.pretrain(tiny(configs.load(Pretrain)[name][1], folder / name, data=sentences))
        return folder / name

    return run


@pytest.mark.parametrize("name", configs.load(Pretrain))
def test_two_steps_of_every_config(name, pretrained):
    out = pretrained(name)
    saved = json.loads((out / "results.json").read_text())
    assert np.isfinite(saved["metrics"]["held_out"]["loss"])
    assert saved["config"]["num_steps"] == 2 and saved["versions"]["jax"] and saved["device"]
    assert (out / "loss.png").stat().st_size > 5000
    assert list((out / "events").glob("events.out.tfevents.*"))


def test_a_run_that_scans_its_layers_is_the_same_run(pretrained, sentences, tmp_path):
    c = configs.load(Pretrain)["char_shakespeare"][1]
    c = tiny(c, tmp_path / "run", data=sentences, scan_layers=True)
    scanned = pretrain.pretrain(c)["metrics"]
    unrolled = json.loads((pretrained("char_shakespeare") / "results.json").read_text())["metrics"]
    np.testing.assert_allclose(scanned["held_out"]["loss"], unrolled["held_out"]["loss"], rtol=1e-4)
    names = [tree.flatten_paths(common.load_run(folder).params).keys()
             for folder in (tmp_path / "run", pretrained("char_shakespeare"))]
    assert names[0] == names[1]


@pytest.mark.parametrize("name", configs.load(Translate))
def test_a_few_steps_of_every_translation(name, tmp_path):
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    for split, count in (("train", 60), ("val", 5)):
        rows = [[words[(i * k) % 10] for k in range(1, 3 + i % 6)] for i in range(count)]
        (tmp_path / f"{split}.de").write_text("\n".join(" ".join(row) for row in rows))
        (tmp_path / f"{split}.en").write_text("\n".join(" ".join(row[::-1]) for row in rows))
    c = configs.load(Translate)[name][1]
    model = c.model.replace(**TINY | {"vocab_size": 300})
    c = dataclasses.replace(
        c, data=str(tmp_path), source="de", target="en", out=tmp_path / "run", model=model,
        num_steps=4, save_every=2, average=2, eval_every=2, log_every=1, buckets=(16,),
        tokens_per_batch=128, max_new_tokens=8, num_beams=2,
        optimizer=dataclasses.replace(c.optimizer, warmup_steps=1))
    results = translate.main(c)["metrics"]
    assert 0 <= results["bleu"] <= 100 and "tok:13a" in results["signature"]
    assert np.isfinite(results["held_out"]["nll"])
    lines = (tmp_path / "run" / "translations.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == (
        tmp_path / "val.de").read_text().splitlines()
    for picture in ("cross_attention.png", "loss.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 5000
    # A finished run is not trained again.
    again = translate.main(c)["metrics"]
    assert again["history"] == [] and again["bleu"] == results["bleu"]


@pytest.mark.parametrize("name", ["gpt_python_docs", "bert_python_docs"])
def test_finetune_then_classify(name, pretrained, tmp_path):
    rows = "sentence\tlabel\n" + "".join(f"it is {w} {i}\t{w}\n" for i in range(12)
                                         for w in ("good", "bad"))
    (tmp_path / "train.tsv").write_text(rows)
    out = tmp_path / "tuned"
    c = finetune.Finetune(
        pretrained=str(pretrained(name)), out=out, train="last_k:1", settings=SHORT,
        data=Data(str(tmp_path / "train.tsv"), validation=str(tmp_path / "train.tsv"),
                  columns={"text": "sentence"}))
    metrics = finetune.main(c)["metrics"]
    assert np.sum(metrics["confusion"]) == 24  # every example exactly once
    assert 0 < metrics["share_trained"] < 1 and metrics["held_out_after"] > 0
    assert common.load_run(out).label_names == ["bad", "good"]
    again = finetune.main(c)["metrics"]  # the same command on a finished run
    assert again["confusion"] == metrics["confusion"]
    # The delta, and the base that it was trained on, are the run.
    tuned, base = common.load_run(out), common.load_run(pretrained(name))
    start = finetune.base_params(tuned.model, base.params)
    delta = adapter_io.load_adapter(out / "delta", start)
    assert delta.manifest["label_names"] == ["bad", "good"]
    for path, leaf in tree.flatten_paths(adapter_io.apply_adapter(start, delta)).items():
        np.testing.assert_array_equal(leaf, tree.flatten_paths(tuned.params)[path])
    answers = generate.answer(generate.Generate(run=out, text=("it is good", "it is bad")))
    assert len(answers) == 2 and "good" in answers[0]


def test_what_a_checkpoint_lacks_trains(pretrained):
    """RoBERTa's and DistilBERT's poolers belong to their heads: bare checkpoints have none."""
    base = common.load_run(pretrained("bert_python_docs"))
    model = models.build_model(base.model.config, 2, "classification")
    start = {name: x for name, x in base.params.items() if name != "pooler"}
    assert finetune.with_what_is_new(model, base.params, "lora:2") == "lora:2"
    recipe = finetune.with_what_is_new(model, start, "lora:2")
    mask = finetune.compiled(model, recipe, Settings(), "classification", False).mask
    assert mask["pooler"]["kernel"] and not mask["token_embed"]["embedding"]


@pytest.mark.parametrize(("name", "kind", "changes", "message"), [
    ("bert", "classification", {"both_orders": True}, "both_orders is for GPT, .* is a BERT"),
    ("bert", "classification", {"new_tokens": True}, "new_tokens is for GPT"),
    ("bert", "classification", {"aux_lm_loss_weight": 0.5}, "aux_lm_loss_weight is for GPT on class.* a BERT on cl"),
    ("bert", "classification", {"length": 65}, "length is 65, and the model has 64 positions"),
    ("bert", "token_classification", {"length": 4}, "training example 0 has .* tokens, more than"),
    ("gpt", "token_classification", {"aux_lm_loss_weight": 0.5}, "a GPT on token_classification"),
    ("gpt", "multiple_choice", {"both_orders": True}, "both_orders is for pairs of texts"),
    ("gpt", "classification", {}, "GPT needs a token between two texts; set new_tokens"),
    ("gpt", "seq2seq", {"target_length": 24}, "a row of 24 tokens has no room for a source"),
])
def test_what_does_not_fit_is_said_before_training(name, kind, changes, message, pretrained,
                                                   tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS[kind]))
    base = common.load_run(pretrained(f"{name}_python_docs"))
    data = Data(str(path), validation=str(path), kind=kind).load()
    model, _ = finetune.for_task(base, data)
    with pytest.raises(ValueError, match=message):
        finetune.read(data, model, base.tokenizer, Settings(**{"length": 24, **changes}))


def test_a_text_to_measure_forgetting_by_is_missed_before_training(pretrained, tmp_path,
                                                                   monkeypatch):
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\na\tx\nb\ty\n")
    monkeypatch.setattr(finetune, "finetune", lambda *args, **options: pytest.fail("it trained"))
    monkeypatch.setattr(forgetting, "is_run", lambda source: False)
    with pytest.raises(FileNotFoundError, match=r"nosuch\.txt"):
        finetune.main(finetune.Finetune(
            pretrained=str(pretrained("gpt_python_docs")), out=tmp_path / "out",
            remember=str(tmp_path / "nosuch.txt"), settings=SHORT,
            data=Data(str(path), validation=str(path))))


def test_what_is_classified_is_a_choice(pretrained):
    folder = pretrained("bert_python_docs")
    first, mean = (common.load_base(folder, pooling=pooling) for pooling in (None, "mean"))
    assert (first.model.config.pooling, mean.model.config.pooling) == ("first", "mean")
    with pytest.raises(ValueError, match="pooling"):
        common.load_base(folder, pooling="last")


def test_questions_whose_answer_has_no_token_are_left_out(pretrained, capsys):
    base = common.load_run(pretrained("bert_python_docs"))
    lost = {"question": "one", "context": "one \u200b two", "answers": [
        {"text": "\u200b", "start": 4}]}
    kept = {"question": "one", "context": "one two", "answers": [{"text": "two", "start": 4}]}
    data = LabeledDataset("question_answering", [lost, kept], [lost, kept], (), "squad", None, {})
    model, _ = finetune.for_task(base, data)
    task = finetune.read(data, model, base.tokenizer,
                         Settings(length=24, max_question=8, num_steps=2))
    assert "1 of 2 training questions are left out" in capsys.readouterr().out
    assert {w.example for w in task.train} == {1}
    assert {w.example for w in task.validation} == {0, 1}  # all are answered and counted


def test_questions_without_an_answer(pretrained):
    base = common.load_run(pretrained("bert_python_docs"))
    rows = [{"question": "one", "context": "one two", "answers": [{"text": "two", "start": 4}]},
            {"question": "three", "context": "one two", "answers": []}] * 4
    data = LabeledDataset("question_answering", rows, rows, (), "squad", None, {})
    model, start = finetune.for_task(base, data)
    settings = Settings(length=24, max_question=8, num_steps=2, batch_size=4)
    task = finetune.read(data, model, base.tokenizer, settings)
    outcome = finetune.finetune(model, start, base.tokenizer, task, "bitfit", settings, 0,
                                quiet=True)
    assert next(iter(outcome.metrics)) == "f1"
    # Half are right where nothing is answered, and equal margins cannot be parted better.
    assert outcome.metrics["best_f1"] >= max(outcome.metrics["f1"], 50)
    assert np.isfinite(outcome.metrics["best_f1_threshold"])
    assert all(line["best"] for line in outcome.lines)


ROWS = {
    "classification": ({"text": "one two", "text_b": "two three", "label": "yes"},
                       {"text": "four", "text_b": "five six", "label": "no"}),
    "regression": ({"text": "one two", "text_b": "two three", "label": 1.5},
                   {"text": "four", "text_b": "five six", "label": 4.25}),
    "multiple_choice": ({"text": "one two", "choices": ["two", "three four"], "label": 1},
                        {"text": "four", "choices": ["five", "six"], "label": 0}),
    "token_classification": ({"words": ["one", "two"], "tags": ["B-X", "O"]},
                             {"words": ["three", "four", "five"], "tags": ["O", "B-X", "I-X"]}),
    "question_answering": (
        {"id": "a", "question": "one", "context": "one two three", "answer": "two", "start": 4},
        {"id": "b", "question": "four", "context": "four five six", "answer": "six", "start": 10}),
    "seq2seq": ({"source": "one two", "target": "two"}, {"source": "four five", "target": "five"}),
}


@pytest.mark.parametrize(("kind", "name"), [
    ("classification", "gpt_python_docs"), ("regression", "bert_python_docs"),
    ("multiple_choice", "gpt_python_docs"), ("token_classification", "bert_python_docs"),
    ("question_answering", "gpt_python_docs"), ("question_answering", "bert_python_docs"),
    ("seq2seq", "gpt_python_docs"), ("seq2seq", "bert_python_docs"),
])
def test_every_kind_of_task(kind, name, pretrained, tmp_path):
    """From a file to scores and a prediction for each example."""
    for split, count in (("train", 12), ("validation", 5)):
        rows = [ROWS[kind][i % 2] for i in range(count)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    base = common.load_run(pretrained(name))
    data = Data(str(tmp_path), kind=kind).load()
    model, start = finetune.for_task(base, data)
    settings = Settings(length=24, batch_size=4, num_steps=2, new_tokens="gpt" in name,
                        target_length=8, num_beams=2)
    if kind == "seq2seq" and "bert" in name:
        with pytest.raises(ValueError, match="BERT writes no texts"):
            finetune.read(data, model, base.tokenizer, settings)
        return
    task = (supervised.read(data, model, base.tokenizer,
                            settings.reading()._replace(max_question=8))
            if kind == "question_answering" else
            finetune.read(data, model, base.tokenizer, settings))
    outcome = finetune.finetune(model, start, base.tokenizer, task, "lora:2", settings, 0,
                                quiet=True)
    main = {"regression": "pearson_spearman", "token_classification": "f1",
            "question_answering": "f1", "seq2seq": "rouge"}.get(kind, "accuracy")
    assert next(iter(outcome.metrics)) == main
    assert len(outcome.lines) == 5 and 0 < outcome.metrics["share_trained"] < 1
    supervised.write_predictions(tmp_path / "out.jsonl", common.to_json(outcome.lines))
    assert (tmp_path / "out.json").is_file() == (kind == "question_answering")
    if kind == "question_answering":
        answers = json.loads((tmp_path / "out.json").read_text())
        assert answers == {x["id"]: x["prediction"] for x in outcome.lines}
        for line, example in zip(outcome.lines, data.validation):
            assert line["prediction"] == example["context"][line["start"] : line["stop"]] != ""


def test_sweep_goes_on_where_it_was_cut_off(pretrained, tmp_path):
    c = Sweep(pretrained=str(pretrained("gpt_python_docs")), out=tmp_path, data=Data(limit=64),
              recipes=("lora:2", "head", "scratch"), aux_lm_loss_weights=(0.5, 0.0, 0.0), seeds=2,
              quiet=True, settings=Settings(length=16, batch_size=8, num_steps=2))
    rows = sweep.main(c)["metrics"]["cells"]
    assert [row["recipe"] for row in rows] == [
        "lora:2, LM loss x 0.5", "head, LM loss x 0", "scratch, LM loss x 0"]
    assert all(row["seeds"] == 2 and len(row["scores"]) == 2 for row in rows)
    assert (tmp_path / "recipes.png").stat().st_size > 5000
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    (tmp_path / "cells.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert sweep.main(c)["metrics"]["cells"][0] == rows[0]
    again = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert again[:4] == lines[:4] and len(again) == 6
    with pytest.raises(ValueError, match="1 peak_lrs for 3 recipes"):
        dataclasses.replace(c, peak_lrs=(1e-3,))
    # Cells of another configuration are not taken for these, nor is a line that was cut off.
    (tmp_path / "cells.jsonl").write_text("".join(f"{line}\n" for line in again) + '{"recipe": "l')
    other = dataclasses.replace(c, recipes=("head",), aux_lm_loss_weights=(0.0,), seeds=1,
                                settings=Settings(length=16, batch_size=8, num_steps=3))
    sweep.main(other)
    lines = [json.loads(x) for x in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and lines[-1]["steps"] == 3
    assert sweep.main(c)["metrics"]["cells"] == sweep.main(c)["metrics"]["cells"]


@pytest.mark.parametrize("kind", ["question_answering", "regression", "seq2seq"])
def test_a_sweep_over_examples_of_any_kind(kind, pretrained, tmp_path):
    rows = "".join(json.dumps({**ROWS[kind][i % 2], "id": str(i)}) + "\n" for i in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    path = str(tmp_path / "rows.jsonl")
    c = Sweep(pretrained=str(pretrained("gpt_python_docs")), out=tmp_path / "out",
              data=Data(path, validation=path, kind=kind), recipes=("bitfit",), examples=(4, 8),
              seeds=1, quiet=True, settings=Settings(
                  length=32, batch_size=4, num_steps=1, max_question=8, target_length=4,
                  num_beams=1, new_tokens=kind in ("regression", "question_answering")))
    cells = sweep.main(c)["metrics"]["cells"]
    assert [cell["labels"] for cell in cells] == [4, 8]
    assert (tmp_path / "out" / "label_efficiency.png").stat().st_size > 5000
    row = {**cells[0], "score": 0.8, "score_std": 0.1, "seeds": 2}
    for metric, seen in (("squad", "0.8 ± 0.1"), ("rouge", "0.8 ± 0.1"), ("f1", "80.0 ± 10.0")):
        (shown,) = sweep.table(c, [row], metric, 1.0).columns[2].cells
        assert shown == seen


def test_generate_and_fill(pretrained):
    gpt = generate.Generate(run=pretrained("gpt_python_docs"), text=("Document 3", "The"),
                            max_new_tokens=5)
    assert [a.startswith(t) for a, t in zip(generate.answer(gpt), gpt.text)] == [True, True]
    assert generate.answer(dataclasses.replace(gpt, top_p=0.5)) != []
    bert = generate.Generate(run=pretrained("bert_python_docs"), text=("Document [MASK] says",))
    assert generate.answer(bert)[0].count(",") == 4


def test_the_same_command_resumes(tmp_path, sentences):
    """A run that lost all after step 5 ends, by the same command, in the same bits."""
    c = tiny(configs.load(Pretrain)["gpt_python_docs"][1], tmp_path / "run", data=sentences,
             num_steps=10, save_every=5)
    pretrain.pretrain(c)
    straight = jax.tree.leaves(common.load_run(c.out).params)
    shutil.rmtree(c.out / "checkpoints" / "10")
    pretrain.pretrain(c)
    for a, b in zip(straight, jax.tree.leaves(common.load_run(c.out).params)):
        np.testing.assert_array_equal(a, b)


def test_another_run_is_not_resumed(tmp_path, sentences):
    c = tiny(configs.load(Pretrain)["gpt_python_docs"][1], tmp_path, data=sentences)
    pretrain.pretrain(c)
    other = dataclasses.replace(c, num_steps=4, seed=1)
    with pytest.raises(ValueError, match="was another: settings/num_steps was 2 and is 4; "
                                         "settings/seed was 0 and is 1"):
        pretrain.pretrain(other)
    found = pretrain.pretrain(dataclasses.replace(other, allow_config_mismatch=True))
    assert found["metrics"]["history"][-1]["step"] == 4


def test_unknown_objective_and_missing_run(tmp_path, sentences):
    c = tiny(configs.load(Pretrain)["gpt_python_docs"][1], tmp_path / "run", data=sentences)
    with pytest.raises(ValueError, match=r"'sorting'.*causal_lm, mlm_nsp"):
        pretrain.pretrain(dataclasses.replace(c, objective="sorting"))
    with pytest.raises(FileNotFoundError, match=r"--out folder"):
        common.load_run(tmp_path / "nowhere")


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
    """The main job on the embedded corpus, with few steps and small models."""
    load = configs.load
    monkeypatch.setattr(configs, "load", lambda kind: {
        name: (text, tiny(c, c.out, eval_batches=2)) for name, (text, c) in load(kind).items()})
    results = quickstart.main(quickstart.Quickstart(
        out=tmp_path, seeds=1, labels_per_class=(2,), test_examples=64, pretrain_steps=2,
        recipes=("head",), peak_lrs=(1e-2,), settings=SHORT,
    ))
    cells = results["metrics"]["finetuning"]
    assert len(cells) == 2 * 2 and all(np.isfinite(c["accuracy"]) for c in cells)
    assert {"positions.png", "attention.png", "labels.png", "results.json"} <= {
        p.name for p in tmp_path.iterdir()}
