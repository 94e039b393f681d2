"""Sizes and choices of a model, as frozen dataclasses that a run can print, save and compare."""

import dataclasses
import numbers
import typing
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from transformer_jax.nn.blocks import StackConfig
from transformer_jax.nn.layers import ACTIVATIONS, INITIALIZERS

POSITIONS = ("learned", "sinusoidal")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


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
        positions: "learned" or "sinusoidal" (fixed, Vaswani et al. 2017, section 3.5). With
            sinusoidal positions, token embeddings are scaled by sqrt(d_model) as in section 3.4,
            so that neither drowns the other.
        activation: one of "gelu" (exact), "gelu_tanh", "relu", "tanh".
        norm_first: LayerNorm before each sublayer and once at the end (GPT-2), or after each
            residual sum (the Transformer, GPT, BERT).
        initializer, init_std: law and standard deviation of initial weights; biases start at zero.
        dtype: "float32" or "bfloat16" for matmuls and activations. Parameters, softmax,
            LayerNorm statistics, logits and losses are float32 either way.

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
    activation: str = "gelu"
    norm_first: bool = False
    norm_epsilon: float = 1e-5
    initializer: str = "normal"
    init_std: float = 0.02
    dtype: str = "float32"

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
        choices = {"positions": POSITIONS, "activation": tuple(ACTIVATIONS),
                   "initializer": tuple(INITIALIZERS), "dtype": tuple(DTYPES)}
        for name, allowed in choices.items():
            value = getattr(self, name)
            _require(value in allowed, name, repr(value), f"one of {', '.join(allowed)}")
        _require(self.d_model % self.num_heads == 0, "d_model", self.d_model,
                 f"a multiple of num_heads {self.num_heads}")
        if self.positions == "sinusoidal":
            _require(self.d_model % 2 == 0, "d_model", self.d_model,
                     "even for sinusoidal positions")

    @property
    def residual_init_std(self) -> float:
        return self.init_std

    @property
    def embedding_scale(self) -> float:
        return self.d_model**0.5 if self.positions == "sinusoidal" else 1.0

    @property
    def compute_dtype(self) -> jnp.dtype:
        return DTYPES[self.dtype]

    @property
    def stack(self) -> StackConfig:
        shared = {f: getattr(self, f) for f in StackConfig._fields if f != "dtype"}
        return StackConfig(**shared, dtype=self.compute_dtype)

    def replace(self, **changes) -> "Config":
        """A copy with some fields changed (and checked again)."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(Config):
    """GPT (Radford et al. 2018) with `norm_first=False`, GPT-2 (Radford et al. 2019) with True.

    Attributes:
        context_size: how many tokens, itself included, a position attends to; None for all.
        scale_residual_init: divide the initial weights of layers that write to the residual
            stream by sqrt(number of such layers) (GPT-2 paper, section 2.3).
    """

    activation: str = "gelu_tanh"
    context_size: int | None = None
    scale_residual_init: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.context_size is not None:
            _require(self.context_size >= 1, "context_size", self.context_size,
                     "at least 1, or None for no limit")

    @property
    def residual_init_std(self) -> float:
        writers = 2 * self.num_layers
        return self.init_std / writers**0.5 if self.scale_residual_init else self.init_std


@dataclass(frozen=True, kw_only=True)
class BERTConfig(Config):
    """BERT (Devlin et al. 2018). `num_segments` rows of segment embedding: sentences A and B."""

    norm_epsilon: float = 1e-12
    initializer: str = "truncated_normal"
    num_segments: int = 2

    def __post_init__(self):
        super().__post_init__()
        _require(self.num_segments >= 1, "num_segments", self.num_segments, "at least 1")


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


def init_params(model: nn.Module, rng: jax.Array, head: str = "__call__") -> dict:
    """Random parameters, a nested dict of float32 arrays.

    `head` names the method whose parameters are wanted: "__call__" for pre-training heads,
    "classify" for the encoder or decoder with a classifier. Pure: wrap it in `jax.jit` with
    `out_shardings`, or in `jax.eval_shape` for shapes alone.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    return model.init(rng, tokens, method=head)["params"]
