"""Model families of Hugging Face checkpoints: their config fields, tasks and class names."""

import difflib
import re
from typing import Any, NamedTuple

from transformer_jax.models import BARTConfig, BERTConfig, Config, GPTConfig, TransformerConfig

# Fields with the same name in config.json and in `Config`.
TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
SEQ2SEQ_TOKEN_IDS = (  # used only in generation with encoder-decoders
    "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")

# Field of a `Config` -> (field of config.json, its default in Transformers).
Fields = dict[str, tuple[str, Any]]

# Functions that return the fields of similar families, given the defaults of one family in
# Transformers.


def _fields(fields: Fields, pad=None, bos=None, eos=None) -> Fields:
    """`fields`, together with the fields that all families have."""
    ids = dict(zip(TOKEN_IDS, (pad, bos, eos)))
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


class Family(NamedTuple):
    """A family of models in Transformers, identified by the `model_type` of config.json.

    Attributes:
        config_class: class of the models' configs in this library.
        class_prefix: prefix of the class names in Transformers, such as "Bert".
        base_prefix: prefix of the tensor names of the base model in checkpoints with a head, such
            as "bert."; see `weight_maps`.
        fields: field of `config_class` -> (field of config.json, its default in Transformers).
        fixed_fields: fields of `config_class` that have the same value in all models of the family.
        class_suffixes: task -> suffix of the class name in Transformers.
        supported_values: field of config.json -> the only value that this library supports.
    """

    config_class: type[Config]
    class_prefix: str
    base_prefix: str
    fields: Fields
    fixed_fields: dict[str, Any]
    class_suffixes: dict[str, str]
    supported_values: dict[str, Any] = {}  # noqa: RUF012


_GPT_CLASS_SUFFIXES = {"causal_lm": "LMHeadModel", "base": "Model",
                       "classification": "ForSequenceClassification"}
_GPT2_CLASS_SUFFIXES = {**_GPT_CLASS_SUFFIXES, "token_classification": "ForTokenClassification",
                        "question_answering": "ForQuestionAnswering"}
_ENCODER_CLASS_SUFFIXES = {
    "masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering", "multiple_choice": "ForMultipleChoice",
}
_BASE_CLASS_SUFFIXES = {"base": "Model", "encoder": "Model"}
_ROBERTA_CLASS_SUFFIXES = {**_BASE_CLASS_SUFFIXES, **_ENCODER_CLASS_SUFFIXES}
_BART_CLASS_SUFFIXES = {"seq2seq_lm": "ForConditionalGeneration", "base": "Model",
                        "classification": "ForSequenceClassification",
                        "question_answering": "ForQuestionAnswering"}

# BERT must have tied embeddings, because without them its class in Transformers has two output
# biases, one of which is not used.
_ENCODER_SUPPORTED = {"tie_word_embeddings": True, "is_decoder": False,
                      "add_cross_attention": False, "position_embedding_type": "absolute"}
_ENCODER_DECODER_SUPPORTED = {"is_decoder": False, "is_encoder_decoder": True,
                              "tie_word_embeddings": True}
_ROBERTA_FIELDS = _bert(50_265, 1, 0, 2)
_SINUSOIDAL_FIXED_FIELDS = {
    "positions": "sinusoidal_halves", "embed_norm": False, "norm_epsilon": 1e-5,
    "output_bias": True, "initializer": "normal", "position_offset": 0}
_BART_FIXED_FIELDS = {"positions": "learned", "position_offset": 2, "embed_norm": True,
                      "norm_epsilon": 1e-5, "output_bias": True, "initializer": "normal"}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        GPTConfig, "GPT2", "transformer.",
        {**_gpt(50_257, 1024, ("activation_function", "gelu_new"), (None, 50_256, 50_256)),
         "mlp_dim": ("n_inner", None)},
        {"norm_first": True, "positions": "learned", "position_offset": 0,
         "attention_window": None, "scale_residual_init": True, "classifier_bias": False,
         "scale_embedding": None},
        _GPT2_CLASS_SUFFIXES,
        {"add_cross_attention": False, "reorder_and_upcast_attn": False,
         "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}),
    "openai-gpt": Family(
        GPTConfig, "OpenAIGPT", "transformer.",
        _gpt(40_478, 512, ("afn", "gelu"), (None, None, None)),
        {"norm_first": False, "positions": "learned", "position_offset": 0,
         "attention_window": None, "classifier_bias": False, "scale_embedding": None},
        _GPT_CLASS_SUFFIXES),
    "bert": Family(
        BERTConfig, "Bert", "bert.", _bert(30_522, 0),
        {"norm_first": False, "positions": "learned", "position_offset": 0,
         "pooler_activation": "tanh", "pooling": "first", "scale_embedding": None,
         "initializer": "truncated_normal"},
        {"pretraining": "ForPreTraining", "next_sentence": "ForNextSentencePrediction",
         **_BASE_CLASS_SUFFIXES, **_ENCODER_CLASS_SUFFIXES},
        _ENCODER_SUPPORTED),
    **{name: Family(
        BERTConfig, class_prefix, "roberta.", _ROBERTA_FIELDS,
        {"norm_first": False, "positions": "learned", "pooler_activation": "tanh",
         "pooling": "first", "scale_embedding": None, "initializer": "truncated_normal"},
        _ROBERTA_CLASS_SUFFIXES, _ENCODER_SUPPORTED)
       for name, class_prefix in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"),
                                  ("camembert", "Camembert"))},
    "distilbert": Family(
        BERTConfig, "DistilBert", "distilbert.",
        _fields({
            "vocab_size": ("vocab_size", 30_522),
            "max_length": ("max_position_embeddings", 512), "num_layers": ("n_layers", 6),
            "d_model": ("dim", 768), "num_heads": ("n_heads", 12), "mlp_dim": ("hidden_dim", 3072),
            "dropout_rate": ("dropout", 0.1),
            "attention_dropout_rate": ("attention_dropout", 0.1),
            "activation": ("activation", "gelu"), "init_std": ("initializer_range", 0.02),
        }, 0),
        {"norm_first": False, "positions": "learned", "position_offset": 0, "num_segments": 0,
         "pooler_activation": "relu", "pooling": "first", "norm_epsilon": 1e-12,
         "scale_embedding": None, "initializer": "truncated_normal"},
        {"encoder": "Model", **_ENCODER_CLASS_SUFFIXES}),
    "bart": Family(
        BARTConfig, "Bart", "model.", _bart(50_265, 1, 0, 2, 2),
        {**_BART_FIXED_FIELDS, "norm_first": False}, _BART_CLASS_SUFFIXES,
        _ENCODER_DECODER_SUPPORTED),
    "mbart": Family(
        BARTConfig, "MBart", "model.", _bart(50_265, 1, 0, 2, None),
        {**_BART_FIXED_FIELDS, "norm_first": True}, _BART_CLASS_SUFFIXES,
        _ENCODER_DECODER_SUPPORTED),
    "marian": Family(
        TransformerConfig, "Marian", "model.", _bart(58_101, 58_100, None, 0, 58_100),
        {**_SINUSOIDAL_FIXED_FIELDS, "norm_first": False},
        {"seq2seq_lm": "MTModel", "base": "Model"},
        {**_ENCODER_DECODER_SUPPORTED, "share_encoder_decoder_embeddings": True,
         "normalize_before": False, "normalize_embedding": False,
         "static_position_embeddings": True}),
    "pegasus": Family(
        TransformerConfig, "Pegasus", "model.", _bart(50_265, 0, None, 1, 0),
        {**_SINUSOIDAL_FIXED_FIELDS, "norm_first": True},
        {"seq2seq_lm": "ForConditionalGeneration", "base": "Model"},
        {**_ENCODER_DECODER_SUPPORTED, "normalize_embedding": False,
         "static_position_embeddings": True}),
}

# Task -> all names of the task, in lower case without spaces and punctuation: its name in this
# library, suffixes of class names in Transformers, and names of pipelines.
_ALIASES = {
    "base": ("base", "model", "featureextraction"),
    "encoder": ("encoder",),
    "causal_lm": ("causallm", "lmhead", "lmheadmodel", "textgeneration"),
    "pretraining": ("pretraining",),
    "masked_lm": ("maskedlm", "fillmask"),
    "next_sentence": ("nextsentence", "nextsentenceprediction"),
    "seq2seq_lm": ("seq2seqlm", "conditionalgeneration", "mtmodel", "summarization", "translation",
                   "text2textgeneration"),
    "classification": ("classification", "sequenceclassification", "textclassification",
                       "sentimentanalysis"),
    "token_classification": ("tokenclassification", "ner"),
    "question_answering": ("questionanswering",),
    "multiple_choice": ("multiplechoice",),
}
TASK_ALIASES = {alias: task for task, aliases in _ALIASES.items() for alias in aliases}


def get_family(model_type: Any) -> Family:
    """Returns the family with the given `model_type`.

    Raises:
        ValueError: the family is not supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"unsupported model_type {model_type!r} in config.json; supported: "
                         f"{', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def resolve_task(name: str, model_type: str) -> str:
    """Converts a task name to the name of the task in this library.

    Args:
        name: a task of this library ("classification"), a class of Transformers
            ("BertForSequenceClassification") or a pipeline ("text-classification").
        model_type: the model family.

    Raises:
        ValueError: the task is unknown, or the family does not support it.

    Example:

        >>> resolve_task("BertForSequenceClassification", "bert")
        'classification'
        >>> resolve_task("fill-mask", "roberta")
        'masked_lm'
    """
    family = FAMILIES[model_type]
    key = re.sub(r"[^a-z0-9]", "", str(name).lower())
    key = re.sub(r"^translation.*to.*", "translation", key)  # "translation_en_to_de"
    key = re.sub(rf"^(tf|flax)?{family.class_prefix.lower()}(?=.)", "", key)
    task = TASK_ALIASES.get(key) or TASK_ALIASES.get(key.removeprefix("for"))
    if task == "base" and "base" not in family.class_suffixes:
        task = "encoder"
    if task is None:
        known = [*family.class_suffixes,
                 *(family.class_prefix + suffix for suffix in family.class_suffixes.values())]
        near = difflib.get_close_matches(str(name), known, n=3) or family.class_suffixes
        raise ValueError(f"unknown task {name!r} for a {model_type} checkpoint; did you mean "
                         f"{', '.join(near)}?")
    _check_task(task, model_type)
    return task


def _check_task(task: str, model_type: str) -> None:
    suffixes = FAMILIES[model_type].class_suffixes
    if task not in suffixes:
        raise ValueError(f"unsupported task {task} for {model_type}; supported: "
                         f"{', '.join(suffixes)}")


def hf_class_name(model_type: str, task: str) -> str:
    """Name of the class in Transformers for a task.

    Raises:
        ValueError: the family does not support the task.

    Example:

        >>> hf_class_name("gpt2", "causal_lm")
        'GPT2LMHeadModel'
    """
    _check_task(task, model_type)
    family = FAMILIES[model_type]
    return family.class_prefix + family.class_suffixes[task]
