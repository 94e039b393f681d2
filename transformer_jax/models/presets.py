"""Configs of the models in the papers, by name.

Example:
    >>> gpt2(num_layers=6).d_model
    768
    >>> get("bert_base", dropout_rate=0.0).num_layers
    12
"""

from collections.abc import Callable

from transformer_jax.errors import did_you_mean
from transformer_jax.models.config import (
    BARTConfig,
    BERTConfig,
    Config,
    GPTConfig,
    TransformerConfig,
)


def gpt1(**changes) -> GPTConfig:
    """GPT with 12 layers, 117 M parameters (Radford et al. 2018, section 4.1)."""
    base = {"vocab_size": 40_478, "max_length": 512, "num_layers": 12, "d_model": 768,
            "num_heads": 12, "mlp_dim": 3072}
    return GPTConfig(**(base | changes))


def _gpt2(num_layers: int, d_model: int, num_heads: int) -> Callable[..., GPTConfig]:
    def preset(**changes) -> GPTConfig:
        base = {"vocab_size": 50_257, "max_length": 1024, "num_layers": num_layers,
                "d_model": d_model, "num_heads": num_heads, "mlp_dim": 4 * d_model,
                "norm_first": True, "scale_residual_init": True}
        return GPTConfig(**(base | changes))

    preset.__doc__ = f"GPT-2 with {num_layers} layers (Radford et al. 2019, table 2)."
    return preset


def _bert(num_layers: int, d_model: int) -> Callable[..., BERTConfig]:
    def preset(**changes) -> BERTConfig:
        base = {"vocab_size": 30_522, "max_length": 512, "num_layers": num_layers,
                "d_model": d_model, "num_heads": d_model // 64, "mlp_dim": 4 * d_model}
        return BERTConfig(**(base | changes))

    preset.__doc__ = (f"BERT with {num_layers} layers and d_model {d_model} (Devlin et al. 2018, "
                      "section 3; small sizes: Turc et al. 2019).")
    return preset


def _transformer(
    d_model: int, num_heads: int, mlp_dim: int, dropout_rate: float
) -> Callable[..., TransformerConfig]:
    def preset(**changes) -> TransformerConfig:
        base = {"vocab_size": 37_000, "max_length": 512, "num_layers": 6, "d_model": d_model,
                "num_heads": num_heads, "mlp_dim": mlp_dim, "dropout_rate": dropout_rate,
                "attention_dropout_rate": 0.0}
        values = base | changes
        init_std = {"init_std": values["d_model"] ** -0.5}
        return TransformerConfig(**(init_std | values))

    preset.__doc__ = f"The Transformer with d_model {d_model} (Vaswani et al. 2017, table 3)."
    return preset


def _bart(num_layers: int, d_model: int, num_heads: int) -> Callable[..., BARTConfig]:
    def preset(**changes) -> BARTConfig:
        base = {"vocab_size": 50_265, "max_length": 1024, "num_layers": num_layers,
                "d_model": d_model, "num_heads": num_heads, "mlp_dim": 4 * d_model}
        return BARTConfig(**(base | changes))

    preset.__doc__ = (f"BART with {num_layers} layers in encoder and decoder (Lewis et al. 2019, "
                      "section 2.1).")
    return preset


gpt2 = _gpt2(12, 768, 12)
gpt2_medium = _gpt2(24, 1024, 16)
gpt2_large = _gpt2(36, 1280, 20)
gpt2_xl = _gpt2(48, 1600, 25)
bert_tiny = _bert(2, 128)
bert_mini = _bert(4, 256)
bert_small = _bert(4, 512)
bert_medium = _bert(8, 512)
bert_base = _bert(12, 768)
bert_large = _bert(24, 1024)
transformer_base = _transformer(512, 8, 2048, 0.1)
transformer_big = _transformer(1024, 16, 4096, 0.3)
bart_base = _bart(6, 768, 12)
bart_large = _bart(12, 1024, 16)

PRESETS: dict[str, Callable[..., Config]] = {
    "gpt1": gpt1, "gpt2": gpt2, "gpt2_medium": gpt2_medium, "gpt2_large": gpt2_large,
    "gpt2_xl": gpt2_xl, "bert_tiny": bert_tiny, "bert_mini": bert_mini, "bert_small": bert_small,
    "bert_medium": bert_medium, "bert_base": bert_base, "bert_large": bert_large,
    "transformer_base": transformer_base, "transformer_big": transformer_big,
    "bart_base": bart_base, "bart_large": bart_large,
}


def get(name: str, **changes) -> Config:
    """Returns the preset `name`, with some fields changed.

    Raises:
        ValueError: there is no such preset. The message lists similar names.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; {did_you_mean(name, PRESETS)}")
    return PRESETS[name](**changes)
