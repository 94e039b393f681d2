"""Fine-tuning: trainable specs, PEFT parameters, quantization of frozen weights, saved adapters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "adapter_io", "feature_cache", "multi_adapter", "peft", "quantize",
        "select",
    ],
    submod_attrs={
        "adapter_io": ["apply_adapter", "load_adapter", "save_adapter"],
        "peft": ["add_and_mask", "merge"],
        "quantize": ["quantize_frozen"],
        "select": ["describe", "trainable_mask"],
    },
)
