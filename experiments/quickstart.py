"""Pre-trains, fine-tunes selected parameters, evaluates and generates: GPT and BERT, five minutes.

    python experiments/quickstart.py

Hardware: any; 2 CPU cores take five minutes, one takes six. Nothing is downloaded: the text is the
documentation that comes with Python. Both models are pre-trained on it; copies are fine-tuned to
classify which part of the standard library a docstring documents, with few labels and with
trainable specs of increasing size; a model of the same size is trained from scratch for comparison.
`runs/quickstart` gets `results.json` and the figures.
"""

import sys

import tyro

from transformer_jax.cli import run_command
from transformer_jax.recipes.quickstart import QuickstartConfig, quickstart
from transformer_jax.recipes.run_dir import setup


def main(config: QuickstartConfig) -> None:
    setup()
    quickstart(config)


if __name__ == "__main__":
    sys.exit(run_command(main, parse=lambda: tyro.cli(QuickstartConfig, description=__doc__)))
