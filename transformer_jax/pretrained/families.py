"""Model families of Hugging Face checkpoints, and the conversion of their config.json.

A field that config.json omits has its default value in Transformers.
"""

import json
import re
from typing import Any, NamedTuple

from transformer_jax.errors import did_you_mean
from transformer_jax.models import (
    BARTConfig,
    BERTConfig,
    Config,
    GPTConfig,
    Model,
    TransformerConfig,
)

# Field of a `Config` -> (field of config.json, its default in Transformers).
Fields = dict[str, tuple[str, Any]]
# Fields with the same name in config.json and in `Config`.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
SEQ2SEQ_TOKEN_IDS = (  # used only in generation with encoder-decoders
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
# Fields that affect only the initialization of parameters, so any value can be saved.
INIT_ONLY_FIELDS = {
    "initializer", "init_std", "scale_residual_init", "classifier_bias", "output_bias"}


# Name of an activation in config.json -> its name in `Config.activation`.
_ACTIVATIONS = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
                "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
                "silu": "swish", "swish": "swish", "tanh": "tanh"}
_GPT1_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "swish", "swish": "swish"}
# Task -> suffix of the class name in Transformers.
_CLASS_SUFFIXES = {
    "base": "Model", "encoder": "Model", "causal_lm": "LMHeadModel",
    "seq2seq_lm": "ForConditionalGeneration", "masked_lm": "ForMaskedLM",
    "pretraining": "ForPreTraining", "next_sentence": "ForNextSentencePrediction",
    "classification": "ForSequenceClassification", "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering", "multiple_choice": "ForMultipleChoice"}
# Name of a task in lower case without punctuation -> task: names in this library, class suffixes
# and names of pipelines.
_TASK_ALIASES = {
    **{task.replace("_", ""): task for task in _CLASS_SUFFIXES},
    **{suffix.lower().removeprefix("for"): task for task, suffix in _CLASS_SUFFIXES.items()},
    "model": "base", "featureextraction": "base", "lmhead": "causal_lm",
    "textgeneration": "causal_lm", "fillmask": "masked_lm", "mtmodel": "seq2seq_lm",
    "summarization": "seq2seq_lm", "translation": "seq2seq_lm",
    "text2textgeneration": "seq2seq_lm", "textclassification": "classification",
    "sentimentanalysis": "classification", "ner": "token_classification"}


class Family(NamedTuple):
    """A family of models in Transformers, identified by the `model_type` of config.json."""

    config_class: type[Config]
    class_prefix: str  # of the class names in Transformers, such as "Bert"
    base_prefix: str  # of the tensor names of the base model in checkpoints with a head: "bert."
    fields: Fields
    fixed_fields: dict[str, Any]  # fields of `config_class` with one value in the whole family
    class_suffixes: dict[str, str]  # task -> suffix of the class name in Transformers
    supported_values: dict[str, Any] = {}  # noqa: RUF012  field of config.json -> the only value
    activations: dict[str, str] = _ACTIVATIONS

    @property
    def is_roberta(self) -> bool:
        """Whether positions are numbered from the padding id + 1, as in RoBERTa."""
        return self.base_prefix == "roberta."


def _fields(fields: Fields, *ids: int | None) -> Fields:
    """`fields`, and the fields that all families have; `ids` are the defaults of `TOKEN_IDS`."""
    ids = dict.fromkeys(TOKEN_IDS) | dict(zip(TOKEN_IDS, ids))
    return {"tie_embeddings": ("tie_word_embeddings", True), **fields,
            **{name: (name, default) for name, default in ids.items()}}


def _gpt(vocab_size: int, max_length: int, activation: tuple[str, str], ids: tuple) -> Fields:
    return _fields({
        "vocab_size": ("vocab_size", vocab_size), "max_length": ("n_positions", max_length),
        "num_layers": ("n_layer", 12), "d_model": ("n_embd", 768), "num_heads": ("n_head", 12),
        "dropout_rate": ("resid_pdrop", 0.1), "attention_dropout_rate": ("attn_pdrop", 0.1),
        "activation": activation, "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "init_std": ("initializer_range", 0.02),
    }, *ids)


def _bert(vocab_size: int, pad: int, bos=None, eos=None) -> Fields:
    return _fields({
        "vocab_size": ("vocab_size", vocab_size), "max_length": ("max_position_embeddings", 512),
        "num_layers": ("num_hidden_layers", 12), "d_model": ("hidden_size", 768),
        "num_heads": ("num_attention_heads", 12), "mlp_dim": ("intermediate_size", 3072),
        "dropout_rate": ("hidden_dropout_prob", 0.1),
        "attention_dropout_rate": ("attention_probs_dropout_prob", 0.1),
        "activation": ("hidden_act", "gelu"), "num_segments": ("type_vocab_size", 2),
        "norm_epsilon": ("layer_norm_eps", 1e-12), "init_std": ("initializer_range", 0.02),
    }, pad, bos, eos)


def _bart(vocab_size: int, pad: int, bos: int | None, eos: int, start: int | None) -> Fields:
    ids = dict(zip(SEQ2SEQ_TOKEN_IDS, (start, None, eos)))
    return {**_fields({
        "vocab_size": ("vocab_size", vocab_size), "max_length": ("max_position_embeddings", 1024),
        "num_layers": ("encoder_layers", 12), "num_decoder_layers": ("decoder_layers", 12),
        "num_heads": ("encoder_attention_heads", 16),
        "num_decoder_heads": ("decoder_attention_heads", 16),
        "mlp_dim": ("encoder_ffn_dim", 4096), "decoder_mlp_dim": ("decoder_ffn_dim", 4096),
        "d_model": ("d_model", 1024), "dropout_rate": ("dropout", 0.1),
        "attention_dropout_rate": ("attention_dropout", 0.0),
        "activation": ("activation_function", "gelu"), "init_std": ("init_std", 0.02),
        "scale_embedding": ("scale_embedding", False),
    }, pad, bos, eos), **{name: (name, default) for name, default in ids.items()}}


def _tasks(names: str) -> dict[str, str]:
    return {task: _CLASS_SUFFIXES[task] for task in names.split()}


_GPT_FIXED = {"positions": "learned", "position_offset": 0, "attention_window": None,
              "classifier_bias": False, "scale_embedding": None}
_ENCODER_FIXED = {"norm_first": False, "positions": "learned", "pooler_activation": "tanh",
                  "pooling": "first", "scale_embedding": None, "initializer": "truncated_normal"}
_BART_FIXED = {"positions": "learned", "position_offset": 2, "embed_norm": True,
               "norm_epsilon": 1e-5, "output_bias": True, "initializer": "normal"}
_SINUSOIDAL_FIXED = {**_BART_FIXED, "positions": "sinusoidal_halves", "position_offset": 0,
                     "embed_norm": False}
_ENCODER_HEADS = (
    " masked_lm classification token_classification question_answering multiple_choice")
_BART_TASKS = _tasks("seq2seq_lm base classification question_answering")
# BERT must have tied embeddings, because without them its class in Transformers has two output
# biases, one of which is not used.
_ENCODER_SUPPORTED = {"tie_word_embeddings": True, "is_decoder": False,
                      "add_cross_attention": False, "position_embedding_type": "absolute"}
_ENCODER_DECODER_SUPPORTED = {"is_decoder": False, "is_encoder_decoder": True,
                              "tie_word_embeddings": True}
_SINUSOIDAL_SUPPORTED = {**_ENCODER_DECODER_SUPPORTED, "normalize_embedding": False,
                         "static_position_embeddings": True}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        GPTConfig, "GPT2", "transformer.",
        {**_gpt(50_257, 1024, ("activation_function", "gelu_new"), (None, 50_256, 50_256)),
         "mlp_dim": ("n_inner", None)},
        {"norm_first": True, **_GPT_FIXED, "scale_residual_init": True},
        _tasks("causal_lm base classification token_classification question_answering"),
        {"add_cross_attention": False, "reorder_and_upcast_attn": False,
         "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}),
    "openai-gpt": Family(
        GPTConfig, "OpenAIGPT", "transformer.", _gpt(40_478, 512, ("afn", "gelu"), ()),
        {"norm_first": False, **_GPT_FIXED}, _tasks("causal_lm base classification"),
        activations=_GPT1_ACTIVATIONS),
    "bert": Family(
        BERTConfig, "Bert", "bert.", _bert(30_522, 0), {**_ENCODER_FIXED, "position_offset": 0},
        _tasks("pretraining next_sentence base encoder" + _ENCODER_HEADS), _ENCODER_SUPPORTED),
    **{name: Family(
        BERTConfig, class_prefix, "roberta.", _bert(50_265, 1, 0, 2), _ENCODER_FIXED,
        _tasks("base encoder" + _ENCODER_HEADS), _ENCODER_SUPPORTED)
       for name, class_prefix in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"),
                                  ("camembert", "Camembert"))},
    "distilbert": Family(
        BERTConfig, "DistilBert", "distilbert.",
        _fields({
            "vocab_size": ("vocab_size", 30_522), "max_length": ("max_position_embeddings", 512),
            "num_layers": ("n_layers", 6), "d_model": ("dim", 768), "num_heads": ("n_heads", 12),
            "mlp_dim": ("hidden_dim", 3072), "dropout_rate": ("dropout", 0.1),
            "attention_dropout_rate": ("attention_dropout", 0.1),
            "activation": ("activation", "gelu"), "init_std": ("initializer_range", 0.02),
        }, 0),
        {**_ENCODER_FIXED, "position_offset": 0, "num_segments": 0, "pooler_activation": "relu",
         "norm_epsilon": 1e-12},
        _tasks("encoder" + _ENCODER_HEADS)),
    "bart": Family(
        BARTConfig, "Bart", "model.", _bart(50_265, 1, 0, 2, 2),
        {**_BART_FIXED, "norm_first": False}, _BART_TASKS, _ENCODER_DECODER_SUPPORTED),
    "mbart": Family(
        BARTConfig, "MBart", "model.", _bart(50_265, 1, 0, 2, None),
        {**_BART_FIXED, "norm_first": True}, _BART_TASKS, _ENCODER_DECODER_SUPPORTED),
    "marian": Family(
        TransformerConfig, "Marian", "model.", _bart(58_101, 58_100, None, 0, 58_100),
        {**_SINUSOIDAL_FIXED, "norm_first": False}, {"seq2seq_lm": "MTModel", "base": "Model"},
        {**_SINUSOIDAL_SUPPORTED, "share_encoder_decoder_embeddings": True,
         "normalize_before": False}),
    "pegasus": Family(
        TransformerConfig, "Pegasus", "model.", _bart(50_265, 0, None, 1, 0),
        {**_SINUSOIDAL_FIXED, "norm_first": True}, _tasks("seq2seq_lm base"),
        _SINUSOIDAL_SUPPORTED),
}


def get_family(model_type: Any) -> Family:
    """The family with the given `model_type`; ValueError if it is not supported."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"unsupported model_type {model_type!r} in config.json; supported: "
                         f"{', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def resolve_task(name: str, model_type: str) -> str:
    """The task for the name of a task, of a class in Transformers or of a pipeline.

    "classification", "BertForSequenceClassification" and "text-classification" are the same task.
    """
    family = FAMILIES[model_type]
    key = re.sub(r"[^a-z0-9]", "", str(name).lower())
    key = re.sub(r"^translation.*to.*", "translation", key)  # "translation_en_to_de"
    key = re.sub(rf"^(tf|flax)?{family.class_prefix.lower()}(?=.)", "", key)
    task = _TASK_ALIASES.get(key) or _TASK_ALIASES.get(key.removeprefix("for"))
    if task == "base" and "base" not in family.class_suffixes:
        task = "encoder"
    if task is None:
        known = [*family.class_suffixes,
                 *(family.class_prefix + suffix for suffix in family.class_suffixes.values())]
        raise ValueError(f"unknown task {name!r} for a {model_type} checkpoint; "
                         f"{did_you_mean(name, known)}")
    hf_class_name(model_type, task)  # raises ValueError if it is not supported
    return task


def hf_class_name(model_type: str, task: str) -> str:
    """Name of the class in Transformers for a task; ValueError if the family has no such class."""
    family = FAMILIES[model_type]
    if task not in family.class_suffixes:
        raise ValueError(f"unsupported task {task} for {model_type}; supported: "
                         f"{', '.join(family.class_suffixes)}")
    return family.class_prefix + family.class_suffixes[task]


# Conversion of config.json ------------------------------------------------------------------------


def config_from_hf(hf_config: dict[str, Any], **changes) -> Config:
    """Converts the fields of a config.json to a config of this library.

    Those of generation_config.json are in the field "generation_config"; `changes` are fields of
    the result. ValueError if the family or the value of a field is invalid or not supported.
    """
    model_type = hf_config.get("model_type")
    family = get_family(model_type)
    for name, supported in family.supported_values.items():
        if hf_config.get(name, supported) != supported:
            raise ValueError(f"unsupported {name} {hf_config[name]!r} in config.json; supported: "
                             f"{supported!r}")
    values = family.fixed_fields | {name: hf_config.get(hf_field, default)
                                    for name, (hf_field, default) in family.fields.items()}
    activation = values["activation"]
    if not isinstance(activation, str) or activation not in family.activations:
        raise ValueError(f"unsupported activation {activation!r} in config.json; "
                         f"supported: {', '.join(family.activations)}")
    values["activation"] = family.activations[activation]
    # Other fields are computed from these, so their types are checked here.
    for name in ("d_model", "max_length", "pad_token_id"):
        if type(values[name]) is not int and (name != "pad_token_id" or values[name] is not None):
            raise ValueError(f"{family.fields[name][0]} in config.json is {values[name]!r}; "
                             "it must be an integer")
    if values.get("mlp_dim") is None:
        values["mlp_dim"] = 4 * values["d_model"]
    if family.is_roberta:
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


def config_to_hf(model: Model) -> dict[str, Any]:
    """Converts the config and task of a model to the fields of config.json.

    If the model was loaded from a checkpoint (`hf_config`), only fields whose values have changed
    are updated; all other fields of the checkpoint's config.json are kept. ValueError if the family
    does not support the task or the value of a field.
    """
    config = model.config
    original = json.loads(model.hf_config) if model.hf_config else {}
    model_type = original.get("model_type") or _infer_model_type(config)
    _check_supported(config, model_type)
    unchanged = _hf_fields(config_from_hf(original), model_type).items() if original else ()
    hf_config = original | {"model_type": model_type} | {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in _hf_fields(config, model_type).items() if (name, value) not in unchanged}
    hf_config["architectures"] = [hf_class_name(model_type, model.task)]
    if (model.task in ("classification", "token_classification")
            and config_num_labels(hf_config) != model.num_classes):
        label_names = [f"LABEL_{i}" for i in range(model.num_classes)]
        hf_config["id2label"] = {str(i): name for i, name in enumerate(label_names)}
        hf_config["label2id"] = {name: i for i, name in enumerate(label_names)}
        hf_config.pop("num_labels", None)
    return hf_config


def _hf_fields(config: Config, model_type: str) -> dict[str, Any]:
    """The fields of config.json that describe a config."""
    family = FAMILIES[model_type]
    hf_fields = {name: hf_field for name, (hf_field, _) in family.fields.items()}
    values = {name: getattr(config, name) for name in hf_fields}
    hf_activations = {name: hf_name for hf_name, name in reversed(family.activations.items())}
    if config.activation not in hf_activations:
        raise ValueError(f"unsupported activation {config.activation!r} for {model_type}; "
                         f"supported: {', '.join(hf_activations)}")
    values["activation"] = hf_activations[config.activation]
    # If a decoder size is None, the decoder has the size of the encoder.
    for decoder_name, encoder_name in (("num_decoder_layers", "num_layers"),
                                       ("num_decoder_heads", "num_heads"),
                                       ("decoder_mlp_dim", "mlp_dim")):
        if values.get(decoder_name, 0) is None:
            values[decoder_name] = getattr(config, encoder_name)
    if "scale_embedding" in values:
        values["scale_embedding"] = config.embedding_scale != 1
    if family.is_roberta:
        values["max_length"] = config.max_length + config.position_offset
    values = {hf_fields[name]: value for name, value in values.items()}
    return values | ({"decoder_vocab_size": config.vocab_size} if model_type == "marian" else {})


def config_num_labels(hf_config: dict[str, Any]) -> int:
    """Number of labels that a config.json defines, or else the default of Transformers."""
    if hf_config.get("id2label"):
        return len(hf_config["id2label"])
    default = 3 if hf_config.get("model_type") == "bart" else 2
    return hf_config.get("num_labels") or hf_config.get("_num_labels") or default


def _infer_model_type(config: Config) -> str:
    """The first family that supports a config that was not loaded from a checkpoint."""
    candidates = [model_type for model_type, family in FAMILIES.items()
                  if type(config) is family.config_class]
    for model_type in candidates:
        if not _mismatched_fields(config, model_type):
            return model_type
    # `_check_supported` will name the mismatch with one family.
    is_gpt1 = type(config) is GPTConfig and not config.norm_first
    return "openai-gpt" if is_gpt1 else candidates[0]


def _mismatched_fields(config: Config, model_type: str) -> dict[str, Any]:
    """Name -> required value, of the fields whose values a family does not support."""
    family = FAMILIES[model_type]
    required = {"residual": True, **family.fixed_fields}
    if family.is_roberta:
        required["position_offset"] = (config.pad_token_id or 0) + 1
    if model_type == "openai-gpt":
        required["mlp_dim"] = 4 * config.d_model
    required |= {name: family.supported_values[hf_field]
                 for name, (hf_field, _) in family.fields.items()
                 if hf_field in family.supported_values}
    mismatched = {name: value for name, value in required.items()
                  if name not in (*INIT_ONLY_FIELDS, "scale_embedding")
                  and getattr(config, name) != value}
    if "scale_embedding" not in family.fields and config.embedding_scale != 1:
        mismatched["scale_embedding"] = False
    return mismatched


def _check_supported(config: Config, model_type: str) -> None:
    for name, value in _mismatched_fields(config, model_type).items():
        raise ValueError(f"unsupported {name} {getattr(config, name)!r} for {model_type} "
                         f"checkpoints; supported: {value!r}")
