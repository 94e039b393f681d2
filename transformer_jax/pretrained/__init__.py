"""Checkpoints in the Hugging Face format: loaded, used under its names, and given back."""

from transformer_jax.pretrained.forward import forward
from transformer_jax.pretrained.load import Pretrained, load_pretrained
from transformer_jax.pretrained.save import save_pretrained

__all__ = ["Pretrained", "forward", "load_pretrained", "save_pretrained"]
