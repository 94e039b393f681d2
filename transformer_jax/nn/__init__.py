"""Layers, attention, blocks and positions: the modules that all models are built from."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "attention", "blocks", "dropout", "fused_attention", "layers", "positions",
    ],
    submod_attrs={
        "attention": ["KVCache", "Mask", "causal_mask", "dot_product_attention"],
        "blocks": ["Block", "Stack", "StackConfig"],
        "dropout": ["Dropout"],
        "layers": ["Embed", "LayerNorm", "Linear"],
        "positions": ["sinusoidal"],
    },
)
