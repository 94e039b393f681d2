"""Mapping between the tensors of Hugging Face checkpoints and the parameters of this library.

Loading and saving use the same tables. In tensor names, "{base}" stands for the prefix of the base
model, such as "bert."; it is empty in checkpoints without a head. "{i}" is the index of a layer.

PyTorch's `Linear` stores its weight as [out, in], and the `Conv1D` of GPT as [in, out]; neither has
head axes. In this library, the kernels of query, key and value are [D, N, H], and that of the
attention output is [N, H, D].
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

import jax
import numpy as np

from transformer_jax.models import Config, Model, TransformerConfig, init_params
from transformer_jax.nn.layers import sinusoidal_positions
from transformer_jax.pretrained.families import FAMILIES
from transformer_jax.pretrained.safetensors_io import TensorEntry, load_tensor
from transformer_jax.tree import PyTree, flatten_paths

Shapes = dict[str, tuple[int, ...]]  # path -> shape of a parameter


class WeightMap(NamedTuple):
    """Mapping between one checkpoint tensor and one or several parameters.

    The head axes of each parameter are merged, and the resulting matrices or vectors are
    concatenated along the last axis.
    """

    hf_name: str
    paths: tuple[str, ...]
    is_transposed: bool = False  # whether the tensor is stored as [out, in]
    is_row: bool = False  # whether the tensor of a vector is stored as [1, size]
    aliases: tuple[str, ...] = ()  # other names; a checkpoint has at least one of the names

    def names(self, model_type: str) -> tuple[str, ...]:
        """All names of the tensor, without the prefix of the base model."""
        return self.hf_name.removeprefix(FAMILIES[model_type].base_prefix), *self.aliases

    def hf_shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Shape of the tensor."""
        flat = [_flat_shape(path, shapes[path]) for path in self.paths]
        shape = (*flat[0][:-1], sum(s[-1] for s in flat))
        return shape[::-1] if self.is_transposed else (1, *shape) if self.is_row else shape

    def to_params(self, tensor: np.ndarray, shapes: Shapes) -> list[np.ndarray]:
        """Splits the tensor into parameters, in the order of `paths`. They may be views of it."""
        matrix = tensor.T if self.is_transposed else tensor[0] if self.is_row else tensor
        ends = np.cumsum([_flat_shape(path, shapes[path])[-1] for path in self.paths])[:-1]
        return [part.reshape(shapes[path])
                for path, part in zip(self.paths, np.split(matrix, ends, axis=-1))]

    def to_hf(self, params: Mapping[str, np.ndarray]) -> np.ndarray:
        """Combines parameters, given by path, into the tensor. Inverse of `to_params`."""
        values = [np.asarray(params[path]) for path in self.paths]
        flat = [value.reshape(_flat_shape(path, value.shape))
                for path, value in zip(self.paths, values)]
        matrix = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        return matrix.T if self.is_transposed else matrix[None] if self.is_row else matrix


def split_kernel_shape(path: str, shape: tuple[int, ...]) -> tuple[tuple, tuple]:
    """(input axes, output axes) of the shape of a kernel."""
    num_input_axes = 2 if "attention/out/" in path else 1
    return shape[:num_input_axes], shape[num_input_axes:]


def _flat_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a parameter as a matrix or vector, with its head axes merged."""
    if path.endswith("/embedding"):
        return shape
    if path.endswith("/kernel"):
        return tuple(map(math.prod, split_kernel_shape(path, shape)))
    return (math.prod(shape),)


# Tables -------------------------------------------------------------------------------------------

# Path of a module -> name of its tensors without ".weight", or the names of tied tensors. "+" joins
# the last words of several paths. The end of a path tells the kind of the module.
Modules = dict[str, str | tuple[str, ...]]


def _maps(modules: Modules, is_transposed: bool = True) -> list[WeightMap]:
    maps = []
    for path, hf_names in modules.items():
        hf_name, *aliases = (hf_names,) if isinstance(hf_names, str) else hf_names
        parent, slash, last = path.rpartition("/")
        paths = [parent + slash + word for word in last.split("+")]
        weight = ("embedding" if path.endswith(("embed", "lm_head"))
                  else "scale" if path.endswith("norm") else "kernel")
        maps.append(WeightMap(f"{hf_name}.weight", tuple(f"{path}/{weight}" for path in paths),
                              is_transposed and weight == "kernel", aliases=tuple(aliases)))
        if weight != "embedding":
            maps.append(WeightMap(f"{hf_name}.bias", tuple(f"{path}/bias" for path in paths)))
    return maps


def _layers(stack: str, hf_layers: str, layer: Modules) -> Modules:
    return {f"{stack}/layer_{{i}}/{path}": f"{{base}}{hf_layers}.{{i}}.{hf_name}"
            for path, hf_name in layer.items()}


def _gpt(token_embed: str, position_embed: str, final_norm: Modules) -> list[WeightMap]:
    return _maps({
        "token_embed": (f"{{base}}{token_embed}", "lm_head.weight"),
        "position_embed": f"{{base}}{position_embed}",
        **_layers("decoder", "h", {
            "self_attention/query+key+value": "attn.c_attn", "self_attention/out": "attn.c_proj",
            "attention_norm": "ln_1", "mlp/wi": "mlp.c_fc", "mlp/wo": "mlp.c_proj",
            "mlp_norm": "ln_2"}),
        **final_norm}, is_transposed=False)


def _encoder(hf_layers: str, layer: Modules, hf_decoder: str) -> list[WeightMap]:
    """Maps of a BERT encoder, whose output layer `hf_decoder` is tied to the token embedding."""
    embeddings = "{base}embeddings."
    return _maps({
        "token_embed": (f"{embeddings}word_embeddings", f"{hf_decoder}.weight"),
        "position_embed": f"{embeddings}position_embeddings",
        "segment_embed": f"{embeddings}token_type_embeddings",
        "embed_norm": f"{embeddings}LayerNorm", **_layers("encoder", hf_layers, layer)})


_POOLER = _maps({"pooler": "{base}pooler.dense"})
_BERT_LAYER = {
    "self_attention/query": "attention.self.query", "self_attention/key": "attention.self.key",
    "self_attention/value": "attention.self.value",
    "self_attention/out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
    "mlp/wi": "intermediate.dense", "mlp/wo": "output.dense", "mlp_norm": "output.LayerNorm"}
_DISTILBERT_LAYER = {
    "self_attention/query": "attention.q_lin", "self_attention/key": "attention.k_lin",
    "self_attention/value": "attention.v_lin", "self_attention/out": "attention.out_lin",
    "attention_norm": "sa_layer_norm", "mlp/wi": "ffn.lin1", "mlp/wo": "ffn.lin2",
    "mlp_norm": "output_layer_norm"}
_BART_LAYER = {
    **{f"{path}_attention/{name}": f"{hf_path}_attn.{hf_name}"
       for path, hf_path in (("self", "self"), ("cross", "encoder"))
       for name, hf_name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"),
                             ("out", "out_proj"))},
    "attention_norm": "self_attn_layer_norm", "cross_attention_norm": "encoder_attn_layer_norm",
    "mlp/wi": "fc1", "mlp/wo": "fc2", "mlp_norm": "final_layer_norm"}


def _encoder_decoder(**extra: str) -> list[WeightMap]:
    """Maps of an encoder-decoder; `extra` are modules of both stacks that some families have."""
    return [
        *_maps({
            "token_embed": ("{base}shared", "encoder.embed_tokens.weight",
                            "decoder.embed_tokens.weight", "lm_head.weight"),
            **_layers("encoder", "encoder.layers", _BART_LAYER),
            **_layers("decoder", "decoder.layers", _BART_LAYER),
            **{f"{stack}{path}": f"{{base}}{stack}.{hf_name}"
               for path, hf_name in extra.items() for stack in ("encoder", "decoder")}}),
        WeightMap("final_logits_bias", ("output/bias",), is_row=True)]


_LEARNED_POSITIONS = {"_position_embed": "embed_positions", "_embed_norm": "layernorm_embedding"}
_FINAL_NORMS = {"/final_norm": "layer_norm"}
_ROBERTAS = ("roberta", "xlm-roberta", "camembert")
# `model_type` of a family -> the weight maps of its models without a head.
BASE_WEIGHT_MAPS: dict[str, list[WeightMap]] = {
    "gpt2": _gpt("wte", "wpe", {"decoder/final_norm": "{base}ln_f"}),
    "openai-gpt": _gpt("tokens_embed", "positions_embed", {}),
    "bert": _encoder("encoder.layer", _BERT_LAYER, "cls.predictions.decoder") + _POOLER,
    **dict.fromkeys(_ROBERTAS, _encoder("encoder.layer", _BERT_LAYER, "lm_head.decoder") + _POOLER),
    "distilbert": _encoder("transformer.layer", _DISTILBERT_LAYER, "vocab_projector"),
    "bart": _encoder_decoder(**_LEARNED_POSITIONS),
    "mbart": _encoder_decoder(**_LEARNED_POSITIONS, **_FINAL_NORMS),
    "marian": _encoder_decoder(),
    "pegasus": _encoder_decoder(**_FINAL_NORMS),
}
# `model_type` -> tensor name of an output layer that is not tied to the token embedding.
_UNTIED_OUTPUT = {"gpt2": "lm_head", "openai-gpt": "lm_head", "distilbert": "vocab_projector"}


def _mlm(dense: str, norm: str, bias: str, *aliases: str) -> list[WeightMap]:
    return [*_maps({"mlm_head/dense": dense, "mlm_head/norm": norm}),
            WeightMap(bias, ("mlm_head/output/bias",), aliases=aliases)]


_QUESTION_ANSWERING = _maps({"classifier": "qa_outputs"})
_CLASSIFIER = _maps({"classifier": "classifier"})
_BERT_MLM = _mlm("cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm",
                 "cls.predictions.bias", "cls.predictions.decoder.bias")
_BERT_NSP = _maps({"nsp_head": "cls.seq_relationship"})
_ENCODER_HEADS = {"classification": _CLASSIFIER, "token_classification": _CLASSIFIER,
                  "multiple_choice": _CLASSIFIER, "question_answering": _QUESTION_ANSWERING}
_GPT_HEADS = {
    "classification": [WeightMap("score.weight", ("classifier/kernel",), is_transposed=True)],
    "token_classification": _CLASSIFIER, "question_answering": _QUESTION_ANSWERING}
_DISTILBERT_CLASSIFIER = _maps({"pooler": "pre_classifier", "classifier": "classifier"})
_ROBERTA_HEADS = {
    **_ENCODER_HEADS,
    "masked_lm": _mlm("lm_head.dense", "lm_head.layer_norm", "lm_head.bias",
                      "lm_head.decoder.bias"),
    "classification": _maps({"pooler": "classifier.dense", "classifier": "classifier.out_proj"})}
_BART_HEADS = {
    "classification": _maps({"pooler": "classification_head.dense",
                             "classifier": "classification_head.out_proj"}),
    "question_answering": _QUESTION_ANSWERING}
# `model_type` of a family -> task -> the weight maps of the head.
HEAD_WEIGHT_MAPS: dict[str, dict[str, list[WeightMap]]] = {
    **dict.fromkeys(("gpt2", "openai-gpt"), _GPT_HEADS),
    "bert": {**_ENCODER_HEADS, "masked_lm": _BERT_MLM, "next_sentence": _BERT_NSP,
             "pretraining": [*_BERT_MLM, *_BERT_NSP]},
    **dict.fromkeys(_ROBERTAS, _ROBERTA_HEADS),
    "distilbert": {**_ENCODER_HEADS,
                   "masked_lm": _mlm("vocab_transform", "vocab_layer_norm", "vocab_projector.bias"),
                   "classification": _DISTILBERT_CLASSIFIER,
                   "multiple_choice": _DISTILBERT_CLASSIFIER},
    **dict.fromkeys(("bart", "mbart"), _BART_HEADS),
    "marian": {},
    "pegasus": {},
}
# Modules that are initialized if the checkpoint omits them, because models for other tasks do not
# have them.
_HEAD_MODULES = ("pooler", "classifier", "mlm_head", "nsp_head", "lm_head", "output")
# Sinusoidal position embeddings, which the model computes: the tensors have no parameter.
POSITION_TABLES = ("encoder.embed_positions.weight", "decoder.embed_positions.weight")
# `model_type` -> tasks for which Transformers saves the position tables.
TASKS_WITH_POSITION_TABLES = {"marian": ("base",), "pegasus": ("base", "seq2seq_lm")}
# Buffers that old versions of Transformers saved; they are not parameters.
_IGNORED_BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|attn\.(masked_)?bias)$")
_LAYER_INDEX = re.compile(r"(?:^|\.)(?:h|layer|layers)\.(\d+)\.")


# Weight maps of a model ---------------------------------------------------------------------------


def abstract_params(model: Model) -> PyTree:
    """The parameters of a model as `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))


def param_shapes(model: Model) -> Shapes:
    """Path -> shape of the parameters of a model."""
    return {path: leaf.shape for path, leaf in flatten_paths(abstract_params(model)).items()}


def base_prefix(model_type: str, task: str) -> str:
    """Prefix of the names of tensors outside the head, for which "{base}" stands."""
    family = FAMILIES[model_type]
    return "" if family.class_suffixes[task] == "Model" else family.base_prefix


def for_model(model_type: str, model: Model, paths: Collection[str]) -> list[WeightMap]:
    """Weight maps of the parameters `paths` of a model, with "{base}" and "{i}" filled in."""
    config = model.config
    layer_counts = _num_layers(config)
    base_maps = BASE_WEIGHT_MAPS[model_type]
    if not config.tie_embeddings:
        base_maps = [
            *(weight_map._replace(aliases=())
              if weight_map.paths[0].startswith("token_embed") else weight_map
              for weight_map in base_maps),
            *_maps({"lm_head": _UNTIED_OUTPUT[model_type]})]
    head_maps = HEAD_WEIGHT_MAPS[model_type].get(model.task, [])
    # Some heads, such as RoBERTa's classifier, have a pooler. It replaces that of the base model.
    replaced = {weight_map.paths for weight_map in head_maps}
    layer_maps, base = [], base_prefix(model_type, model.task)
    for weight_map in [*(m for m in base_maps if m.paths not in replaced), *head_maps]:
        stack = weight_map.paths[0].partition("/")[0]
        layer_maps += [
            weight_map._replace(
                hf_name=weight_map.hf_name.replace("{base}", base).replace("{i}", str(i)),
                paths=tuple(path.replace("{i}", str(i)) for path in weight_map.paths))
            for i in range(layer_counts[stack] if "{i}" in weight_map.hf_name else 1)]
    return [weight_map for weight_map in layer_maps if weight_map.paths[0] in paths]


def check_all_mapped(
    maps: Collection[WeightMap], model_type: str, model: Model, paths: Collection[str]
) -> None:
    """Raises ValueError if a parameter of a model has no tensor, so that it cannot be saved."""
    if unmapped := sorted(set(paths) - {path for m in maps for path in m.paths}):
        raise ValueError(f"unsupported parameter {unmapped[0]}: {model_type} checkpoints for "
                         f"{model.task} have no tensor for it; build the model without it")


def _num_layers(config: Config) -> dict[str, int]:
    """Stack ("encoder" or "decoder") -> its number of layers."""
    if isinstance(config, TransformerConfig):
        return {"encoder": config.num_layers, "decoder": config.decoder_stack.num_layers}
    return dict.fromkeys(("encoder", "decoder"), config.num_layers)


def sinusoidal_table(config: Config) -> np.ndarray:
    """Sinusoidal position embeddings as checkpoints store them: float32 [max_length, D]."""
    return sinusoidal_positions(
        config.max_length, config.d_model, interleave=False).astype(np.float32)


# Tensors of a checkpoint --------------------------------------------------------------------------


def match_tensors(
    entries: dict[str, TensorEntry], model_type: str, model: Model, shapes: Shapes,
    new_classifier: bool,
) -> tuple[dict[WeightMap, TensorEntry], list[str]]:
    """(weight map -> entry of its tensor, sorted names of unused tensors) of a checkpoint.

    With `new_classifier`, a classifier of another shape is unused. ValueError if a parameter
    outside the heads has no tensor, a tensor has another shape or dtype than the model requires,
    two tensor names denote the same tensor, or there are tensors of more layers than in the config.
    """
    names = _canonical_names(entries, FAMILIES[model_type].base_prefix)
    matched, used = {}, set()
    for weight_map in for_model(model_type, model, shapes):
        present = [alias for alias in weight_map.names(model_type) if alias in names]
        if not present:
            continue
        name = names[present[0]]
        entry, shape = entries[name], weight_map.hf_shape(shapes)
        if (entry.shape != shape and new_classifier
                and weight_map.paths[0].startswith("classifier/")):
            continue
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {entry.shape}, but config.json requires {shape}; "
                             "the weights and config.json belong to different models")
        if entry.dtype.kind not in "fV":  # V: bfloat16
            raise ValueError(f"{name} has dtype {entry.dtype}; parameters must have a "
                             "floating-point dtype")
        used.update(present)
        matched[weight_map] = entry
    config = model.config
    _check_complete(matched, config, shapes)
    if config.positions != "learned":
        used |= _check_position_tables(entries, names, config)
    unused = sorted(names[canonical] for canonical in names.keys() - used
                    if not _IGNORED_BUFFERS.search(canonical))
    num_layers = max(_num_layers(config).values())
    for name in unused:
        if (match := _LAYER_INDEX.search(name)) and int(match[1]) >= num_layers:
            raise ValueError(f"the weights contain {name}, but the model of config.json has "
                             f"{num_layers} layers; they belong to different models")
    return matched, unused


def _canonical_names(names: Collection[str], base_prefix: str) -> dict[str, str]:
    """Name in the tables above, without "{base}" -> name in the checkpoint.

    In the first BERT checkpoints, the weight of a LayerNorm is called "gamma" and its bias "beta".
    """
    canonical_names: dict[str, str] = {}
    for name in names:
        canonical = re.sub(r"(LayerNorm|layer_norm)\.gamma$", r"\1.weight", name)
        canonical = re.sub(r"(LayerNorm|layer_norm)\.beta$", r"\1.bias", canonical)
        first = canonical_names.setdefault(canonical.removeprefix(base_prefix), name)
        if first != name:
            raise ValueError(f"the weights have both {first!r} and {name!r}, which are names of "
                             "the same tensor; remove one of them")
    return canonical_names


def _check_complete(matched: Collection[WeightMap], config: Config, shapes: Shapes) -> None:
    """Raises ValueError if parameters outside the heads have no tensor."""
    loaded = {path for weight_map in matched for path in weight_map.paths}
    missing = [path for path in shapes
               if path not in loaded and path.partition("/")[0] not in _HEAD_MODULES]
    if missing:
        raise ValueError(f"the weights have no tensors for {len(missing)} of {len(shapes)} "
                         f"parameters, such as {missing[0]}; the model of config.json has "
                         f"{config.num_layers} layers; the weights and config.json belong to "
                         "different models")


def _check_position_tables(
    entries: dict[str, TensorEntry], names: dict[str, str], config: Config
) -> set[str]:
    """Names of the position tables, which must be the sinusoids that the model computes."""
    present = {name for name in POSITION_TABLES if name in names}
    for name in present:
        expected, entry = sinusoidal_table(config), entries[names[name]]
        if entry.shape != expected.shape or not np.allclose(
                load_tensor(entry).astype(np.float32), expected, atol=0.01):
            raise ValueError(f"unsupported learned positions {names[name]} of shape {entry.shape}; "
                             f"supported: the sinusoids of {config.max_length} positions")
    return present
