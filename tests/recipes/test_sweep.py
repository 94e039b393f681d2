"""Sweeps: completion of missing cells, task types, and the table."""

import dataclasses
import json

import pytest
from small_configs import ROWS

from transformer_jax.recipes.config import DatasetConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig, make_table, sweep


@pytest.mark.slow
def test_a_sweep_completes_the_missing_cells(pretrained, tmp_path):
    config = SweepConfig(
        pretrained=str(pretrained("gpt_python_docs")), out=tmp_path,
        dataset=DatasetConfig(limit=64), trainable=("lora:2", "head", "scratch"),
        aux_lm_loss_weights=(0.5, 0.0, 0.0), seeds=2, quiet=True,
        training=TrainingConfig(max_length=16, batch_size=8, num_steps=2))
    rows = sweep(config)["metrics"]["cells"]
    assert [row["recipe"] for row in rows] == [
        "lora:2, LM loss x 0.5", "head, LM loss x 0", "scratch, LM loss x 0"]
    assert all(row["seeds"] == 2 and len(row["scores"]) == 2 for row in rows)
    assert (tmp_path / "recipes.png").stat().st_size > 5000
    lines = (tmp_path / "cells.jsonl").read_text().splitlines()
    (tmp_path / "cells.jsonl").write_text("\n".join(lines[:4]) + "\n")
    assert sweep(config)["metrics"]["cells"][0] == rows[0]
    again = (tmp_path / "cells.jsonl").read_text().splitlines()
    assert again[:4] == lines[:4] and len(again) == 6
    with pytest.raises(ValueError, match="1 peak_lrs for 3 trainable specs"):
        dataclasses.replace(config, peak_lrs=(1e-3,))
    # Cells of other settings do not count, nor does an incomplete line.
    (tmp_path / "cells.jsonl").write_text("".join(f"{line}\n" for line in again) + '{"recipe": "l')
    other = dataclasses.replace(
        config, trainable=("head",), aux_lm_loss_weights=(0.0,), seeds=1,
        training=TrainingConfig(max_length=16, batch_size=8, num_steps=3))
    sweep(other)
    lines = [json.loads(x) for x in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert len(lines) == 7 and lines[-1]["steps"] == 3
    assert sweep(config)["metrics"]["cells"] == sweep(config)["metrics"]["cells"]


@pytest.mark.slow
@pytest.mark.parametrize("task_type", ["question_answering", "regression", "seq2seq"])
def test_a_sweep_over_numbers_of_examples(task_type, pretrained, tmp_path):
    rows = "".join(json.dumps({**ROWS[task_type][i % 2], "id": str(i)}) + "\n" for i in range(8))
    (tmp_path / "rows.jsonl").write_text(rows)
    path = str(tmp_path / "rows.jsonl")
    config = SweepConfig(
        pretrained=str(pretrained("gpt_python_docs")), out=tmp_path / "out",
        dataset=DatasetConfig(path, validation=path, task_type=task_type), trainable=("bitfit",),
        examples=(4, 8), seeds=1, quiet=True, training=TrainingConfig(
            max_length=32, batch_size=4, num_steps=1, max_question_length=8, target_length=4,
            num_beams=1, gpt_special_tokens=task_type in ("regression", "question_answering")))
    cells = sweep(config)["metrics"]["cells"]
    assert [cell["labels"] for cell in cells] == [4, 8]
    assert (tmp_path / "out" / "label_efficiency.png").stat().st_size > 5000
    row = {**cells[0], "score": 0.8, "score_std": 0.1, "seeds": 2}
    for metric, shown in (("squad", "0.8 ± 0.1"), ("rouge", "0.8 ± 0.1"), ("f1", "80.0 ± 10.0")):
        (cell,) = make_table(config, [row], metric, 1.0).columns[2].cells
        assert cell == shown


@pytest.mark.parametrize("settings", [
    {"trainable": ("head", "head"), "peak_lrs": (1e-3, 1e-2)},
    {"trainable": ("head", "head"), "aux_lm_loss_weights": (0.5, 0.5)},
])
def test_a_repeated_variant_is_an_error(settings):
    with pytest.raises(ValueError, match="trainable is head, head; each spec may occur once"):
        SweepConfig(pretrained="gpt2", out="run", **settings)


def test_the_settings_of_all_variants_are_checked_before_training(pretrained, tmp_path):
    config = SweepConfig(
        pretrained=str(pretrained("bert_python_docs")), out=tmp_path,
        dataset=DatasetConfig(limit=64), trainable=("head", "full"),
        aux_lm_loss_weights=(0.0, 0.5), seeds=1, quiet=True,
        training=TrainingConfig(max_length=16, batch_size=8, num_steps=2))
    with pytest.raises(ValueError, match="aux_lm_loss_weight is for GPT"):
        sweep(config)
    assert not (tmp_path / "cells.jsonl").exists()
