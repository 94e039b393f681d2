"""Text on the host: tokenizers, sources of examples, and the pipeline that makes batches.

`sources` gives random access to examples, `tokenizers` turns text into ids, `pipeline` packs,
shuffles and batches them; `python_docs` is a corpus that every Python installation carries.
All of it is NumPy: batches reach JAX only in the training loop.
"""

from transformer_jax.data import pipeline, python_docs, sources, tokenizers
from transformer_jax.data.pipeline import (
    Corpus,
    PackedTokens,
    check_ids,
    make_loader,
    tokenize_corpus,
)
from transformer_jax.data.sources import load_source
from transformer_jax.data.tokenizers import Tokenizer

__all__ = [
    "Corpus",
    "PackedTokens",
    "Tokenizer",
    "check_ids",
    "load_source",
    "make_loader",
    "pipeline",
    "python_docs",
    "sources",
    "tokenize_corpus",
    "tokenizers",
]
