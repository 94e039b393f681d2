"""The models (GPT, BERT, Transformer, BART), their configs, and presets from the papers."""

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
            "MODEL_FAMILIES", "Model", "build_model", "config_from_dict", "config_to_dict",
            "family_name",
        ],
        "config": [
            "BARTConfig", "BERTConfig", "Config", "GPTConfig", "TransformerConfig", "init_params",
        ],
        "gpt": ["GPT", "GPTOutput"],
        "transformer": ["Seq2SeqOutput", "Transformer", "shift_right"],
    },
)
