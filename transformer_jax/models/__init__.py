"""The models (GPT, BERT, Transformer, BART), their configs, and presets from the papers."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from transformer_jax.models import presets
from transformer_jax.models.bert import BERT, BERTOutput
from transformer_jax.models.config import (
    BARTConfig,
    BERTConfig,
    Config,
    GPTConfig,
    TransformerConfig,
)
from transformer_jax.models.gpt import GPT, GPTOutput
from transformer_jax.models.transformer import BART, Seq2SeqOutput, Transformer, shift_right

__all__ = [
    "BART", "BERT", "GPT", "MODEL_FAMILIES", "BARTConfig", "BERTConfig", "BERTOutput", "Config",
    "GPTConfig", "GPTOutput", "Model", "Seq2SeqOutput", "Transformer", "TransformerConfig",
    "build_model", "config_from_dict", "config_to_dict", "family_name", "init_params", "presets",
    "shift_right",
]

Model = GPT | BERT | Transformer  # BART is a subclass of Transformer

MODEL_FAMILIES = {
    "gpt": (GPT, GPTConfig),
    "bert": (BERT, BERTConfig),
    "transformer": (Transformer, TransformerConfig),
    "bart": (BART, BARTConfig),
}

# Config fields that saved configs may have under a former name: former name -> name.
RENAMED_FIELDS = {"kernel": "attention_impl", "context_size": "attention_window"}
# Fields of saved configs that are no longer part of a config; `pretrained.load` reads `source`.
REMOVED_FIELDS = ("source",)


def family_name(config: Config) -> str:
    """Returns the name of a config's model family, a key of `MODEL_FAMILIES`."""
    for name, (_, kind) in MODEL_FAMILIES.items():
        if type(config) is kind:
            return name
    kinds = ", ".join(kind.__name__ for _, kind in MODEL_FAMILIES.values())
    raise ValueError(f"config is a {type(config).__name__}; give one of {kinds}")


def build_model(config: Config, num_classes: int = 0, task: str | None = None) -> Model:
    """Creates the model of a config, whose type selects the model class.

    Args:
        config: sizes and options.
        num_classes: the number of outputs of the classifier; 0 for no classifier.
        task: the task whose head `init_params` initializes; the pre-training task if None.

    Raises:
        ValueError: the model class does not support the task.

    Example:
        >>> from transformer_jax.models import presets
        >>> type(build_model(presets.gpt2())).__name__
        'GPT'
    """
    model_class = MODEL_FAMILIES[family_name(config)][0]
    if task is None:
        return model_class(config, num_classes)
    if task not in model_class.METHODS:
        raise ValueError(f"unsupported task {task!r} of {model_class.__name__}; supported: "
                         f"{', '.join(model_class.METHODS)}")
    return model_class(config, num_classes, task)


def config_to_dict(config: Config) -> dict[str, Any]:
    """Converts a config to a JSON-compatible dict with the name of its family.

    Raises:
        ValueError: a field is a function or a class.

    Example:
        >>> from transformer_jax.models import presets
        >>> values = config_to_dict(presets.gpt2())
        >>> values["family"], config_from_dict(values) == presets.gpt2()
        ('gpt', True)
    """
    values = dataclasses.asdict(config)
    for name, value in values.items():
        if callable(value):
            raise ValueError(f"{name} is {value!r}; configs with functions or classes cannot be "
                             "saved. Save the parameters, and build the config in code")
    del values["block"]
    return {"family": family_name(config), **values}


def config_from_dict(values: dict[str, Any]) -> Config:
    """Creates a config from the output of `config_to_dict`, which may have been saved as JSON.

    Former names of fields (`RENAMED_FIELDS`) are accepted, and `REMOVED_FIELDS` are ignored.

    Raises:
        ValueError: an unknown family or field, a missing field, or a value out of range.
    """
    values = {name: value for name, value in values.items() if name not in REMOVED_FIELDS}
    for former_name, name in RENAMED_FIELDS.items():
        if former_name in values and name not in values:
            values[name] = values.pop(former_name)
    family = values.pop("family", None)
    if family not in MODEL_FAMILIES:
        raise ValueError(
            f"model family is {family!r}; it must be one of {', '.join(MODEL_FAMILIES)}")
    config_class = MODEL_FAMILIES[family][1]
    fields = {f.name: f for f in dataclasses.fields(config_class)}
    if unknown := sorted(values.keys() - fields):
        raise ValueError(f"unknown fields of a {family} config: {', '.join(unknown)}; remove them")
    required = {name for name, f in fields.items() if f.default is dataclasses.MISSING}
    if missing := sorted(required - values.keys()):
        raise ValueError(f"missing fields of a {family} config: {', '.join(missing)}; add them")
    # JSON has no tuples.
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return config_class(**values)


def init_params(model: Model, rng: jax.Array, method: str | None = None) -> dict:
    """Initializes the parameters of a model, a nested dict of float32 arrays.

    The function is pure. Wrap it in `jax.jit` with `out_shardings` to initialize sharded
    parameters, or in `jax.eval_shape` for shapes only. `method` is the method whose parameters are
    initialized, such as "classification_logits"; None for that of the model's task.

    Example:
        >>> from transformer_jax.models import presets
        >>> model = build_model(presets.bert_tiny())
        >>> params = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
        >>> params["token_embed"]["embedding"].shape
        (30522, 128)
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    method = model.METHODS[model.task] if method is None else method
    return model.init(rng, tokens, method=method)["params"]
