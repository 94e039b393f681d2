"""Conversion between the config.json of Hugging Face checkpoints and the configs of this library.

A field that config.json omits has its default value in Transformers.
"""

import json
from typing import Any

from transformer_jax.models import Config, GPTConfig, Model
from transformer_jax.pretrained.families import (
    FAMILIES,
    SEQ2SEQ_TOKEN_IDS,
    TOKEN_IDS,
    get_family,
    hf_class_name,
)

# Name of an activation in config.json -> its name in `Config.activation`.
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
                "silu": "swish", "swish": "swish", "tanh": "tanh"}
_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "swish", "swish": "swish"}


def _activations(model_type: str) -> dict[str, str]:
    return _GPT1_ACTIVATIONS if model_type == "openai-gpt" else _ACTIVATIONS


def _is_roberta(model_type: str) -> bool:
    return FAMILIES[model_type].base_prefix == "roberta."


def config_from_hf(hf_config: dict[str, Any], **changes) -> Config:
    """Converts the fields of a config.json to a config of this library.

    Args:
        hf_config: the fields of config.json, and those of generation_config.json under the key
            "generation_config".
        changes: fields of the result to override.

    Raises:
        ValueError: the family, or the value of a field, is invalid or not supported.

    Example:

        >>> config_from_hf({"model_type": "gpt2", "n_layer": 6}).num_layers
        6
    """
    model_type = hf_config.get("model_type")
    family = get_family(model_type)
    for name, supported in family.supported_values.items():
        if hf_config.get(name, supported) != supported:
            raise ValueError(f"unsupported {name} {hf_config[name]!r} in config.json; supported: "
                             f"{supported!r}")
    values = {**family.fixed_fields}
    for name, (hf_field, default) in family.fields.items():
        values[name] = hf_config.get(hf_field, default)
    activations = _activations(model_type)
    if not isinstance(values["activation"], str) or values["activation"] not in activations:
        raise ValueError(f"unsupported activation {values['activation']!r} in config.json; "
                         f"supported: {', '.join(activations)}")
    values["activation"] = activations[values["activation"]]
    # Other fields are computed from these, so their types are checked here.
    for name in ("d_model", "max_length", "pad_token_id"):
        value = values.get(name)
        if name in values and type(value) is not int and not (name == "pad_token_id"
                                                              and value is None):
            raise ValueError(f"{family.fields.get(name, (name,))[0]} in config.json is {value!r}; "
                             "it must be an integer")
    if values.get("mlp_dim") is None:
        values["mlp_dim"] = 4 * values["d_model"]
    if _is_roberta(model_type):
        # RoBERTa numbers positions from the padding id + 1.
        values["position_offset"] = (values["pad_token_id"] or 0) + 1
        values["max_length"] -= values["position_offset"]
    if model_type == "marian" and hf_config.get("decoder_vocab_size") not in (
            None, values["vocab_size"]):
        raise ValueError(f"unsupported decoder_vocab_size {hf_config['decoder_vocab_size']} in "
                         f"config.json; supported: the vocab_size {values['vocab_size']}, one "
                         "vocabulary for encoder and decoder")
    _add_token_ids(values, hf_config.get("generation_config", {}))
    return family.config_class(**values | changes)


def _add_token_ids(values: dict[str, Any], generation_config: Any) -> None:
    """Updates `values` with the special token ids of generation_config.json.

    Ids that only generation uses (`SEQ2SEQ_TOKEN_IDS`) override those of config.json. The others
    are used only if they are None in config.json, or omitted there with a default of None.
    """
    if not isinstance(generation_config, dict):
        raise ValueError(f"generation_config in config.json is {generation_config!r}; it must be "
                         "an object")
    for name in (*TOKEN_IDS, *SEQ2SEQ_TOKEN_IDS):
        if name in values and (values[name] is None or name in SEQ2SEQ_TOKEN_IDS):
            values[name] = generation_config.get(name, values[name])
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])


def _hf_fields(config: Config, model_type: str) -> dict[str, Any]:
    """The fields of config.json that describe a config."""
    hf_fields = {name: hf_field
                 for name, (hf_field, _) in FAMILIES[model_type].fields.items()}
    values = {hf_field: getattr(config, name) for name, hf_field in hf_fields.items()}
    hf_activations = {name: hf_name
                      for hf_name, name in reversed(_activations(model_type).items())}
    if config.activation not in hf_activations:
        raise ValueError(f"unsupported activation {config.activation!r} for {model_type}; "
                         f"supported: {', '.join(hf_activations)}")
    values[hf_fields["activation"]] = hf_activations[config.activation]
    # If a decoder size is None, the decoder has the size of the encoder.
    for decoder_name, encoder_name in (("num_decoder_layers", "num_layers"),
                                       ("num_decoder_heads", "num_heads"),
                                       ("decoder_mlp_dim", "mlp_dim")):
        if decoder_name in hf_fields and values[hf_fields[decoder_name]] is None:
            values[hf_fields[decoder_name]] = getattr(config, encoder_name)
    if hf_fields.get("scale_embedding"):
        values["scale_embedding"] = config.embedding_scale != 1
    if _is_roberta(model_type):
        values[hf_fields["max_length"]] = config.max_length + config.position_offset
    if model_type == "marian":
        values["decoder_vocab_size"] = config.vocab_size
    return values


def config_to_hf(model: Model) -> dict[str, Any]:
    """Converts the config and task of a model to the fields of config.json.

    If the model was loaded from a checkpoint (`hf_config`), only fields whose values have changed
    are updated; all other fields of the checkpoint's config.json are kept.

    Raises:
        ValueError: the model family does not support the value of a field, or does not support the
            task. The message names the field or task.

    Example:

        >>> from transformer_jax.models import build_model
        >>> model = build_model(config_from_hf({"model_type": "gpt2", "n_layer": 6}))
        >>> config_to_hf(model)["architectures"]
        ['GPT2LMHeadModel']
    """
    config = model.config
    original = json.loads(model.hf_config) if model.hf_config else None
    model_type = original["model_type"] if original else _infer_model_type(config)
    _check_supported(config, model_type)
    unchanged = _hf_fields(config_from_hf(original), model_type).items() if original else ()
    hf_config = {**(original or {}), "model_type": model_type}
    hf_config |= {name: list(value) if isinstance(value, tuple) else value
                  for name, value in _hf_fields(config, model_type).items()
                  if (name, value) not in unchanged}
    hf_config["architectures"] = [hf_class_name(model_type, model.task)]
    if (model.task in ("classification", "token_classification")
            and config_num_labels(hf_config) != model.num_classes):
        label_names = [f"LABEL_{i}" for i in range(model.num_classes)]
        hf_config["id2label"] = {str(i): name for i, name in enumerate(label_names)}
        hf_config["label2id"] = {name: i for i, name in enumerate(label_names)}
        hf_config.pop("num_labels", None)
    return hf_config


def config_num_labels(hf_config: dict[str, Any]) -> int:
    """Number of labels that a config.json defines, or else the default of Transformers."""
    if hf_config.get("id2label"):
        return len(hf_config["id2label"])
    default = 3 if hf_config.get("model_type") == "bart" else 2
    return hf_config.get("num_labels") or hf_config.get("_num_labels") or default


def _infer_model_type(config: Config) -> str:
    """The `model_type` of the first family that supports a config.

    Used for configs that were not loaded from a checkpoint.

    Raises:
        ValueError: no family supports the config; the message names a mismatched field.
    """
    candidates = [model_type for model_type, family in FAMILIES.items()
                  if type(config) is family.config_class]
    for model_type in candidates:
        if not _mismatched_fields(config, model_type):
            return model_type
    # The error message names the mismatch with one family.
    nearest = candidates[0]
    if type(config) is GPTConfig and not config.norm_first:
        nearest = "openai-gpt"
    _check_supported(config, nearest)
    raise AssertionError("unreachable")


# Fields that affect only the initialization of parameters, so any value can be saved.
INIT_ONLY_FIELDS = {
    "initializer", "init_std", "scale_residual_init", "classifier_bias", "output_bias"}


def _mismatched_fields(config: Config, model_type: str) -> dict[str, Any]:
    """Name -> required value, of the fields whose values a family does not support."""
    family = FAMILIES[model_type]
    required = {"residual": True, **family.fixed_fields}
    required = {name: value for name, value in required.items() if name not in INIT_ONLY_FIELDS}
    if required.get("scale_embedding", 0) is None:
        del required["scale_embedding"]
    if _is_roberta(model_type):
        required["position_offset"] = (config.pad_token_id or 0) + 1
    if model_type == "openai-gpt":
        required["mlp_dim"] = 4 * config.d_model
    for name, (hf_field, _) in family.fields.items():
        if hf_field in family.supported_values:
            required[name] = family.supported_values[hf_field]
    mismatched = {name: value for name, value in required.items() if getattr(config, name) != value}
    if "scale_embedding" not in family.fields and config.embedding_scale != 1:
        mismatched["scale_embedding"] = False
    return mismatched


def _check_supported(config: Config, model_type: str) -> None:
    for name, value in _mismatched_fields(config, model_type).items():
        raise ValueError(f"unsupported {name} {getattr(config, name)!r} for {model_type} "
                         f"checkpoints; supported: {value!r}")
