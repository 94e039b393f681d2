"""The families of checkpoints: what their configuration says in our words, and their heads.

What a field of theirs is not given in config.json is what the reference takes it to be.
"""

import difflib
import json
import re
from typing import Any, NamedTuple

from transformer_jax.models import BARTConfig, BERTConfig, Config, GPTConfig, TransformerConfig

_GELU = {"gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh",
         "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
         "silu": "swish", "swish": "swish", "tanh": "tanh"}
_GPT1_GELU = {"gelu": "gelu_tanh", "relu": "relu", "silu": "swish", "swish": "swish"}

# Our field -> (their field, the reference's default).
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SEQ2SEQ_IDS = ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")


def _fields(sizes: dict, pad=None, bos=None, eos=None) -> dict[str, tuple[str, Any]]:
    ids = dict(zip(_IDS, (pad, bos, eos)))
    return {"tie_embeddings": ("tie_word_embeddings", True), **sizes,
            **{name: (name, value) for name, value in ids.items()}}


def _gpt(vocab_size: int, max_length: int, activation: str, ids) -> dict:
    return _fields({
        "vocab_size": ("vocab_size", vocab_size), "max_length": ("n_positions", max_length),
        "num_layers": ("n_layer", 12), "d_model": ("n_embd", 768), "num_heads": ("n_head", 12),
        "dropout_rate": ("resid_pdrop", 0.1), "attention_dropout_rate": ("attn_pdrop", 0.1),
        "activation": activation, "norm_epsilon": ("layer_norm_epsilon", 1e-5),
        "init_std": ("initializer_range", 0.02),
    }, *ids)


def _bert(vocab_size: int, pad: int, bos=None, eos=None) -> dict:
    return _fields({
        "vocab_size": ("vocab_size", vocab_size), "max_length": ("max_position_embeddings", 512),
        "num_layers": ("num_hidden_layers", 12), "d_model": ("hidden_size", 768),
        "num_heads": ("num_attention_heads", 12), "mlp_dim": ("intermediate_size", 3072),
        "dropout_rate": ("hidden_dropout_prob", 0.1),
        "attention_dropout_rate": ("attention_probs_dropout_prob", 0.1),
        "activation": ("hidden_act", "gelu"), "num_segments": ("type_vocab_size", 2),
        "norm_epsilon": ("layer_norm_eps", 1e-12), "init_std": ("initializer_range", 0.02),
    }, pad, bos, eos)


def _bart(vocab_size: int, pad: int, bos: int | None, eos: int, start: int | None) -> dict:
    ids = dict(zip(_SEQ2SEQ_IDS, (start, None, eos)))
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
    }, pad, bos, eos), **{name: (name, value) for name, value in ids.items()}}


class Family(NamedTuple):
    """`constants` are what the family always is in our words; `refused` what its configuration may
    ask for that is not here, by field, with the only value that is."""

    kind: type[Config]
    prefix: str  # of the reference's class names
    base: str  # of the names of tensors, see `tables`
    fields: dict
    constants: dict
    heads: dict[str, str]  # task -> the end of the class's name
    refused: dict = {}  # noqa: RUF012


_GPT_HEADS = {"causal_lm": "LMHeadModel", "base": "Model",
              "classification": "ForSequenceClassification"}
_GPT2_HEADS = {**_GPT_HEADS, "token_classification": "ForTokenClassification",
               "question_answering": "ForQuestionAnswering"}
_ENCODER_HEADS = {
    "masked_lm": "ForMaskedLM", "classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "question_answering": "ForQuestionAnswering", "multiple_choice": "ForMultipleChoice",
}
_BASE = {"base": "Model", "encoder": "Model"}
_ROBERTA_HEADS = {**_BASE, **_ENCODER_HEADS}
_BART_HEADS = {"seq2seq_lm": "ForConditionalGeneration", "base": "Model",
               "classification": "ForSequenceClassification",
               "question_answering": "ForQuestionAnswering"}

# Untied, the reference's BERT has two output biases, one of which it does not use.
_NO_DECODER = {"tie_word_embeddings": True, "is_decoder": False, "add_cross_attention": False,
               "position_embedding_type": "absolute"}
_ROBERTA = _bert(50_265, 1, 0, 2)
_SEQ2SEQ_ONLY = {"is_decoder": False, "is_encoder_decoder": True, "tie_word_embeddings": True}
_MARIAN = {"positions": "sinusoidal_halves", "embed_norm": False, "norm_epsilon": 1e-5,
           "output_bias": True, "initializer": "normal", "position_offset": 0}
_BART_ALWAYS = {"positions": "learned", "position_offset": 2, "embed_norm": True,
                "norm_epsilon": 1e-5, "output_bias": True, "initializer": "normal"}

FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        GPTConfig, "GPT2", "transformer.",
        {**_gpt(50_257, 1024, ("activation_function", "gelu_new"), (None, 50_256, 50_256)),
         "mlp_dim": ("n_inner", None)},
        {"norm_first": True, "positions": "learned", "position_offset": 0, "attention_window": None,
         "scale_residual_init": True, "classifier_bias": False, "scale_embedding": None},
        _GPT2_HEADS,
        {"add_cross_attention": False, "reorder_and_upcast_attn": False,
         "scale_attn_by_inverse_layer_idx": False, "scale_attn_weights": True}),
    "openai-gpt": Family(
        GPTConfig, "OpenAIGPT", "transformer.",
        _gpt(40_478, 512, ("afn", "gelu"), (None, None, None)),
        {"norm_first": False, "positions": "learned", "position_offset": 0, "attention_window": None,
         "classifier_bias": False, "scale_embedding": None},
        _GPT_HEADS),
    "bert": Family(
        BERTConfig, "Bert", "bert.", _bert(30_522, 0),
        {"norm_first": False, "positions": "learned", "position_offset": 0,
         "pooler_activation": "tanh", "pooling": "first", "scale_embedding": None,
         "initializer": "truncated_normal"},
        {"pretraining": "ForPreTraining", "next_sentence": "ForNextSentencePrediction",
         **_BASE, **_ENCODER_HEADS},
        _NO_DECODER),
    **{name: Family(
        BERTConfig, prefix, "roberta.", _ROBERTA,
        {"norm_first": False, "positions": "learned", "pooler_activation": "tanh",
         "pooling": "first", "scale_embedding": None, "initializer": "truncated_normal"},
        _ROBERTA_HEADS, _NO_DECODER)
       for name, prefix in (("roberta", "Roberta"), ("xlm-roberta", "XLMRoberta"),
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
        {"encoder": "Model", **_ENCODER_HEADS}),
    "bart": Family(
        BARTConfig, "Bart", "model.", _bart(50_265, 1, 0, 2, 2),
        {**_BART_ALWAYS, "norm_first": False}, _BART_HEADS, _SEQ2SEQ_ONLY),
    "mbart": Family(
        BARTConfig, "MBart", "model.", _bart(50_265, 1, 0, 2, None),
        {**_BART_ALWAYS, "norm_first": True}, _BART_HEADS, _SEQ2SEQ_ONLY),
    "marian": Family(
        TransformerConfig, "Marian", "model.", _bart(58_101, 58_100, None, 0, 58_100),
        {**_MARIAN, "norm_first": False},
        {"seq2seq_lm": "MTModel", "base": "Model"},
        {**_SEQ2SEQ_ONLY, "share_encoder_decoder_embeddings": True, "normalize_before": False,
         "normalize_embedding": False, "static_position_embeddings": True}),
    "pegasus": Family(
        TransformerConfig, "Pegasus", "model.", _bart(50_265, 0, None, 1, 0),
        {**_MARIAN, "norm_first": True},
        {"seq2seq_lm": "ForConditionalGeneration", "base": "Model"},
        {**_SEQ2SEQ_ONLY, "normalize_embedding": False, "static_position_embeddings": True}),
}

# What people call a task, without case, spaces and dashes: names of ours, the ends of the
# reference's class names, and those of its pipelines.
_CALLED = {
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
TASKS = {name: task for task, names in _CALLED.items() for name in names}


def find_family(model_type: Any) -> Family:
    """Raises ValueError for a family that is not here."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = difflib.get_close_matches(str(model_type), FAMILIES, n=3) or FAMILIES
        raise ValueError(f"config.json has model_type {model_type!r}, which is not here; "
                         f"those near are {', '.join(near)}")
    return FAMILIES[model_type]


def find_task(name: str, model_type: str) -> str:
    """Our name of a task, from ours, a class of the reference or a pipeline.

    Raises:
        ValueError: it is unknown, or the family has no such head; the message has near names.
    """
    family = FAMILIES[model_type]
    key = re.sub(r"[^a-z0-9]", "", str(name).lower())
    key = re.sub(r"^translation.*to.*", "translation", key)  # "translation_en_to_de"
    key = re.sub(rf"^(tf|flax)?{family.prefix.lower()}(?=.)", "", key)
    task = TASKS.get(key) or TASKS.get(key.removeprefix("for"))
    if task == "base" and "base" not in family.heads:
        task = "encoder"
    if task is None:
        known = [*family.heads, *(family.prefix + end for end in family.heads.values())]
        near = difflib.get_close_matches(str(name), known, n=3) or family.heads
        raise ValueError(f"unknown task {name!r} for a checkpoint of {model_type}; did you mean "
                         f"{', '.join(near)}?")
    if task not in family.heads:
        raise ValueError(f"{model_type} has no {task} ({name!r}); choose one of "
                         f"{', '.join(family.heads)}")
    return task


def class_name(model_type: str, task: str) -> str:
    """The reference's class for a task."""
    family = FAMILIES[model_type]
    if task not in family.heads:
        raise ValueError(f"{model_type} has no {task}; choose one of {', '.join(family.heads)}")
    return family.prefix + family.heads[task]


def _activations(model_type: str) -> dict[str, str]:
    return _GPT1_GELU if model_type == "openai-gpt" else _GELU


def _is_roberta(model_type: str) -> bool:
    return FAMILIES[model_type].base == "roberta."


def read_config(values: dict[str, Any], **changes) -> Config:
    """Our config for the fields of a config.json; `changes` are fields of ours.

    Raises:
        ValueError: another family, or something that its models here do not have.
    """
    model_type = values.get("model_type")
    family = find_family(model_type)
    for name, only in family.refused.items():
        if values.get(name, only) != only:
            raise ValueError(f"config.json has {name} {values[name]!r}; only {only!r} is here")
    ours = {**family.constants}
    for name, (theirs, default) in family.fields.items():
        ours[name] = values.get(theirs, default)
    activations = _activations(model_type)
    if not isinstance(ours["activation"], str) or ours["activation"] not in activations:
        raise ValueError(f"config.json has the activation {ours['activation']!r}; those here are "
                         f"{', '.join(activations)}")
    ours["activation"] = activations[ours["activation"]]
    for name in ("d_model", "max_length", "pad_token_id"):  # which others are computed from
        value = ours.get(name)
        if name in ours and type(value) is not int and not (name == "pad_token_id"
                                                            and value is None):
            raise ValueError(f"config.json has {family.fields.get(name, (name,))[0]} {value!r}; it "
                             "must be a whole number")
    if ours.get("mlp_dim") is None:
        ours["mlp_dim"] = 4 * ours["d_model"]
    if _is_roberta(model_type):
        # Positions are numbered from the padding's id on.
        ours["position_offset"] = (ours["pad_token_id"] or 0) + 1
        ours["max_length"] -= ours["position_offset"]
    if model_type == "marian" and values.get("decoder_vocab_size") not in (None,
                                                                           ours["vocab_size"]):
        raise ValueError(f"config.json has vocab_size {ours['vocab_size']} and decoder_vocab_size "
                         f"{values['decoder_vocab_size']}; only one vocabulary for both is here")
    generation = values.get("generation_config", {})
    if not isinstance(generation, dict):
        raise ValueError(f"config.json has generation_config {generation!r}; it must be an object")
    for name in (*_IDS, *_SEQ2SEQ_IDS):
        # What a model writes is generation_config.json's to say, what it reads config.json's.
        if name in ours and (ours[name] is None or name in _SEQ2SEQ_IDS):
            ours[name] = generation.get(name, ours[name])
        if isinstance(ours.get(name), list):
            ours[name] = tuple(ours[name])
    return family.kind(**{**ours, "source": json.dumps(values), **changes})


def _to_fields(config: Config, model_type: str) -> dict[str, Any]:
    """What a config.json says of `config`."""
    family = FAMILIES[model_type]
    theirs = {there: getattr(config, ours) for ours, (there, _) in family.fields.items()}
    names = {ours: there for ours, (there, _) in family.fields.items()}
    back = {ours: there for there, ours in reversed(_activations(model_type).items())}
    if config.activation not in back:
        raise ValueError(f"{model_type} has no activation {config.activation!r}; those it has are "
                         f"{', '.join(back)}")
    theirs[names["activation"]] = back[config.activation]
    for side in ("layers", "heads", "mlp_dim"):
        ours = {"layers": "num_decoder_layers", "heads": "num_decoder_heads",
                "mlp_dim": "decoder_mlp_dim"}[side]
        if ours in names and theirs[names[ours]] is None:
            theirs[names[ours]] = getattr(config, ours.replace("_decoder", "")
                                          .replace("decoder_", ""))
    if names.get("scale_embedding"):
        theirs["scale_embedding"] = config.embedding_scale != 1
    if _is_roberta(model_type):
        theirs[names["max_length"]] = config.max_length + config.position_offset
    if "decoder_vocab_size" in names or model_type == "marian":
        theirs["decoder_vocab_size"] = config.vocab_size
    return theirs


def write_config(config: Config, task: str, num_classes: int) -> dict[str, Any]:
    """The fields of config.json, those of the source wherever nothing has changed.

    Raises:
        ValueError: no family of checkpoints has such a model; the message names the field.
    """
    values = json.loads(config.source or "{}")
    model_type = values.get("model_type") or _choose(config)
    values["model_type"] = model_type
    _check_constants(config, model_type)
    now = _to_fields(config, model_type)
    then = {}
    if config.source:
        then = _to_fields(read_config(json.loads(config.source)), model_type)
    missing = object()
    values |= {name: list(value) if isinstance(value, tuple) else value
               for name, value in now.items() if then.get(name, missing) != value}
    values["architectures"] = [class_name(model_type, task)]
    if task in ("classification", "token_classification") and num_labels(values) != num_classes:
        names = [f"LABEL_{i}" for i in range(num_classes)]
        values["id2label"] = {str(i): name for i, name in enumerate(names)}
        values["label2id"] = {name: i for i, name in enumerate(names)}
        values.pop("num_labels", None)
    return values


def num_labels(values: dict[str, Any]) -> int:
    """How many labels a config.json speaks of."""
    if values.get("id2label"):
        return len(values["id2label"])
    default = 3 if values.get("model_type") == "bart" else 2
    return values.get("num_labels") or values.get("_num_labels") or default


def _choose(config: Config) -> str:
    """The family for a model of our own."""
    for model_type, family in FAMILIES.items():
        if type(config) is family.kind and not _unlike(config, model_type):
            return model_type
    nearest = next(name for name, family in FAMILIES.items() if type(config) is family.kind)
    if type(config) is GPTConfig and not config.norm_first:
        nearest = "openai-gpt"
    _check_constants(config, nearest)
    raise AssertionError("unreachable")


# Only how a model begins; a checkpoint is past that.
_BEGINNING = {"initializer", "init_std", "scale_residual_init", "classifier_bias", "output_bias"}


def _unlike(config: Config, model_type: str) -> dict[str, Any]:
    """Fields in which `config` is not of the family -> what they would have to be."""
    family = FAMILIES[model_type]
    wanted = {"residual": True, **family.constants}
    wanted = {name: value for name, value in wanted.items() if name not in _BEGINNING}
    if wanted.get("scale_embedding", 0) is None:
        del wanted["scale_embedding"]
    if _is_roberta(model_type):
        wanted["position_offset"] = (config.pad_token_id or 0) + 1
    if model_type == "openai-gpt":
        wanted["mlp_dim"] = 4 * config.d_model
    for name in family.refused:
        ours = next((o for o, (there, _) in family.fields.items() if there == name), None)
        if ours is not None:
            wanted[ours] = family.refused[name]
    unlike = {name: value for name, value in wanted.items() if getattr(config, name) != value}
    if "scale_embedding" not in family.fields and config.embedding_scale != 1:
        unlike["scale_embedding"] = False
    return unlike


def _check_constants(config: Config, model_type: str) -> None:
    for name, value in _unlike(config, model_type).items():
        raise ValueError(f"{name} is {getattr(config, name)!r}, but checkpoints of {model_type} "
                         f"have only {value!r}; no family has such a model")
