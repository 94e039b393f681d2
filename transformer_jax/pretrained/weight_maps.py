"""Our parameter paths and the names of the same tensors in checkpoints: one table for both ways.

A rule reads: this tensor of theirs holds these parameters of ours, one or several joined. "{i}" is
the number of a layer; "{base}" is what the reference writes in front of all names but those of the
head, such as "bert.", and nothing where there is no head. PyTorch's `Linear` keeps its kernel as
[out, in], GPT's `Conv1D` as [in, out], and neither knows of heads: our kernels are [D, N, H] into
heads and [N, H, D] out of them.
"""

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from transformer_jax.models import Config
from transformer_jax.nn.positions import sinusoidal


class WeightMap(NamedTuple):
    """`theirs` holds `ours`, flattened to matrices or vectors and joined along the last axis."""

    theirs: str
    ours: tuple[str, ...]
    transposed: bool = False  # theirs is [out, in]
    row: bool = False  # theirs is [1, n], ours [n]
    aliases: tuple[str, ...] = ()  # other names of the same tensor; one of them is enough

    def their_shape(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, ...]:
        """The shape of theirs, from those of ours."""
        flat = [_flat(path, shapes[path]) for path in self.ours]
        shape = (*flat[0][:-1], sum(s[-1] for s in flat))
        return shape[::-1] if self.transposed else (1, *shape) if self.row else shape

    def to_ours(self, value: np.ndarray, shapes: dict[str, tuple[int, ...]]) -> list[np.ndarray]:
        """Our parameters, which may be views of `value`."""
        value = value.T if self.transposed else value[0] if self.row else value
        ends = np.cumsum([_flat(path, shapes[path])[-1] for path in self.ours])[:-1]
        parts = np.split(value, ends, axis=-1)
        return [part.reshape(shapes[path]) for path, part in zip(self.ours, parts)]

    def to_theirs(self, values: Sequence[np.ndarray]) -> np.ndarray:
        """The inverse of `to_ours`."""
        flat = [value.reshape(_flat(path, value.shape)) for path, value in zip(self.ours, values)]
        joined = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        return joined.T if self.transposed else joined[None] if self.row else joined


def _flat(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The matrix or vector that a parameter is: axes of heads become one."""
    if path.endswith("/embedding"):
        return shape
    if path.endswith("/kernel"):
        inputs = 2 if "attention/out/" in path else 1
        return (math.prod(shape[:inputs]), math.prod(shape[inputs:]))
    return (math.prod(shape),)


class Sinusoids(NamedTuple):
    """A table of fixed positions, which their files may have and our parameters do not."""

    theirs: str


def _norm(ours: str, theirs: str) -> list[WeightMap]:
    return [WeightMap(f"{theirs}.weight", (f"{ours}/scale",)),
            WeightMap(f"{theirs}.bias", (f"{ours}/bias",))]


def _linear(ours: str | Sequence[str], theirs: str, transposed: bool = True) -> list[WeightMap]:
    paths = (ours,) if isinstance(ours, str) else ours
    return [
        WeightMap(f"{theirs}.weight", tuple(f"{path}/kernel" for path in paths), transposed),
        WeightMap(f"{theirs}.bias", tuple(f"{path}/bias" for path in paths)),
    ]


def _embed(ours: str, theirs: str, aliases: Sequence[str] = ()) -> WeightMap:
    return WeightMap(f"{theirs}.weight", (f"{ours}/embedding",), aliases=tuple(aliases))


def _gpt(tokens: str, positions: str) -> list[WeightMap]:
    layer, block = "decoder/layer_{i}", "{base}h.{i}"
    attention = f"{layer}/self_attention"
    joined = [f"{attention}/{name}" for name in ("query", "key", "value")]
    return [
        _embed("token_embed", f"{{base}}{tokens}", ["lm_head.weight"]),
        _embed("position_embed", f"{{base}}{positions}"),
        *_linear(joined, f"{block}.attn.c_attn", transposed=False),
        *_linear(f"{attention}/out", f"{block}.attn.c_proj", transposed=False),
        *_norm(f"{layer}/attention_norm", f"{block}.ln_1"),
        *_linear(f"{layer}/mlp/wi", f"{block}.mlp.c_fc", transposed=False),
        *_linear(f"{layer}/mlp/wo", f"{block}.mlp.c_proj", transposed=False),
        *_norm(f"{layer}/mlp_norm", f"{block}.ln_2"),
    ]


def _encoder(layers: str, names: dict[str, str], decoder: str) -> list[WeightMap]:
    """An encoder that reads both ways; `names` are those of a layer's parts, `decoder` that of the
    output layer, the same tensor as the token embedding's."""
    layer = "encoder/layer_{i}"
    rules = [
        _embed("token_embed", "{base}embeddings.word_embeddings", [f"{decoder}.weight"]),
        _embed("position_embed", "{base}embeddings.position_embeddings"),
        _embed("segment_embed", "{base}embeddings.token_type_embeddings"),
        *_norm("embed_norm", "{base}embeddings.LayerNorm"),
    ]
    for ours, theirs in names.items():
        make = _norm if ours.endswith("norm") else _linear
        rules += make(f"{layer}/{ours}", f"{{base}}{layers}.{{i}}.{theirs}")
    return rules


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
_ROBERTA = [rule._replace(aliases=("lm_head.decoder.weight",)) if rule.aliases else rule
            for rule in _BERT]
_DISTILBERT = _encoder("transformer.layer", {
    "self_attention/query": "attention.q_lin", "self_attention/key": "attention.k_lin",
    "self_attention/value": "attention.v_lin", "self_attention/out": "attention.out_lin",
    "attention_norm": "sa_layer_norm",
    "mlp/wi": "ffn.lin1", "mlp/wo": "ffn.lin2", "mlp_norm": "output_layer_norm",
}, "vocab_projector")


def _bart(*extra: WeightMap) -> list[WeightMap]:
    rules = [_embed("token_embed", "{base}shared", [
        "encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"])]
    for stack in ("encoder", "decoder"):
        layer, block = f"{stack}/layer_{{i}}", f"{{base}}{stack}.layers.{{i}}"
        looks = {"self_attention": "self_attn", "cross_attention": "encoder_attn"}
        for ours, theirs in looks.items():
            parts = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
            for part, name in parts.items():
                rules += _linear(f"{layer}/{ours}/{part}", f"{block}.{theirs}.{name}")
        rules += [
            *_norm(f"{layer}/attention_norm", f"{block}.self_attn_layer_norm"),
            *_norm(f"{layer}/cross_attention_norm", f"{block}.encoder_attn_layer_norm"),
            *_linear(f"{layer}/mlp/wi", f"{block}.fc1"),
            *_linear(f"{layer}/mlp/wo", f"{block}.fc2"),
            *_norm(f"{layer}/mlp_norm", f"{block}.final_layer_norm"),
        ]
    return [*rules, WeightMap("final_logits_bias", ("output/bias",), row=True), *extra]


def _sides(ours: str, theirs: str, make) -> list[WeightMap]:
    return [rule for side in ("encoder", "decoder")
            for rule in make(ours.format(side), f"{{base}}{side}.{theirs}")]


_BART = _bart(
    *_sides("{}_position_embed", "embed_positions", lambda o, t: [_embed(o, t)]),
    *_sides("{}_embed_norm", "layernorm_embedding", _norm),
)
_FINAL_NORMS = _sides("{}/final_norm", "layer_norm", _norm)

# Names of all parts but the head's, by the family's `model_type`.
BODIES: dict[str, list[WeightMap]] = {
    "gpt2": [*_gpt("wte", "wpe"), *_norm("decoder/final_norm", "{base}ln_f")],
    "openai-gpt": _gpt("tokens_embed", "positions_embed"),
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _DISTILBERT,
    "bart": _BART,
    "mbart": [*_BART, *_FINAL_NORMS],
    "marian": _bart(),
    "pegasus": _bart(*_FINAL_NORMS),
}
# The output layer where it is a matrix of its own.
_UNTIED = {"gpt2": _embed("lm_head", "lm_head"), "openai-gpt": _embed("lm_head", "lm_head"),
           "distilbert": _embed("lm_head", "vocab_projector")}
_QA = _linear("classifier", "qa_outputs")
_CLASSIFIER = _linear("classifier", "classifier")
_BERT_WORDS = [
    *_linear("mlm_head/dense", "cls.predictions.transform.dense"),
    *_norm("mlm_head/norm", "cls.predictions.transform.LayerNorm"),
    WeightMap("cls.predictions.bias", ("mlm_head/output/bias",),
         aliases=("cls.predictions.decoder.bias",)),
]
_BERT_NEXT = _linear("nsp_head", "cls.seq_relationship")
_ROBERTA_WORDS = [
    *_linear("mlm_head/dense", "lm_head.dense"),
    *_norm("mlm_head/norm", "lm_head.layer_norm"),
    WeightMap("lm_head.bias", ("mlm_head/output/bias",), aliases=("lm_head.decoder.bias",)),
]
_DISTILBERT_WORDS = [
    *_linear("mlm_head/dense", "vocab_transform"),
    *_norm("mlm_head/norm", "vocab_layer_norm"),
    WeightMap("vocab_projector.bias", ("mlm_head/output/bias",)),
]
_ENCODER_HEADS = {"classification": _CLASSIFIER, "token_classification": _CLASSIFIER,
                  "multiple_choice": _CLASSIFIER, "question_answering": _QA}
_SCORE = [WeightMap("score.weight", ("classifier/kernel",), transposed=True)]
_GPT_HEADS = {"classification": _SCORE, "token_classification": _CLASSIFIER,
              "question_answering": _QA}
_DISTILBERT_POOLED = [*_linear("pooler", "pre_classifier"), *_CLASSIFIER]
_ROBERTA_HEADS = {
    **_ENCODER_HEADS, "masked_lm": _ROBERTA_WORDS,
    "classification": [*_linear("pooler", "classifier.dense"),
                       *_linear("classifier", "classifier.out_proj")],
}
_BART_HEADS = {
    "classification": [*_linear("pooler", "classification_head.dense"),
                       *_linear("classifier", "classification_head.out_proj")],
    "question_answering": _QA,
}
HEADS: dict[str, dict[str, list[WeightMap]]] = {
    "gpt2": _GPT_HEADS,
    "openai-gpt": _GPT_HEADS,
    "bert": {**_ENCODER_HEADS, "masked_lm": _BERT_WORDS, "next_sentence": _BERT_NEXT,
             "pretraining": [*_BERT_WORDS, *_BERT_NEXT]},
    "roberta": _ROBERTA_HEADS,
    "xlm-roberta": _ROBERTA_HEADS,
    "camembert": _ROBERTA_HEADS,
    "distilbert": {**_ENCODER_HEADS, "masked_lm": _DISTILBERT_WORDS,
                   "classification": _DISTILBERT_POOLED, "multiple_choice": _DISTILBERT_POOLED},
    "bart": _BART_HEADS,
    "mbart": _BART_HEADS,
    "marian": {},
    "pegasus": {},
}
# Fixed positions: the reference writes those of PEGASUS always, those of Marian without a head.
POSITIONS = [Sinusoids(f"{{base}}{side}.embed_positions.weight") for side in ("encoder", "decoder")]
WRITES_POSITIONS = {"marian": ("base",), "pegasus": ("base", "seq2seq_lm")}

# Buffers that old versions of the reference wrote; nothing is lost with them.
BUFFERS = re.compile(r"(^|\.)(position_ids|token_type_ids|attn\.(masked_)?bias)$")
_OLD_NAMES = re.compile(r"(LayerNorm|layer_norm)\.(gamma|beta)$")
_LAYER = re.compile(r"(?:^|\.)(?:h|layer|layers)\.(\d+)\.")


def modern(name: str, base: str) -> str:
    """A tensor's name as the tables have it, without `base`: BERT's first checkpoints call a norm's
    weight gamma and its bias beta."""
    name = _OLD_NAMES.sub(
        lambda m: f"{m[1]}.{'weight' if m[2] == 'gamma' else 'bias'}", name)
    return name.removeprefix(base)


def layer_number(name: str) -> int | None:
    """Which layer a tensor is of."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def rules(family: str, task: str, config: Config, shapes) -> Iterator[WeightMap]:
    """The rules of the parameters in `shapes` (by path), a rule for each layer, "{base}" left open.
    """
    layers = {"encoder": config.num_layers,
              "decoder": getattr(config, "num_decoder_layers", None) or config.num_layers}
    body = BODIES[family]
    if not config.tie_embeddings:
        body = [*(rule._replace(aliases=()) if rule.ours[0].startswith("token_embed") else rule
                  for rule in body), _UNTIED[family]]
    head = HEADS[family].get(task, [])
    on_top = {rule.ours for rule in head}  # RoBERTa's classifier has a pooler of its own
    for rule in [*(rule for rule in body if rule.ours not in on_top), *head]:
        stack = rule.ours[0].partition("/")[0]
        for i in range(layers[stack] if "{i}" in rule.theirs else 1):
            one = rule._replace(theirs=rule.theirs.replace("{i}", str(i)),
                                ours=tuple(path.replace("{i}", str(i)) for path in rule.ours))
            if one.ours[0] in shapes:
                yield one


def position_table(config: Config) -> np.ndarray:
    """What a tensor of fixed positions holds: float32 [max_length, D]."""
    return sinusoidal(config.max_length, config.d_model, interleave=False).astype(np.float32)
