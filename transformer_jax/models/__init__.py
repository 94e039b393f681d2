"""The systems of the papers, each a thin composition of `nn`."""

from transformer_jax.models.bert import BERT, BERTOutput
from transformer_jax.models.config import BERTConfig, Config, GPTConfig, init_params
from transformer_jax.models.gpt import GPT, GPTOutput

__all__ = ["BERT", "GPT", "BERTConfig", "BERTOutput", "Config", "GPTConfig", "GPTOutput",
           "init_params"]
