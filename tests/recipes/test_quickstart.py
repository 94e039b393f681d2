"""The quickstart on the embedded corpus, with few steps and small models."""

import numpy as np
import pytest
from small_configs import shrink

from transformer_jax.recipes import quickstart
from transformer_jax.recipes.config import TrainingConfig


@pytest.mark.slow
def test_quickstart(tmp_path, monkeypatch):
    small = {name: shrink(make_config(), tmp_path, eval_batches=2)
             for name, make_config in quickstart.CONFIGS.items()}
    monkeypatch.setattr(quickstart, "CONFIGS",
                        {name: lambda config=config: config for name, config in small.items()})
    results = quickstart.quickstart(quickstart.QuickstartConfig(
        out=tmp_path, seeds=1, labels_per_class=(2,), test_examples=64, pretrain_steps=2,
        trainable=("head",), peak_lrs=(1e-2,),
        training=TrainingConfig(max_length=16, num_steps=2)))
    cells = results["metrics"]["finetuning"]
    assert len(cells) == 2 * 2 and all(np.isfinite(c["accuracy"]) for c in cells)
    assert {"positions.png", "attention.png", "labels.png", "results.json"} <= {
        path.name for path in tmp_path.iterdir()}


def test_each_trainable_spec_has_a_learning_rate():
    with pytest.raises(ValueError, match="3 peak_lrs for 1 trainable specs"):
        quickstart.QuickstartConfig(trainable=("head",))
