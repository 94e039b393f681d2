"""Tokenizers, data sources, labeled datasets and batches: host code in NumPy, without JAX."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "batching", "columns", "datasets", "known_datasets", "mapped_dataset", "packing",
        "python_docs", "rows", "sources", "splits", "token_cache", "tokenizers",
    ],
    submod_attrs={
        "batching": ["check_batch_ids", "make_loader"],
        "datasets": ["LabeledDataset", "load_dataset", "load_pairs", "subsample_balanced"],
        "known_datasets": ["DatasetConfig"],
        "packing": ["Corpus", "PackedTokens", "tokenize_corpus"],
        "sources": ["load_source"],
        "tokenizers": ["Tokenizer"],
    },
)
