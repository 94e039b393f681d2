"""The cost of trainable specs on a small model, and the comparison with PEFT."""

import dataclasses
import json
import sys
from pathlib import Path

import finetune_cost
import finetune_peft
import interleave
import numpy as np
import pytest

from transformer_jax.models import presets

SMALL = finetune_cost.CostConfig(
    trainable=("full", "head", "lora:2", "lora:2:all"), rounds=1, steps_per_round=1,
    epoch_batches=0, batch_size=4, length=32,
    model=presets.bert_tiny(vocab_size=100, num_layers=2, d_model=64, num_heads=4, mlp_dim=256))


@pytest.mark.slow
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(tmp_path):
    """A full step has three parts of equal FLOPs: the forward pass, the gradients of activations,
    and the gradients of weights. `head` needs the first, and LoRA the first two. Elementwise
    operations, which weigh more in a narrow model, change the ratios a little."""
    metrics = finetune_cost.main(dataclasses.replace(SMALL, out=tmp_path))["metrics"]
    full, head, lora, lora_all = metrics["specs"]
    assert full["flops_ratio"] == full["share_trained"] == 1
    assert 0.25 < head["flops_ratio"] < 0.37
    assert 0.6 < lora["flops_ratio"] < 0.75
    # The gradient of an activation, which three projections need, is computed once.
    assert lora_all["flops_ratio"] < 0.74
    assert lora_all["temporary_bytes"] < 1.1 * full["temporary_bytes"]
    assert head["trained"] == 2 * 64 + 2
    assert lora["trained"] == head["trained"] + 2 * 2 * (64 * 2 + 2 * 64)
    for row in (full, head, lora, lora_all):
        assert 0 <= row["optimizer_bytes"] - 8 * row["trained"] <= 16, row["spec"]
    assert 0 < head["temporary_bytes"] < full["temporary_bytes"] / 2


@pytest.mark.slow
def test_epoch_on_cached_features():
    config = dataclasses.replace(SMALL, epoch_batches=2)
    model = finetune_cost.BERT(config.model, num_classes=2, task="classification")
    seconds = finetune_cost.time_cached_features(config, model)
    assert seconds["ratio"] == seconds["recomputed"] / seconds["cached"] > 0


def comparison(**changes) -> finetune_peft.ComparisonConfig:
    return finetune_peft.ComparisonConfig(**{
        "reference_python": Path(sys.executable), "num_layers": 1, "d_model": 64, "batch_size": 2,
        "length": 8, "rounds": 3, "steps_per_round": 1, "trainable": "lora:2"} | changes)


def test_comparison_with_peft(monkeypatch, tmp_path):
    def run_interleaved(commands, rounds):
        assert list(commands) == ["transformer_jax", "peft"] and rounds == 3
        assert json.loads(commands["peft"][-1])["trainable"] == "lora:2"
        return {name: interleave.Timings({"trained": 7}, [[seconds]] * 3, 1000)
                for name, seconds in {"transformer_jax": 1.0, "peft": 4.0}.items()}

    monkeypatch.setattr(interleave, "run_interleaved", run_interleaved)
    metrics = finetune_peft.main(comparison(out=tmp_path))["metrics"]
    assert metrics["time_ratios"] == [0.25] * 3 and metrics["time_ratio"] == 0.25
    assert metrics["memory_ratio"] == 1 and metrics["transformer_jax"]["trained"] == 7


@pytest.mark.slow
def test_jax_step_of_the_comparison():
    options = dataclasses.asdict(comparison())
    run_step, num_trainable = finetune_peft.make_jax_step(options)
    assert num_trainable == 2 * 64 + 2 + 512
    run_step()
    run_step()  # the first call donates the state and keeps the new one
    tokens, labels = finetune_peft.random_batch(options, 100)
    assert tokens.shape == (2, 8) and tokens.max() < 100 and np.isin(labels, (0, 1)).all()


def test_spec_that_is_not_compared_with_peft_is_an_error():
    with pytest.raises(ValueError, match=r"unsupported trainable spec 'head'.*supported: full"):
        finetune_peft.compare(comparison(trainable="head"))
