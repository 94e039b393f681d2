"""Mapping between the tensors of Hugging Face checkpoints and the parameters of this library.

A `WeightMap` maps one tensor to one or several parameters. Loading and saving use the same tables.
In tensor names, "{base}" is a placeholder for the prefix of the base model, such as "bert."; the
prefix is empty in checkpoints without a head. In names and paths, "{i}" is a placeholder for the
index of a layer.

PyTorch's `Linear` stores its weight as [out, in], and the `Conv1D` of GPT as [in, out]; neither has
head axes. In this library, the kernels of query, key and value are [D, N, H], and that of the
attention output is [N, H, D].
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from transformer_jax.models import Config, Model, TransformerConfig, init_params
from transformer_jax.nn.layers import sinusoidal_positions
from transformer_jax.tree import flatten_paths


class WeightMap(NamedTuple):
    """Mapping between one checkpoint tensor and one or several parameters.

    The head axes of each parameter are merged, and the resulting matrices or vectors are
    concatenated along the last axis.

    Attributes:
        hf_name: name of the tensor.
        paths: paths of the parameters.
        is_transposed: whether the tensor is stored as [out, in].
        is_row: whether the tensor of a vector parameter is stored as [1, size].
        aliases: other names of the tensor. A checkpoint needs to contain only one of the names.

    Example:

        >>> weight_map = WeightMap("fc.weight", ("mlp/wi/kernel",), is_transposed=True)
        >>> weight_map.hf_shape({"mlp/wi/kernel": (8, 32)})
        (32, 8)
    """

    hf_name: str
    paths: tuple[str, ...]
    is_transposed: bool = False
    is_row: bool = False
    aliases: tuple[str, ...] = ()

    def hf_shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Shape of the tensor, given the shapes of the parameters by path."""
        flat = [_flat_shape(path, shapes[path]) for path in self.paths]
        shape = (*flat[0][:-1], sum(s[-1] for s in flat))
        return shape[::-1] if self.is_transposed else (1, *shape) if self.is_row else shape

    def to_params(self, tensor: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
        """Splits the tensor into parameters, in the order of `paths`. They may be views of it."""
        matrix = tensor.T if self.is_transposed else tensor[0] if self.is_row else tensor
        ends = np.cumsum([_flat_shape(path, shapes[path])[-1] for path in self.paths])[:-1]
        return [part.reshape(shapes[path])
                for path, part in zip(self.paths, np.split(matrix, ends, axis=-1))]

    def to_hf(self, params: Sequence[np.ndarray]) -> np.ndarray:
        """Combines parameters, in the order of `paths`, into the tensor. Inverse of `to_params`."""
        flat = [param.reshape(_flat_shape(path, param.shape))
                for path, param in zip(self.paths, params)]
        matrix = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        return matrix.T if self.is_transposed else matrix[None] if self.is_row else matrix


def _flat_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter as a matrix or vector, with its head axes merged."""
    if path.endswith("/embedding"):
        return shape
    if path.endswith("/kernel"):
        num_input_axes = 2 if "attention/out/" in path else 1
        return (math.prod(shape[:num_input_axes]), math.prod(shape[num_input_axes:]))
    return (math.prod(shape),)


class PositionTable(NamedTuple):
    """A tensor of sinusoidal position embeddings.

    The model computes these embeddings, so the tensor corresponds to no parameter.
    """

    hf_name: str


def _norm(path: str, hf_name: str) -> list[WeightMap]:
    return [WeightMap(f"{hf_name}.weight", (f"{path}/scale",)),
            WeightMap(f"{hf_name}.bias", (f"{path}/bias",))]


def _linear(
    path: str | Sequence[str], hf_name: str, is_transposed: bool = True
) -> list[WeightMap]:
    paths = (path,) if isinstance(path, str) else path
    return [
        WeightMap(f"{hf_name}.weight", tuple(f"{path}/kernel" for path in paths), is_transposed),
        WeightMap(f"{hf_name}.bias", tuple(f"{path}/bias" for path in paths)),
    ]


def _embedding(path: str, hf_name: str, aliases: Sequence[str] = ()) -> WeightMap:
    return WeightMap(f"{hf_name}.weight", (f"{path}/embedding",), aliases=tuple(aliases))


def _gpt(token_embed: str, position_embed: str) -> list[WeightMap]:
    """Weight maps of a GPT decoder, given the tensor names of its embeddings."""
    layer, block = "decoder/layer_{i}", "{base}h.{i}"
    attention = f"{layer}/self_attention"
    qkv = [f"{attention}/{name}" for name in ("query", "key", "value")]
    return [
        _embedding("token_embed", f"{{base}}{token_embed}", ["lm_head.weight"]),
        _embedding("position_embed", f"{{base}}{position_embed}"),
        *_linear(qkv, f"{block}.attn.c_attn", is_transposed=False),
        *_linear(f"{attention}/out", f"{block}.attn.c_proj", is_transposed=False),
        *_norm(f"{layer}/attention_norm", f"{block}.ln_1"),
        *_linear(f"{layer}/mlp/wi", f"{block}.mlp.c_fc", is_transposed=False),
        *_linear(f"{layer}/mlp/wo", f"{block}.mlp.c_proj", is_transposed=False),
        *_norm(f"{layer}/mlp_norm", f"{block}.ln_2"),
    ]


def _encoder(hf_layers: str, hf_names: dict[str, str], hf_decoder: str) -> list[WeightMap]:
    """Weight maps of a BERT encoder.

    Args:
        hf_layers: tensor name prefix of the layers.
        hf_names: path of a module within a layer -> tensor name of the module within a layer.
        hf_decoder: tensor name of the output layer, which is tied to the token embedding.
    """
    maps = [
        _embedding("token_embed", "{base}embeddings.word_embeddings", [f"{hf_decoder}.weight"]),
        _embedding("position_embed", "{base}embeddings.position_embeddings"),
        _embedding("segment_embed", "{base}embeddings.token_type_embeddings"),
        *_norm("embed_norm", "{base}embeddings.LayerNorm"),
    ]
    for path, hf_name in hf_names.items():
        make_maps = _norm if path.endswith("norm") else _linear
        maps += make_maps(f"encoder/layer_{{i}}/{path}", f"{{base}}{hf_layers}.{{i}}.{hf_name}")
    return maps


_BERT = [
    *_encoder("encoder.layer", {
        "self_attention/query": "attention.self.query",
        "self_attention/key": "attention.self.key",
        "self_attention/value": "attention.self.value",
        "self_attention/out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp/wi": "intermediate.dense", "mlp/wo": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }, "cls.predictions.decoder"),
    *_linear("pooler", "{base}pooler.dense"),
]
_ROBERTA = [
    weight_map._replace(aliases=("lm_head.decoder.weight",)) if weight_map.aliases else weight_map
    for weight_map in _BERT]
_DISTILBERT = _encoder("transformer.layer", {
    "self_attention/query": "attention.q_lin", "self_attention/key": "attention.k_lin",
    "self_attention/value": "attention.v_lin", "self_attention/out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp/wi": "ffn.lin1", "mlp/wo": "ffn.lin2", "mlp_norm": "output_layer_norm",
}, "vocab_projector")


def _encoder_decoder(*extra: WeightMap) -> list[WeightMap]:
    """Weight maps of an encoder-decoder; `extra` are those that only some families have."""
    maps = [_embedding("token_embed", "{base}shared", [
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])]
    attentions = {"self_attention": "self_attn", "cross_attention": "encoder_attn"}
    projections = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
    for stack in ("encoder", "decoder"):
        layer, block = f"{stack}/layer_{{i}}", f"{{base}}{stack}.layers.{{i}}"
        for attention, hf_attention in attentions.items():
            for projection, hf_projection in projections.items():
                maps += _linear(f"{layer}/{attention}/{projection}",
                                f"{block}.{hf_attention}.{hf_projection}")
        maps += [
            *_norm(f"{layer}/attention_norm", f"{block}.self_attn_layer_norm"),
            *_norm(f"{layer}/cross_attention_norm", f"{block}.encoder_attn_layer_norm"),
            *_linear(f"{layer}/mlp/wi", f"{block}.fc1"),
            *_linear(f"{layer}/mlp/wo", f"{block}.fc2"),
            *_norm(f"{layer}/mlp_norm", f"{block}.final_layer_norm"),
        ]
    return [*maps, WeightMap("final_logits_bias", ("output/bias",), is_row=True), *extra]


def _both_stacks(path: str, hf_name: str, make_maps: Callable) -> list[WeightMap]:
    """Weight maps of a module in both stacks; "{}" in `path` is "encoder" or "decoder"."""
    return [weight_map for stack in ("encoder", "decoder")
            for weight_map in make_maps(path.format(stack), f"{{base}}{stack}.{hf_name}")]


_BART = _encoder_decoder(
    *_both_stacks("{}_position_embed", "embed_positions",
                  lambda path, hf_name: [_embedding(path, hf_name)]),
    *_both_stacks("{}_embed_norm", "layernorm_embedding", _norm),
)
_FINAL_NORMS = _both_stacks("{}/final_norm", "layer_norm", _norm)

# `model_type` of a family -> the weight maps of its models without a head.
BASE_WEIGHT_MAPS: dict[str, list[WeightMap]] = {
    "gpt2": [*_gpt("wte", "wpe"), *_norm("decoder/final_norm", "{base}ln_f")],
    "openai-gpt": _gpt("tokens_embed", "positions_embed"),
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _DISTILBERT,
    "bart": _BART,
    "mbart": [*_BART, *_FINAL_NORMS],
    "marian": _encoder_decoder(),
    "pegasus": _encoder_decoder(*_FINAL_NORMS),
}
# `model_type` -> the weight map of an output layer that is not tied to the token embedding.
_UNTIED_OUTPUT = {
    "gpt2": _embedding("lm_head", "lm_head"), "openai-gpt": _embedding("lm_head", "lm_head"),
    "distilbert": _embedding("lm_head", "vocab_projector")}
_QUESTION_ANSWERING = _linear("classifier", "qa_outputs")
_CLASSIFIER = _linear("classifier", "classifier")
_BERT_MLM = [
    *_linear("mlm_head/dense", "cls.predictions.transform.dense"),
    *_norm("mlm_head/norm", "cls.predictions.transform.LayerNorm"),
    WeightMap("cls.predictions.bias", ("mlm_head/output/bias",),
              aliases=("cls.predictions.decoder.bias",)),
]
_BERT_NSP = _linear("nsp_head", "cls.seq_relationship")
_ROBERTA_MLM = [
    *_linear("mlm_head/dense", "lm_head.dense"),
    *_norm("mlm_head/norm", "lm_head.layer_norm"),
    WeightMap("lm_head.bias", ("mlm_head/output/bias",), aliases=("lm_head.decoder.bias",)),
]
_DISTILBERT_MLM = [
    *_linear("mlm_head/dense", "vocab_transform"),
    *_norm("mlm_head/norm", "vocab_layer_norm"),
    WeightMap("vocab_projector.bias", ("mlm_head/output/bias",)),
]
_ENCODER_HEADS = {"classification": _CLASSIFIER, "token_classification": _CLASSIFIER,
                  "multiple_choice": _CLASSIFIER, "question_answering": _QUESTION_ANSWERING}
_GPT_CLASSIFIER = [WeightMap("score.weight", ("classifier/kernel",), is_transposed=True)]
_GPT_HEADS = {"classification": _GPT_CLASSIFIER, "token_classification": _CLASSIFIER,
              "question_answering": _QUESTION_ANSWERING}
_DISTILBERT_CLASSIFIER = [*_linear("pooler", "pre_classifier"), *_CLASSIFIER]
_ROBERTA_HEADS = {
    **_ENCODER_HEADS, "masked_lm": _ROBERTA_MLM,
    "classification": [*_linear("pooler", "classifier.dense"),
                       *_linear("classifier", "classifier.out_proj")],
}
_BART_HEADS = {
    "classification": [*_linear("pooler", "classification_head.dense"),
                       *_linear("classifier", "classification_head.out_proj")],
    "question_answering": _QUESTION_ANSWERING,
}
# `model_type` of a family -> task -> the weight maps of the head.
HEAD_WEIGHT_MAPS: dict[str, dict[str, list[WeightMap]]] = {
    "gpt2": _GPT_HEADS,
    "openai-gpt": _GPT_HEADS,
    "bert": {**_ENCODER_HEADS, "masked_lm": _BERT_MLM, "next_sentence": _BERT_NSP,
             "pretraining": [*_BERT_MLM, *_BERT_NSP]},
    "roberta": _ROBERTA_HEADS,
    "xlm-roberta": _ROBERTA_HEADS,
    "camembert": _ROBERTA_HEADS,
    "distilbert": {**_ENCODER_HEADS, "masked_lm": _DISTILBERT_MLM,
                   "classification": _DISTILBERT_CLASSIFIER,
                   "multiple_choice": _DISTILBERT_CLASSIFIER},
    "bart": _BART_HEADS,
    "mbart": _BART_HEADS,
    "marian": {},
    "pegasus": {},
}
POSITION_TABLES = [
    PositionTable(f"{{base}}{stack}.embed_positions.weight") for stack in ("encoder", "decoder")]
# `model_type` -> tasks for which Transformers saves the position tables.
TASKS_WITH_POSITION_TABLES = {"marian": ("base",), "pegasus": ("base", "seq2seq_lm")}

# Buffers that old versions of Transformers saved; they are not parameters.
IGNORED_BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|attn\.(masked_)?bias)$")
_OLD_NORM_NAMES = re.compile(r"(LayerNorm|layer_norm)\.(gamma|beta)$")
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:h|layer|layers)\.(\d+)\.")


def canonical_name(name: str, base_prefix: str) -> str:
    """Converts a tensor name of a checkpoint to the name in the tables above, without "{base}".

    In the first BERT checkpoints, the weight of a LayerNorm is called "gamma" and its bias "beta".

    Example:

        >>> canonical_name("bert.embeddings.LayerNorm.gamma", "bert.")
        'embeddings.LayerNorm.weight'
    """
    name = _OLD_NORM_NAMES.sub(
        lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", name)
    return name.removeprefix(base_prefix)


def layer_index(name: str) -> int | None:
    """Index of the layer that a tensor belongs to; None for tensors outside the layers."""
    match = _LAYER_INDEX.search(name)
    return int(match[1]) if match else None


def param_shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the parameters of a model."""
    abstract_params = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_paths(abstract_params).items()}


def num_layers(config: Config) -> dict[str, int]:
    """Stack ("encoder" or "decoder") -> its number of layers."""
    if isinstance(config, TransformerConfig):
        return {"encoder": config.num_layers, "decoder": config.decoder_stack.num_layers}
    return dict.fromkeys(("encoder", "decoder"), config.num_layers)


def for_model(
    model_type: str, task: str, config: Config, shapes: dict[str, tuple[int, ...]]
) -> Iterator[WeightMap]:
    """Weight maps of a model, with the layer index "{i}" filled in.

    Args:
        model_type: the model family.
        task: the task, which determines the head.
        config: the model's config.
        shapes: path -> shape of the model's parameters. Maps of other parameters are skipped.

    Yields:
        Weight maps whose tensor names still contain "{base}".
    """
    layer_counts = num_layers(config)
    base_maps = BASE_WEIGHT_MAPS[model_type]
    if not config.tie_embeddings:
        base_maps = [
            *(weight_map._replace(aliases=())
              if weight_map.paths[0].startswith("token_embed") else weight_map
              for weight_map in base_maps),
            _UNTIED_OUTPUT[model_type]]
    head_maps = HEAD_WEIGHT_MAPS[model_type].get(task, [])
    # Some heads, such as RoBERTa's classifier, have a pooler. It replaces that of the base model.
    replaced = {weight_map.paths for weight_map in head_maps}
    for weight_map in [*(m for m in base_maps if m.paths not in replaced), *head_maps]:
        stack = weight_map.paths[0].partition("/")[0]
        for i in range(layer_counts[stack] if "{i}" in weight_map.hf_name else 1):
            layer_map = weight_map._replace(
                hf_name=weight_map.hf_name.replace("{i}", str(i)),
                paths=tuple(path.replace("{i}", str(i)) for path in weight_map.paths))
            if layer_map.paths[0] in shapes:
                yield layer_map


def sinusoidal_table(config: Config) -> np.ndarray:
    """Sinusoidal position embeddings as checkpoints store them: float32 [max_length, D]."""
    return sinusoidal_positions(
        config.max_length, config.d_model, interleave=False).astype(np.float32)
