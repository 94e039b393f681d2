"""Checkpoints in the Hugging Face and PEFT formats, and folders of training runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "families", "load", "peft_io", "safetensors_io", "save", "tokenizer", "weight_maps",
    ],
    submod_attrs={
        "forward": ["forward"],
        "load": ["LoadedRun", "Pretrained", "is_run", "load_model", "load_pretrained", "load_run"],
        "save": ["save_pretrained", "save_run_config"],
    },
)
