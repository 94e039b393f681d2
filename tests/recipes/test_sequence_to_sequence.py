"""A few steps of every config for translation, or for denoising and fine-tuning on pairs."""

import dataclasses
import itertools
import json

import configs
import numpy as np
import pytest
from small_configs import TINY

from transformer_jax.pretrained import load_run
from transformer_jax.recipes.prediction import load_task_model, predict
from transformer_jax.recipes.retention import RetentionEval, held_out_batches
from transformer_jax.recipes.sequence_to_sequence import (
    DenoiseConfig,
    TranslateConfig,
    denoise,
    train_translation,
)

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


@pytest.mark.slow
@pytest.mark.parametrize("name", configs.load(TranslateConfig))
def test_a_few_steps_of_every_config(name, tmp_path):
    for split, count in (("train", 60), ("val", 5)):
        rows = [[WORDS[(i * k) % 10] for k in range(1, 3 + i % 6)] for i in range(count)]
        (tmp_path / f"{split}.de").write_text("\n".join(" ".join(row) for row in rows))
        (tmp_path / f"{split}.en").write_text("\n".join(" ".join(row[::-1]) for row in rows))
    config = configs.load(TranslateConfig)[name][1]
    model = config.model.replace(**TINY | {"vocab_size": 300})
    config = dataclasses.replace(
        config, data=str(tmp_path), source="de", target="en", out=tmp_path / "run", model=model,
        num_steps=4, save_every=2, num_averaged_checkpoints=2, eval_every=2, log_every=1,
        length_buckets=(16,), tokens_per_batch=128, max_new_tokens=8, num_beams=2,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=1))
    results = train_translation(config)["metrics"]
    assert 0 <= results["bleu"] <= 100 and "tok:13a" in results["signature"]
    assert np.isfinite(results["held_out"]["nll"])
    lines = (tmp_path / "run" / "translations.jsonl").read_text().splitlines()
    assert [json.loads(line)["source"] for line in lines] == (
        tmp_path / "val.de").read_text().splitlines()
    for figure in ("cross_attention.png", "loss.png"):
        assert (tmp_path / "run" / figure).stat().st_size > 5000
    # A finished run is not trained again.
    again = train_translation(config)["metrics"]
    assert again["history"] == [] and again["bleu"] == results["bleu"]
    # Its predictions are those of the run: same beams, length penalty and source length.
    settings = load_task_model(tmp_path / "run").input_config
    assert settings.max_length == 16 and settings.length_penalty == config.length_penalty == 0.6
    found = predict(tmp_path / "run", [json.loads(line)["source"] for line in lines])
    assert [x["text"] for x in found] == [json.loads(line)["translation"] for line in lines]
    (translation,) = predict(tmp_path / "run", "one two three", num_beams=1)
    assert isinstance(translation["text"], str)


@pytest.mark.parametrize("name, value, needed", [("length_buckets", (16, 64), 64),
                                                 ("max_new_tokens", 32, 33)])
def test_lengths_beyond_the_model_are_an_error_before_training(name, value, needed, tmp_path):
    config = next(iter(configs.load(TranslateConfig).values()))[1]
    config = dataclasses.replace(
        config, model=config.model.replace(max_length=32), out=tmp_path,
        **{"length_buckets": (16,), "max_new_tokens": 8, name: value})
    with pytest.raises(ValueError, match=f"{name} needs {needed} positions, but model.max_length"):
        train_translation(config)


def test_targets_of_a_short_model_from_a_long_source(tmp_path):
    words = "one two three four five six seven eight nine ten\n"
    for split in ("train", "val"):
        long = 4 * words.replace("\n", " ") + "one\n"
        (tmp_path / f"{split}.de").write_text(long + 40 * words)
        (tmp_path / f"{split}.en").write_text(41 * "one\n")
    config = next(iter(configs.load(TranslateConfig).values()))[1]
    config = dataclasses.replace(
        config, data=str(tmp_path), source="de", target="en", out=tmp_path / "run", num_steps=1,
        model=config.model.replace(**TINY | {"vocab_size": 300, "max_length": 16}),
        save_every=1, num_averaged_checkpoints=1, eval_every=1, length_buckets=(16,),
        tokens_per_batch=128, max_new_tokens=8, num_beams=1,
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=0))
    assert "bleu" in train_translation(config)["metrics"]


def shrink_denoising(c: DenoiseConfig, folder) -> DenoiseConfig:
    """Returns the config on the text and the pairs of `folder`, with a model for tests."""
    model = c.pretrain.model.replace(num_layers=1, d_model=16, num_heads=2, mlp_dim=16,
                                     max_length=32, vocab_size=300)
    few = {"num_steps": 2, "batch_size": 8, "eval_every": 1, "save_every": 0, "log_every": 1}
    warm = {"warmup_steps": 1}
    return dataclasses.replace(
        c, out=folder / "run",
        pretrain=dataclasses.replace(
            c.pretrain, model=model, data=str(folder / "text.txt"), validation_fraction=0.2,
            max_length=16, eval_batches=None, **few,
            optimizer=dataclasses.replace(c.pretrain.optimizer, **warm)),
        finetune=dataclasses.replace(
            c.finetune, data=str(folder), source="long", target="short", train_split="train",
            validation_split="dev", source_length=32, target_length=8, num_beams=1, eval_pairs=3,
            optimizer=dataclasses.replace(c.finetune.optimizer, **warm), **few))


@pytest.mark.slow
@pytest.mark.parametrize("name", configs.load(DenoiseConfig))
def test_both_stages_of_every_denoising_config(name, tmp_path):
    rows = [" ".join(WORDS[(i * k) % 10] for k in range(1, 9 + i % 6)) for i in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(f"{a} . {b} ." for a, b in
                                                   itertools.pairwise(rows)))
    for split, part in (("train", rows[:32]), ("dev", rows[32:])):
        lines = [json.dumps({"long": row, "short": row.split()[0]}) for row in part]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    c = shrink_denoising(configs.load(DenoiseConfig)[name][1], tmp_path)

    metrics = denoise(c)["metrics"]
    assert np.isfinite(metrics["denoising"]["held_out"]["loss"])
    for run in ("pretrained", "scratch"):
        assert 0 <= metrics[run]["rouge"]["rougeL"] <= 100
        assert np.isfinite(metrics[run]["held_out"]["nll"])
        assert [h["step"] for h in metrics[run]["history"] if "loss" in h] == [1, 2]
        assert load_run(c.out / run).tokenizer.mask_id is not None
    assert metrics["pretrained"]["held_out"] != metrics["scratch"]["held_out"]
    targets = [json.loads(line) for line in (c.out / "targets.jsonl").read_text().splitlines()]
    assert [row["source"] for row in targets] == rows[32:35]
    assert all(isinstance(row["pretrained"], str) and row["target"] in WORDS for row in targets)
    for figure in ("finetuning.png", "pretraining/loss.png"):
        assert (c.out / figure).stat().st_size > 5000

    # Retention is measured on the rows that pre-training held out.
    base = load_run(c.out / "pretraining")
    held_out = held_out_batches(c.out / "pretraining", base.tokenizer, batch_size=8)
    loss = RetentionEval(base.model, base.params, "denoising", held_out).loss()
    assert loss == pytest.approx(metrics["denoising"]["held_out"]["loss"], 1e-4)
