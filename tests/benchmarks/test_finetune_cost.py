"""The cost of trainable specs on a small model, and the comparison with PEFT."""

import dataclasses

import finetune_cost
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
