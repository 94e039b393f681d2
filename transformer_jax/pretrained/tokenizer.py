"""A checkpoint's tokenizer."""

from pathlib import Path

from transformer_jax.data import tokenizers

FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt")


def load(folder: Path, values: dict) -> tokenizers.Tokenizer | None:
    """The tokenizer in a checkpoint's folder, None where there is none."""
    try:
        return tokenizers.load(folder)
    except FileNotFoundError:
        return None
