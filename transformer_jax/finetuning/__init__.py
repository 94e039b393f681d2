"""Fine-tuning: trainable specs, PEFT parameters, quantization of frozen weights, saved adapters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["adapter_io", "frozen", "multi_adapter", "peft", "select"],
    submod_attrs={
        "adapter_io": ["apply_adapter", "load_adapter", "save_adapter"],
        "frozen": ["quantize_frozen"],
        "peft": ["add_and_mask", "merge"],
        "select": ["describe", "trainable_mask"],
    },
)
