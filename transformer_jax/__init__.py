"""The classic transformers in JAX: pre-trained, fine-tuned by masks, used as pure functions.

Start at `models` (GPT, BERT, Transformer, BART), `objectives` (what is learnt), `train` (the pure
step), `finetune` (what trains) and `generate`; `load_pretrained`, `forward` and `save_pretrained`
work with checkpoints in the Hugging Face format. Parameters are nested dicts of arrays; nothing is
global.
"""

__version__ = "0.1.0"

_PRETRAINED = ("forward", "load_pretrained", "save_pretrained")


def __getattr__(name: str):
    """The names of `pretrained`, imported when they are first asked for: JAX takes a second."""
    if name in _PRETRAINED:
        from transformer_jax import pretrained

        return getattr(pretrained, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PRETRAINED])
