"""The models of the papers, each a composition of the layers of `nn`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "bart", "bert", "build", "config", "gpt", "heads", "presets", "transformer",
    ],
    submod_attrs={
        "bart": ["BART"],
        "bert": ["BERT", "BERTOutput"],
        "build": [
            "FAMILIES", "Model", "build_model", "config_from_dict", "config_to_dict", "family",
        ],
        "config": [
            "BARTConfig", "BERTConfig", "Config", "GPTConfig", "TransformerConfig", "init_params",
        ],
        "gpt": ["GPT", "GPTOutput"],
        "transformer": ["Seq2SeqOutput", "Transformer", "shift_right"],
    },
)
