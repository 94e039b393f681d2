"""Checkpoints in the Hugging Face and PEFT formats: load, run and save."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "families", "load", "peft_io", "runs", "safetensors_io", "save", "sentencepiece",
        "tokenizer", "weight_maps",
    ],
    submod_attrs={
        "forward": ["forward"],
        "load": ["Pretrained", "load_pretrained"],
        "save": ["save_pretrained"],
    },
)
