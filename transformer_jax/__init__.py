"""The classic transformers in JAX: pre-trained, fine-tuned by masks, used as pure functions.

Start at `models` (GPT, BERT), `objectives` (what is learnt), `train` (the pure step), `finetune`
(what trains) and `generate`. Parameters are nested dicts of arrays; nothing is global.
"""

__version__ = "0.1.0"
