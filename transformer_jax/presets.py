"""The sizes of the papers by name: `presets.gpt2()`, `presets.get("bert_base", dropout_rate=0)`."""

import difflib
from collections.abc import Callable

from transformer_jax.models.config import BERTConfig, Config, GPTConfig


def gpt1(**changes) -> GPTConfig:
    """GPT, 117 M parameters (Radford et al. 2018, section 4.1)."""
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

    preset.__doc__ = (f"BERT with {num_layers} layers of {d_model} (Devlin et al. 2018, section "
                      "3; small sizes: Turc et al. 2019).")
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

PRESETS: dict[str, Callable[..., Config]] = {
    "gpt1": gpt1, "gpt2": gpt2, "gpt2_medium": gpt2_medium, "gpt2_large": gpt2_large,
    "gpt2_xl": gpt2_xl, "bert_tiny": bert_tiny, "bert_mini": bert_mini, "bert_small": bert_small,
    "bert_medium": bert_medium, "bert_base": bert_base, "bert_large": bert_large,
}


def get(name: str, **changes) -> Config:
    """The preset called `name`, with some fields changed.

    Raises:
        ValueError: no such preset; the message lists near matches.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3) or PRESETS
        raise ValueError(f"unknown preset {name!r}; choose one of: {', '.join(near)}")
    return PRESETS[name](**changes)
