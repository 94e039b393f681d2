"""Text generation, beam search, speculative decoding and masked-token prediction."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "api", "beam_search", "decoding", "logits_processors", "options", "padding", "speculative",
    ],
    submod_attrs={
        "api": ["DecodeOutput", "MaskPrediction", "decode", "fill_mask", "generate",
                "generate_texts"],
        "decoding": ["Cache", "decode_step", "prefill", "transpose_kernels_for_decoding"],
        "logits_processors": ["LogitsProcessor", "Sequences"],
        "options": ["GenerateOptions", "generation_options"],
    },
)
