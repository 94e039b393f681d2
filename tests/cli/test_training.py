"""The commands `pretrain` and `finetune`."""

import dataclasses
import inspect
import json

import pytest

from transformer_jax.cli import training
from transformer_jax.recipes.finetuning import FinetuneConfig, finetune_config
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain_config

pytestmark = pytest.mark.slow

SMALL = ["--model.num-layers", "1", "--model.d-model", "16", "--model.num-heads", "2",
         "--model.mlp-dim", "16", "--model.max-length", "32", "--model.vocab-size", "280"]
TOPICS = "".join(f"the {a} is {b}\t{label}\n" for a, label in (("cat", "animal"), ("sea", "water"))
                 for b in ("big", "small", "here", "old"))


def test_pretrain_then_finetune(run, tmp_path):
    (tmp_path / "corpus.txt").write_text("the cat sat on the mat\nthe sea is big\n\n" * 40)
    status, out, _ = run(
        "pretrain", "gpt2", "--data", tmp_path / "corpus.txt", "--out", tmp_path / "gpt",
        "--num-steps", "2", "--batch-size", "8", *SMALL)
    assert status == 0 and "held-out loss before" in out
    (tmp_path / "topics.tsv").write_text("sentence\tkind\n" + TOPICS)
    status, out, err = run(
        "finetune", "--pretrained", tmp_path / "gpt", "--data", tmp_path / "topics.tsv",
        "--validation-fraction", "0.25", "--columns", "text", "sentence", "label", "kind",
        "--train", "lora:2", "--epochs", "1", "--batch-size", "8", "--max-length", "16",
        "--optimizer.peak-lr", "1e-2", "--out", tmp_path / "topics")
    assert status == 0 and "accuracy" in out, err
    results = json.loads((tmp_path / "topics" / "results.json").read_text())
    config = results["config"]
    assert config["trainable"] == "lora:2"
    assert config["training"]["optimizer"]["peak_lr"] == 0.01
    assert config["dataset"]["columns"] == {"text": "sentence", "label": "kind"}
    # Wrong settings of the next run are reported before training.
    status, _, err = run(
        "finetune", "--pretrained", tmp_path / "gpt", "--data", tmp_path / "topics.tsv",
        "--validation-fraction", "0.25", "--columns", "text", "sentence", "label", "kind",
        "--trainable", "lorra:2", "--max-length", "16", "--out", tmp_path / "other")
    assert status == 2 and err.startswith("error: ") and "lorra" in err and err.count("\n") == 1


def test_pretrain_settings_are_those_of_the_recipe():
    config = training.parse_pretrain_flags("bert_tiny", {"num_steps": 200}, [])
    assert config == pretrain_config("bert_tiny", num_steps=200)
    config = training.parse_pretrain_flags(
        "gpt2", {"batch_size": 4}, ["--model.num-layers", "2", "--mesh.fsdp", "4"])
    assert config.model.num_layers == 2 and config.mesh.fsdp == 4 and config.batch_size == 4
    assert training.parse_pretrain_flags(
        "gpt2", {"max_length": 64}, ["--model.max-length", "128"]).max_length == 64


def test_finetune_settings_are_those_of_the_recipe():
    config = training.parse_finetune_flags(
        "gpt2", {"data": "a.tsv", "epochs": 3.0, "peak_lr": 1e-4}, ["--frozen-dtype", "int8"])
    expected = finetune_config("gpt2", data="a.tsv", epochs=3.0, peak_lr=1e-4, frozen_dtype="int8")
    assert {f.name: getattr(config, f.name) for f in dataclasses.fields(config)} == {
        f.name: getattr(expected, f.name) for f in dataclasses.fields(expected)}


@pytest.mark.parametrize(("command", "defaults"), [
    (training.pretrain, vars(pretrain_config("gpt2"))),
    (training.finetune, vars(finetune_config("x")) | vars(finetune_config("x").dataset)
     | vars(finetune_config("x").training) | vars(finetune_config("x").training.optimizer))])
def test_common_flags_have_the_names_and_defaults_of_the_recipe(command, defaults):
    kind = PretrainConfig if command is training.pretrain else FinetuneConfig
    assert {"out", "seed"} <= {f.name for f in dataclasses.fields(kind)}
    given = {name: parameter.default
             for name, parameter in inspect.signature(command).parameters.items()
             if name not in ("preset", "flags", "pretrained", "training")}
    if command is training.finetune:
        given |= vars(training.TrainingFlags())
    for name, default in given.items():
        assert name in defaults
        assert default in (None, defaults[name])
