"""A few steps of every config that pre-trains by denoising and fine-tunes on pairs."""

import dataclasses
import itertools
import json

import configs
import numpy as np
import pytest

from transformer_jax.pretrained.runs import load_run
from transformer_jax.recipes.retention import RetentionEval, held_out_batches
from transformer_jax.recipes.sequence_to_sequence import DenoiseConfig, denoise

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def shrink(c: DenoiseConfig, folder) -> DenoiseConfig:
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
def test_both_stages_of_every_config(name, tmp_path):
    rows = [" ".join(WORDS[(i * k) % 10] for k in range(1, 9 + i % 6)) for i in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(f"{a} . {b} ." for a, b in
                                                   itertools.pairwise(rows)))
    for split, part in (("train", rows[:32]), ("dev", rows[32:])):
        lines = [json.dumps({"long": row, "short": row.split()[0]}) for row in part]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    c = shrink(configs.load(DenoiseConfig)[name][1], tmp_path)

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
