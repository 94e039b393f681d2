"""Layers, attention, blocks and position embeddings: the Flax modules that all models share.

Shape suffixes of arrays here and in `models`: B batch, T target length, S source length,
D d_model, N heads, H head_dim, F mlp_dim, V vocabulary, C classes.
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
