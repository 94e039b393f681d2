"""GPT's auxiliary loss: the language model's loss beside the task's, weight 0.5 against 0.

    python experiments/quickstart.py
    python experiments/sweep.py gpt_auxiliary

The topics of docstrings, 192 of them labelled, by the quickstart's GPT, five seeds. 2 CPU cores
take about five minutes.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep


def config() -> Sweep:
    return Sweep(
        pretrained="runs/quickstart/gpt_python_docs", out=Path("runs/gpt_auxiliary"), data=Data(),
        recipes=("full", "full"), lm_weights=(0.0, 0.5), examples=(192,), seeds=5,
        settings=Settings(length=48, batch_size=16, num_steps=100,
                          optimizer=FinetuneOptimizer(peak=1.5e-3, b2=0.99)),
    )
