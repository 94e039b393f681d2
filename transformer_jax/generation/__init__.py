"""Text generation, beam search, speculative decoding and masked-token prediction."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "api", "beam_search", "decoding", "logits_processors", "mask_filling", "options", "padding",
        "speculative", "texts",
    ],
    submod_attrs={
        "api": ["DecodeOutput", "decode", "generate"],
        "decoding": ["Cache", "decode_step", "prefill", "transpose_kernels_for_decoding"],
        "logits_processors": ["LogitsProcessor", "Sequences"],
        "mask_filling": ["MaskPrediction", "fill_mask"],
        "options": ["generation_options"],
    },
)
