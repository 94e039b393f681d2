"""Text generation, beam search, speculative decoding and masked-token prediction."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "api", "beam_search", "decode_loop", "defaults", "kernel_layout", "logits_processors",
        "mask_filling", "options", "padding", "prefill", "speculative",
    ],
    submod_attrs={
        "api": ["generate"],
        "defaults": ["generation_options"],
        "kernel_layout": ["transpose_kernels_for_decoding"],
        "logits_processors": [
            "LogitsProcessorParams", "Sequences", "StaticGenerationConfig",
            "apply_logits_processors",
        ],
        "mask_filling": ["MaskPrediction", "fill_mask"],
        "padding": ["check_token_ids", "power_of_two_length"],
    },
)
