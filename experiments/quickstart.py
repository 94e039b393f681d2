"""Quickstart: pre-trains a GPT and a BERT, fine-tunes, evaluates and generates, in five minutes.

    python experiments/quickstart.py

Hardware and time: five minutes on 2 CPU cores, six on one. Nothing is downloaded: the text is the
documentation that comes with Python. Copies of both pre-trained models are fine-tuned to classify
docstrings by the part of the standard library that they document, with few labels and with
increasing numbers of trainable parameters. A model of the same size is trained from scratch for
comparison. The script writes `results.json` and the figures to `runs/quickstart`.
"""

import configs

from transformer_jax.recipes.quickstart import QuickstartConfig, quickstart

if __name__ == "__main__":
    configs.run(quickstart, QuickstartConfig, __doc__)
