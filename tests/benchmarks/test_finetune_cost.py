"""What recipes cost: shares at a small size, and the driver that takes turns with PEFT."""

import dataclasses
import sys
from pathlib import Path

import finetune_cost
import finetune_peft
import numpy as np
import pytest
import interleave

from transformer_jax.models import presets

SMALL = finetune_cost.Cost(
    recipes=("full", "head", "lora:2", "lora:2:all"), rounds=1, per_round=1, epoch_batches=0,
    batch_size=4, length=32,
    model=presets.bert_tiny(vocab_size=100, num_layers=2, d_model=64, num_heads=4, mlp_dim=256))


def test_what_is_frozen_costs_nothing(tmp_path):
    """The forward pass is a third of a full step, the way back through the layers another, and the
    gradients of weights the last: `head` needs the first and `lora` two. Elementwise work, more at
    a small width, moves that a little."""
    metrics = finetune_cost.main(dataclasses.replace(SMALL, out=tmp_path))["metrics"]
    full, head, lora, everywhere = metrics["recipes"]
    assert full["flops_ratio"] == full["share_trained"] == 1
    assert 0.25 < head["flops_ratio"] < 0.37
    assert 0.6 < lora["flops_ratio"] < 0.75
    # An activation's gradient, which three products need, is computed once.
    assert everywhere["flops_ratio"] < 0.74
    assert everywhere["temporary_bytes"] < 1.1 * full["temporary_bytes"]
    assert head["trained"] == 2 * 64 + 2
    assert lora["trained"] == head["trained"] + 2 * 2 * (64 * 2 + 2 * 64)
    for row in (full, head, lora, everywhere):
        assert 0 <= row["optimizer_bytes"] - 8 * row["trained"] <= 16, row["recipe"]
    assert 0 < head["temporary_bytes"] < full["temporary_bytes"] / 2


def tiny(**changes):
    return finetune_peft.Comparison(**{
        "reference_python": Path(sys.executable), "layers": 1, "width": 64, "batch_size": 2,
        "length": 8, "rounds": 3, "per_round": 1, "recipe": "lora:2"} | changes)


def test_the_driver(monkeypatch, tmp_path):
    def run_interleaved(commands, rounds):
        assert list(commands) == ["ours", "theirs"] and rounds == 3
        return {side: interleave.Timings({"trained": 7}, [[seconds]] * 3, 1000)
                for side, seconds in {"ours": 1.0, "theirs": 4.0}.items()}

    monkeypatch.setattr(interleave, "run_interleaved", run_interleaved)
    metrics = finetune_peft.main(tiny(out=tmp_path))["metrics"]
    assert metrics["time_ratios"] == [0.25] * 3 and metrics["time_ratio"] == 0.25
    assert metrics["memory_ratio"] == 1 and metrics["ours"]["trained"] == 7


def test_our_side_trains():
    one_step, trained = finetune_peft.ours(dataclasses.asdict(tiny()))
    assert trained == 2 * 64 + 2 + 512
    one_step()
    one_step()  # the state is donated, and kept
    tokens, labels = finetune_peft.batch(dataclasses.asdict(tiny()), 100)
    assert tokens.shape == (2, 8) and tokens.max() < 100 and np.isin(labels, (0, 1)).all()


def test_a_recipe_without_counterpart():
    with pytest.raises(ValueError, match=r"recipe 'head' is not compared; choose full, or a LoRA"):
        finetune_peft.compare(tiny(recipe="head"))
