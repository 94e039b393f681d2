"""Layers, attention, blocks and position embeddings: the Flax modules that all models share.

Shape suffixes of arrays here and in `models`: B batch, T target length (queries), S source length
(keys and values), D d_model or input features, N heads, H head_dim, F mlp_dim or output features,
V vocabulary, C classes, P selected positions or the length of a prefix, E added tokens, M the
product of all leading axes.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "attention", "backends", "blocks", "dropout", "layers", "peft", "quantized",
    ],
    submod_attrs={
        "attention": ["KVCache", "Mask", "causal_mask", "dot_product_attention"],
        "blocks": ["Attention", "Block", "MLP", "Stack", "StackConfig"],
        "dropout": ["Dropout"],
        "layers": ["Embed", "LayerNorm", "LazyLogits", "Linear", "sinusoidal_positions"],
    },
)
