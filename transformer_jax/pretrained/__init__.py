"""Checkpoints in the Hugging Face and PEFT formats: loading, forward pass and saving."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "config_conversion", "families", "load", "peft_config", "peft_io", "runs",
        "safetensors_io", "save", "sentencepiece_model", "tokenizer", "weight_maps",
    ],
    submod_attrs={
        "forward": ["forward"],
        "load": ["Pretrained", "load_pretrained"],
        "save": ["save_pretrained"],
    },
)
