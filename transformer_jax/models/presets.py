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


def _preset(
    config_class: type[Config], source: str, vocab_size: int, max_length: int, num_layers: int,
    d_model: int, **options,
) -> Callable[..., Config]:
    """Returns a function that creates the config of a paper, with some fields changed."""
    base = {"vocab_size": vocab_size, "max_length": max_length, "num_layers": num_layers,
            "d_model": d_model, "num_heads": d_model // 64, "mlp_dim": 4 * d_model, **options}

    def preset(**changes) -> Config:
        values = base | changes
        if config_class is TransformerConfig:
            values = {"init_std": values["d_model"] ** -0.5} | values
        return config_class(**values)

    preset.__doc__ = f"{num_layers} layers of d_model {d_model} ({source})."
    return preset


def _gpt2(num_layers: int, d_model: int) -> Callable[..., GPTConfig]:
    return _preset(GPTConfig, "GPT-2, Radford et al. 2019, table 2", 50_257, 1024, num_layers,
                   d_model, norm_first=True, scale_residual_init=True)


def _bert(num_layers: int, d_model: int) -> Callable[..., BERTConfig]:
    return _preset(BERTConfig, "BERT, Devlin et al. 2018, section 3; small sizes: Turc et al. 2019",
                   30_522, 512, num_layers, d_model)


def _transformer(d_model: int, dropout_rate: float) -> Callable[..., TransformerConfig]:
    return _preset(TransformerConfig, "Vaswani et al. 2017, table 3", 37_000, 512, 6, d_model,
                   dropout_rate=dropout_rate, attention_dropout_rate=0.0)


def _bart(num_layers: int, d_model: int) -> Callable[..., BARTConfig]:
    return _preset(BARTConfig, "BART, encoder and decoder each; Lewis et al. 2019, section 2.1",
                   50_265, 1024, num_layers, d_model)


gpt1 = _preset(GPTConfig, "GPT, 117 M parameters, Radford et al. 2018, 4.1", 40_478, 512, 12, 768)
gpt2, gpt2_medium = _gpt2(12, 768), _gpt2(24, 1024)
gpt2_large, gpt2_xl = _gpt2(36, 1280), _gpt2(48, 1600)
bert_tiny, bert_mini, bert_small = _bert(2, 128), _bert(4, 256), _bert(4, 512)
bert_medium, bert_base, bert_large = _bert(8, 512), _bert(12, 768), _bert(24, 1024)
transformer_base, transformer_big = _transformer(512, 0.1), _transformer(1024, 0.3)
bart_base, bart_large = _bart(6, 768), _bart(12, 1024)

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
