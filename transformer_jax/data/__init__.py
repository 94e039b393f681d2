"""Text on the host: tokenizers, sources of examples, and the pipeline that makes batches.

`sources` gives random access to examples, `annotated` reads those with labels, `tokenizers` turns
text into ids, `pipeline` packs, shuffles and batches them; `python_docs` is a corpus that every
Python installation carries.
All of it is NumPy: batches reach JAX only in the training loop.
"""

import importlib

# Where each name lives; imported when it is first asked for, because the loader and TFDS take a
# second that whoever only wants a tokenizer need not wait.
_HOMES = {
    "Annotated": "annotated", "few_labels": "annotated", "load_annotated": "annotated",
    "Corpus": "pipeline", "PackedTokens": "pipeline", "Tokenizer": "tokenizers",
    "check_ids": "pipeline", "load_source": "sources", "make_loader": "pipeline",
    "tokenize_corpus": "pipeline",
}

__all__ = [
    "Annotated",
    "Corpus",
    "PackedTokens",
    "Tokenizer",
    "annotated",
    "check_ids",
    "few_labels",
    "load_annotated",
    "load_source",
    "make_loader",
    "pipeline",
    "prepared",
    "python_docs",
    "sources",
    "tokenize_corpus",
    "tokenizers",
]


def __getattr__(name: str):
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f"{__name__}.{_HOMES.get(name, name)}")
    return getattr(home, name) if name in _HOMES else home
