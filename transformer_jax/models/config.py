"""Sizes and choices of a model, as frozen dataclasses that a run can print, save and compare."""

import dataclasses
import numbers
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer_jax.nn.blocks import REMAT, StackConfig
from transformer_jax.nn.fused_attention import CHOICES
from transformer_jax.nn.layers import ACTIVATIONS, INITIALIZERS, embedding_init

POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Beyond these a number is a mistake, or meant to fill the memory of whoever opens the file.
LIMITS = {"vocab_size": 2**24, "max_length": 2**24, "position_offset": 2**20, "num_layers": 10_000,
          "d_model": 2**20, "mlp_dim": 2**22}


@dataclass(frozen=True, kw_only=True)
class Config:
    """What every model has.

    Attributes:
        vocab_size: rows of the token embedding, and width of the output layer tied to it.
        max_length: longest sequence in tokens; rows of the position table.
        num_layers, d_model, num_heads, mlp_dim: shape of the stack; a head has
            `d_model / num_heads` dimensions.
        dropout_rate: on embeddings and on each sublayer's output before it joins the residual.
        attention_dropout_rate: on attention weights.
        positions: "learned" or "sinusoidal" (fixed, Vaswani et al. 2017, section 3.5);
            "sinusoidal_halves" has the sines before the cosines, as Marian's checkpoints want.
        position_offset: unused rows of the position table before that of the first token: 2 in
            BART and RoBERTa. The table has `max_length + position_offset` rows.
        scale_embedding: multiply token embeddings by sqrt(d_model) (Vaswani et al. 2017, section
            3.4); None does so with sinusoidal positions, so that neither drowns the other.
        tie_embeddings: the token embedding, transposed, is the output layer (Press & Wolf 2017);
            otherwise the output layer is a matrix of its own, `lm_head`.
        activation: one of "gelu" (exact), "gelu_tanh", "relu", "swish", "tanh".
        norm_first: LayerNorm before each sublayer and once at the end (GPT-2), or after each
            residual sum (the Transformer, GPT, BERT).
        residual: add what goes into each sublayer to what comes out of it (He et al. 2016, "Deep
            Residual Learning"). Every paper does; False is for seeing why.
        initializer, init_std: law and standard deviation of initial weights ("xavier_uniform"
            takes kernels' from their shapes, and init_std for embeddings); biases start at zero.
        pad_token_id, bos_token_id, eos_token_id: what a checkpoint's special tokens are, for
            generation and for tasks that look for the end of a text; None where it does not say.
        source: the configuration file that a foreign checkpoint came with, for the way back.
        dtype: "float32" or "bfloat16" for matmuls and activations. Parameters, softmax,
            LayerNorm statistics, logits and losses are float32 either way.
        attention_impl: attention by "xla", "cudnn", "splash", or "auto": see `nn.attention.dot_product_attention`.
        remat: what the way back computes again instead of keeping it (Chen et al. 2016, "Training
            Deep Nets with Sublinear Memory Cost"): "none"; "dots", all but matrix products; "full",
            every block from its input, for a third more arithmetic.

    Raises:
        ValueError: a value is of another type or out of its range; the message names it and what
            it must be.
    """

    vocab_size: int
    max_length: int
    num_layers: int
    d_model: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    positions: str = "learned"
    position_offset: int = 0
    scale_embedding: bool | None = None
    tie_embeddings: bool = True
    activation: str = "gelu"
    norm_first: bool = False
    residual: bool = True
    norm_epsilon: float = 1e-5
    initializer: str = "normal"
    init_std: float = 0.02
    dtype: str = "float32"
    attention_impl: str = "auto"
    remat: str = "none"
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple | None = None
    source: str = dataclasses.field(default="", repr=False)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name in ("vocab_size", "max_length", "num_layers", "d_model", "num_heads", "mlp_dim"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("dropout_rate", "attention_dropout_rate"):
            rate = getattr(self, name)
            _require(0 <= rate < 1, name, rate, "at least 0 and below 1")
        for name in ("norm_epsilon", "init_std"):
            _require(0 < getattr(self, name) < float("inf"), name, getattr(self, name),
                     "a finite number above 0")
        _require(self.position_offset >= 0, "position_offset", self.position_offset, "at least 0")
        for name, most in LIMITS.items():
            _require(getattr(self, name) <= most, name, getattr(self, name), f"at most {most:,}")
        choices = {"positions": POSITIONS, "activation": tuple(ACTIVATIONS),
                   "initializer": tuple(INITIALIZERS), "dtype": tuple(DTYPES),
                   "attention_impl": CHOICES, "remat": tuple(REMAT)}
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, name, repr(value), f"one of {', '.join(allowed)}")
        _require(self.d_model % self.num_heads == 0, "d_model", self.d_model,
                 f"a multiple of num_heads {self.num_heads}")
        if self.positions != "learned":
            _require(self.d_model % 2 == 0, "d_model", self.d_model,
                     "even for sinusoidal positions")

    @property
    def residual_init_std(self) -> float:
        return self.init_std

    @property
    def embedding_scale(self) -> float:
        scale = self.scale_embedding
        scale = self.positions != "learned" if scale is None else scale
        return self.d_model**0.5 if scale else 1.0

    @property
    def position_rows(self) -> int:
        return self.max_length + self.position_offset

    def embedding_init(self) -> Callable:
        return embedding_init(self.initializer, self.init_std)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return DTYPES[self.dtype]

    @property
    def stack(self) -> StackConfig:
        own = StackConfig._field_defaults.keys() | {"dtype"}
        shared = {f: getattr(self, f) for f in StackConfig._fields if f not in own}
        return StackConfig(**shared, dtype=self.compute_dtype)

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(Config):
    """GPT (Radford et al. 2018) with `norm_first=False`, GPT-2 (Radford et al. 2019) with True.

    Attributes:
        attention_window: how many tokens, itself included, a position attends to; None for all.
        scale_residual_init: divide the initial weights of layers that write to the residual
            stream by sqrt(number of such layers) (GPT-2 paper, section 2.3).
        classifier_bias: whether the classifier of a whole text has a bias.
    """

    activation: str = "gelu_tanh"
    attention_window: int | None = None
    scale_residual_init: bool = False
    classifier_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        if self.attention_window is not None:
            _require(self.attention_window >= 1, "attention_window", self.attention_window,
                     "at least 1, or None for no limit")

    @property
    def residual_init_std(self) -> float:
        writers = 2 * self.num_layers
        return self.init_std / writers**0.5 if self.scale_residual_init else self.init_std


@dataclass(frozen=True, kw_only=True)
class BERTConfig(Config):
    """BERT (Devlin et al. 2018) and those that changed its recipe more than its shape: RoBERTa
    (Liu et al. 2019) and DistilBERT (Sanh et al. 2019).

    With a `position_offset`, positions count real tokens only, as RoBERTa's do.

    Attributes:
        num_segments: rows of the segment embedding: sentences A and B; 0 for none (DistilBERT).
        pooler_activation: on the linear layer of the first token; DistilBERT's is "relu".
        pooling: what of a text is classified: "first", the pooled first token (BERT), or "mean",
            the mean of the tokens' states (Reimers & Gurevych 2019, "Sentence-BERT", section 3),
            which is what sentence encoders such as all-MiniLM-L6-v2 were trained for.
    """

    norm_epsilon: float = 1e-12
    initializer: str = "truncated_normal"
    num_segments: int = 2
    pooler_activation: str = "tanh"
    pooling: str = "first"

    def __post_init__(self):
        super().__post_init__()
        _require(self.pooling in ("first", "mean"), "pooling", repr(self.pooling),
                 "one of first, mean")
        _require(self.num_segments >= 0, "num_segments", self.num_segments, "at least 0")
        _require(self.pooler_activation in ACTIVATIONS, "pooler_activation",
                 repr(self.pooler_activation), f"one of {', '.join(ACTIVATIONS)}")


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """The encoder-decoder Transformer (Vaswani et al. 2017); sizes are those of both stacks.

    Attributes:
        num_decoder_layers, num_decoder_heads, decoder_mlp_dim: the decoder's, where it differs;
            None for the encoder's.
        embed_norm: LayerNorm on the sum of embeddings (BART).
        output_bias: a bias on the logits.
        decoder_start_token_id: what every target begins with, in the place before its first token.
        forced_bos_token_id, forced_eos_token_id: what a generated text has to begin with, and to
            end with where its length runs out.
    """

    positions: str = "sinusoidal"
    activation: str = "relu"
    initializer: str = "xavier_uniform"
    num_decoder_layers: int | None = None
    num_decoder_heads: int | None = None
    decoder_mlp_dim: int | None = None
    embed_norm: bool = False
    output_bias: bool = False
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple | None = None

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_decoder_layers", "num_decoder_heads", "decoder_mlp_dim"):
            value = getattr(self, name)
            _require(value is None or value >= 1, name, value, "at least 1, or None")
        heads = self.num_decoder_heads or self.num_heads
        _require(self.d_model % heads == 0, "d_model", self.d_model,
                 f"a multiple of num_decoder_heads {heads}")

    @property
    def decoder_stack(self) -> StackConfig:
        return self.stack._replace(
            num_layers=self.num_decoder_layers or self.num_layers,
            num_heads=self.num_decoder_heads or self.num_heads,
            mlp_dim=self.decoder_mlp_dim or self.mlp_dim,
            cross_attention=True,
        )


@dataclass(frozen=True, kw_only=True)
class BARTConfig(TransformerConfig):
    """BART (Lewis et al. 2019): the Transformer with GELU, learned positions and a LayerNorm on the
    embeddings, which are not scaled."""

    positions: str = "learned"
    position_offset: int = 2
    activation: str = "gelu"
    initializer: str = "normal"
    embed_norm: bool = True


def _require(holds: bool, name: str, value: Any, limit: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; it must be {limit}")


# What a value of each annotated type may be. True is a number to Python, but no size or rate.
_TYPES = {int: numbers.Integral, float: numbers.Real}


def _check_type(field: dataclasses.Field, value: Any) -> None:
    kinds = typing.get_args(field.type) or (field.type,)
    allowed = tuple(_TYPES.get(kind, kind) for kind in kinds)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in kinds):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise ValueError(f"{field.name} is {value!r}, of type {type(value).__name__}; it must be "
                         f"{names}")


def check_classes(num_classes: int) -> None:
    """Refuse to classify with a model that has no classifier."""
    if num_classes < 1:
        raise ValueError(f"classify needs a classifier, but num_classes is {num_classes}; build "
                         "the model with num_classes of at least 1: build_model(config, 2)")


def check_length(length: int, max_length: int) -> None:
    """Refuse a sequence that has no positions left, while tracing and so before compiling."""
    if length > max_length:
        raise ValueError(f"sequence of {length} tokens is longer than the model's {max_length} "
                         "positions; shorten it, or build the model with a larger max_length")


def init_params(model: nn.Module, rng: jax.Array, head: str | None = None) -> dict:
    """Random parameters, a nested dict of float32 arrays.

    `head` names the method whose parameters are wanted, such as "classification_logits"; None takes that of the
    model's task, which is pre-training unless the model was built for another. Pure: wrap it in
    `jax.jit` with `out_shardings`, or in `jax.eval_shape` for shapes alone.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    method = model.METHODS[model.task] if head is None else head
    return model.init(rng, tokens, method=method)["params"]
