"""Use a trained model: continue text with GPT, write with encoder-decoders, fill masks with BERT.

    api.py          generate: checks, layout, defaults
    options.py      what each option may be, and the traced values it becomes
    defaults.py     the options that a checkpoint asks for
    layout.py       rows of ids on the host, buckets of lengths
    forward.py      passes of either kind of model over a text that is being written
    rules.py        what may be written next, one pure function for each rule
    weights.py      parameters as passes over a few tokens want them
    sample.py       one text for each row, greedy or drawn, at once or streamed
    beam.py         the best texts by beam search
    speculative.py  a small model proposes, the large one judges
    fill.py         words in the place of masks
"""

from transformer_jax.generate.api import generate
from transformer_jax.generate.defaults import generation_options
from transformer_jax.generate.fill import Fill, fill_mask
from transformer_jax.generate.layout import bucket, check_ids
from transformer_jax.generate.rules import Plan, Rules, Text, restrict
from transformer_jax.generate.weights import prepare

__all__ = [
    "Fill", "Plan", "Rules", "Text", "bucket", "check_ids", "fill_mask", "generate",
    "generation_options", "prepare", "restrict",
]
