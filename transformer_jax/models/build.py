"""Models from configs, and configs as JSON."""

import dataclasses
from typing import Any

from transformer_jax.models.bart import BART
from transformer_jax.models.bert import BERT
from transformer_jax.models.config import (
    BARTConfig,
    BERTConfig,
    Config,
    GPTConfig,
    TransformerConfig,
)
from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer

Model = GPT | BERT | Transformer  # BART is a Transformer

FAMILIES = {
    "gpt": (GPT, GPTConfig),
    "bert": (BERT, BERTConfig),
    "transformer": (Transformer, TransformerConfig),
    "bart": (BART, BARTConfig),
}


def family(config: Config) -> str:
    """The name of the family a config belongs to."""
    return next(name for name, (_, kind) in FAMILIES.items() if type(config) is kind)


def build_model(config: Config, num_classes: int = 0, task: str | None = None) -> Model:
    """The model that a config describes, with the head of `task` (None: of pre-training).

    Raises:
        ValueError: the family has no such task.
    """
    kind = FAMILIES[family(config)][0]
    if task is None:
        return kind(config, num_classes)
    if task not in kind.METHODS:
        raise ValueError(f"{kind.__name__} has no task {task!r}; choose one of "
                         f"{', '.join(kind.METHODS)}")
    return kind(config, num_classes, task)


def config_to_dict(config: Config) -> dict[str, Any]:
    """A config as JSON can hold it; `config_from_dict` reads it back."""
    return {"family": family(config), **dataclasses.asdict(config)}


def config_from_dict(values: dict[str, Any]) -> Config:
    """The config that `config_to_dict` wrote.

    Raises:
        ValueError: an unknown family or field, a missing field, or a value out of range.
    """
    values = dict(values)
    name = values.pop("family", None)
    if name not in FAMILIES:
        raise ValueError(f"model family is {name!r}; it must be one of {', '.join(FAMILIES)}")
    kind = FAMILIES[name][1]
    fields = {f.name: f for f in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - fields):
        raise ValueError(f"unknown fields of a {name} config: {', '.join(unknown)}; remove them")
    required = {n for n, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise ValueError(f"a {name} config lacks {', '.join(missing)}; add them")
    # JSON has no tuples.
    values = {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}
    return kind(**values)
