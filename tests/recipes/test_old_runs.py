"""Runs of older versions (tests/files/before_redesign) are resumed, evaluated and used."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from transformer_jax.data import load_dataset
from transformer_jax.models import GPTConfig, TransformerConfig
from transformer_jax.pretrained import load_run
from transformer_jax.recipes.config import (
    DatasetConfig,
    FinetuneOptimizerConfig,
    OptimizerConfig,
    TrainingConfig,
)
from transformer_jax.recipes.finetuning import FinetuneConfig, finetune
from transformer_jax.recipes.prediction import evaluate, predict
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain
from transformer_jax.recipes.retention import make_retention_eval
from transformer_jax.recipes.sequence_to_sequence import TranslateConfig, train_translation
from transformer_jax.recipes.sweep import SweepConfig, sweep
from transformer_jax.train.anomalies import AnomalyPolicy

FILES = Path(__file__).parents[1] / "files" / "before_redesign"
MODEL = {"max_length": 32, "num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 32,
         "init_std": 0.2, "attention_impl": "xla", "remat": "dots"}
TASK = {"dataset": DatasetConfig("topics.tsv", validation_fraction=0.25),
        "training": TrainingConfig(
            max_length=32, batch_size=8, num_steps=3, optimizer=FinetuneOptimizerConfig(
                peak_lr=2e-2, b2=0.99, layer_decay=0.9, head_lr_multiplier=2.0))}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the files as the working directory; their configs have relative paths."""
    shutil.copytree(FILES, tmp_path / "files")
    monkeypatch.chdir(tmp_path / "files")
    return tmp_path / "files"


@pytest.mark.slow
def test_an_interrupted_run_is_resumed(folder):
    pretrain(PretrainConfig(
        model=GPTConfig(vocab_size=300, **MODEL, norm_first=True, scale_residual_init=True,
                        attention_window=8, classifier_bias=False),
        objective="causal_lm", tokenizer="bpe", data="corpus.txt",
        out=Path("gpt_run_interrupted"), max_length=16, batch_size=16, accumulate=2, num_steps=4,
        eval_every=2, save_every=2, log_every=1, seed=1, optimizer=OptimizerConfig(
            schedule="linear", peak_lr=1e-2, warmup_steps=1, weight_decay=0.1, b2=0.98),
        anomaly_policy=AnomalyPolicy(spike=20.0, on_spike="skip")))
    runs = [load_run(name).params for name in ("gpt_run", "gpt_run_interrupted")]
    for a, b in zip(*map(jax.tree.leaves, runs)):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_a_finished_fine_tuning_run_is_not_repeated(folder):
    result = finetune(FinetuneConfig(
        pretrained="bert_run", out=Path("finetuned_head"), trainable="head", **TASK))
    assert result.history == []
    lines = (FILES / "finetuned_head" / "predictions.jsonl").read_text().splitlines()
    saved = list(map(json.loads, lines))
    assert [x["prediction"] for x in result.predictions] == [x["prediction"] for x in saved]


def test_the_cells_of_a_sweep_are_kept(folder):
    sweep(SweepConfig(pretrained="bert_run", out=Path("sweep_run"), seeds=1, quiet=True,
                      trainable=("bitfit", "scratch"), peak_lrs=(1e-2, 2e-2), **TASK))
    assert (folder / "sweep_run" / "cells.jsonl").read_text() == (
        FILES / "sweep_run" / "cells.jsonl").read_text()


@pytest.mark.slow
def test_a_finished_translation_run_is_not_repeated(folder):
    train_translation(TranslateConfig(
        model=TransformerConfig(vocab_size=80, **MODEL | {"num_layers": 1}, norm_first=True,
                                positions="sinusoidal_halves", tie_embeddings=False),
        source="de", target="en", data="pairs", out=Path("translate_run"), tokenizer="unigram",
        num_steps=2, save_every=1, eval_every=1, log_every=1, num_averaged_checkpoints=2,
        length_buckets=(16, 32), tokens_per_batch=256, num_beams=2, max_new_tokens=8,
        optimizer=OptimizerConfig(schedule="inverse_sqrt", peak_lr=1e-2, warmup_steps=1,
                                  weight_decay=0.0, b2=0.98, eps=1e-9)))
    assert (folder / "translate_run" / "translations.jsonl").read_text() == (
        FILES / "translate_run" / "translations.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_run", "bert_run", "bart_run"])
def test_the_held_out_loss_is_that_of_the_run(name, folder):
    saved = json.loads((folder / name / "results.json").read_text())["metrics"]["held_out"]
    assert evaluate(name)["loss"] == pytest.approx(saved["loss"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetuned_lora", "finetuned_head"])
def test_a_fine_tuned_run_predicts_and_is_evaluated(name, folder):
    expected = json.loads((FILES / "expected.json").read_text())[name]
    (found,) = predict(name, expected["texts"][:1])
    assert found["label"] in expected["answers"][0]
    assert evaluate(name, "topics.tsv")["accuracy"] >= 0
    # Their validation examples are a quarter of the file, drawn with the same seed.
    dataset = load_dataset(TASK["dataset"])
    assert evaluate(name, dataset)["accuracy"] == pytest.approx(expected["metrics"]["accuracy"])


@pytest.mark.parametrize("name", ["finetuned_head", "translate_run"])
def test_retention_of_a_run_that_is_no_pre_training_run(name, folder):
    """Its results have no settings of rows of an objective, so the text is used."""
    base = load_run(name)
    evaluation = make_retention_eval(name, base, "corpus.txt", num_rows=32)
    assert np.isfinite(evaluation.loss())
