"""Model configs: the sizes and options of a model, as frozen dataclasses.

A config is hashable, so it can be a static argument of `jax.jit`.
"""

import dataclasses
import numbers
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp

from transformer_jax.nn.attention import ATTENTION_IMPLS
from transformer_jax.nn.blocks import REMAT_POLICIES, StackConfig
from transformer_jax.nn.layers import ACTIVATIONS, INITIALIZERS

POSITIONS = ("learned", "sinusoidal", "sinusoidal_halves")
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
# Larger values are mistakes, or come from a config file that was crafted to exhaust memory.
MAX_SIZES = {"vocab_size": 2**24, "max_length": 2**24, "position_offset": 2**20,
             "num_layers": 10_000, "d_model": 2**20, "mlp_dim": 2**22}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Fields of all model configs.

    Attributes:
        vocab_size: the number of rows of the token embedding, and the width of the output layer.
        max_length: the length of the longest sequence, in tokens.
        num_layers: the number of blocks of the stack.
        d_model: the dimension of hidden states.
        num_heads: the number of attention heads, of `d_model / num_heads` dimensions each.
        mlp_dim: the hidden dimension of the MLPs.
        dropout_rate: dropout on embeddings, and on each sublayer's output before the residual sum.
        attention_dropout_rate: the rate of dropout on attention weights.
        positions: "learned"; "sinusoidal" (fixed, Vaswani et al. 2017, section 3.5);
            "sinusoidal_halves", in which all sines precede all cosines, as in Marian checkpoints;
            or a function, see `nn.layers.make_position_embed`.
        position_offset: the number of rows of the position table before that of position 0: 2 in
            BART and RoBERTa. The table has `max_length + position_offset` rows.
        scale_embedding: whether to multiply token embeddings by sqrt(d_model) (Vaswani et al. 2017,
            section 3.4), so that token and position embeddings have similar magnitudes. None: True
            if positions are sinusoidal, else False.
        tie_embeddings: whether the output layer is the token embedding (Press & Wolf 2017). If
            False, it is a separate matrix, `lm_head`.
        activation: the activation function of the MLPs: "gelu" (exact), "gelu_tanh", "relu",
            "swish", "tanh", or a function of an array.
        block: the class of the blocks, with the interface of `nn.Block`; None for `nn.Block`.
            Configs with a block class or with functions cannot be saved.
        norm_first: whether LayerNorm precedes each sublayer and follows the last block (pre-norm,
            GPT-2). If False, it follows each residual sum (post-norm: the Transformer, GPT, BERT).
        residual: whether sublayers have residual connections, as in all papers; False is for
            ablations.
        norm_epsilon: added to the variance in LayerNorm.
        initializer: the distribution of initial weights: "normal", "truncated_normal" or
            "xavier_uniform". Biases are initialized to zero.
        init_std: the standard deviation of initial weights. With "xavier_uniform" it applies only
            to embeddings, because the distribution of a kernel follows from its shape.
        dtype: the compute dtype of matmuls and activations: "float32" or "bfloat16". Parameters,
            softmax, LayerNorm statistics, logits and losses are always float32.
        attention_impl: "auto", "xla", "cudnn" or "splash"; see
            `nn.attention.dot_product_attention`.
        remat: which activations the backward pass recomputes instead of keeping them in memory
            (Chen et al. 2016): "none"; "dots", all but the products with weight matrices; or
            "full", all activations inside a block, which takes a third more arithmetic.
        pad_token_id, bos_token_id, eos_token_id: special tokens of a checkpoint, for generation and
            for tasks that need the end of a text; None if it does not define them.

    Raises:
        ValueError: a value has the wrong type or is out of range.

    Example:
        >>> config = GPTConfig(vocab_size=50_257, max_length=1024, num_layers=12, d_model=768,
        ...                    num_heads=12, mlp_dim=3072)
        >>> config.replace(num_layers=24).num_layers
        24
    """

    vocab_size: int
    max_length: int
    num_layers: int
    d_model: int
    num_heads: int
    mlp_dim: int
    dropout_rate: float = 0.1
    attention_dropout_rate: float = 0.1
    positions: str | Callable = "learned"
    position_offset: int = 0
    scale_embedding: bool | None = None
    tie_embeddings: bool = True
    activation: str | Callable = "gelu"
    block: Callable | None = None
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

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        for name in ("vocab_size", "max_length", "num_layers", "d_model", "num_heads", "mlp_dim"):
            self._require(name, lambda v: v >= 1, "at least 1")
        for name in ("dropout_rate", "attention_dropout_rate"):
            self._require(name, lambda v: 0 <= v < 1, "at least 0 and less than 1")
        for name in ("norm_epsilon", "init_std"):
            self._require(name, lambda v: 0 < v < float("inf"), "a finite number above 0")
        self._require("position_offset", lambda v: v >= 0, "at least 0")
        for name, limit in MAX_SIZES.items():
            self._require(name, lambda v, limit=limit: v <= limit, f"at most {limit:,}")
        self._require_choice("positions", POSITIONS)
        self._require_choice("activation", ACTIVATIONS)
        self._require_choice("initializer", INITIALIZERS)
        self._require_choice("dtype", DTYPES)
        self._require_choice("attention_impl", ATTENTION_IMPLS)
        self._require_choice("remat", REMAT_POLICIES)
        self._require("d_model", lambda v: v % self.num_heads == 0,
                      f"a multiple of num_heads {self.num_heads}")
        if self.has_sinusoidal_positions:
            self._require("d_model", lambda v: v % 2 == 0, "even for sinusoidal positions")

    def _require(self, name: str, is_valid: Callable[[Any], bool], valid_range: str) -> None:
        value = getattr(self, name)
        if not is_valid(value):
            shown = repr(value) if isinstance(value, str) else value
            raise ValueError(f"{name} is {shown}; it must be {valid_range}")

    def _require_choice(self, name: str, supported: Iterable[str]) -> None:
        self._require(name, lambda v: callable(v) or v in supported,
                      f"one of {', '.join(supported)}")

    @property
    def residual_init_std(self) -> float:
        """Initial standard deviation of kernels whose output is added to the residual stream."""
        return self.init_std

    @property
    def has_sinusoidal_positions(self) -> bool:
        """Whether positions are fixed sinusoids."""
        return self.positions in ("sinusoidal", "sinusoidal_halves")

    @property
    def embedding_scale(self) -> float:
        """The factor by which token embeddings are multiplied."""
        is_scaled = self.scale_embedding
        is_scaled = self.has_sinusoidal_positions if is_scaled is None else is_scaled
        return self.d_model**0.5 if is_scaled else 1.0

    @property
    def position_table_size(self) -> int:
        """The number of rows of the position table."""
        return self.max_length + self.position_offset

    def embedding_init(self) -> Callable:
        """Returns the initializer of embeddings: that of kernels, or normal for xavier_uniform."""
        is_xavier = self.initializer == "xavier_uniform"
        return INITIALIZERS["normal" if is_xavier else self.initializer](self.init_std)

    @property
    def compute_dtype(self) -> jnp.dtype:
        """`dtype` as a JAX dtype."""
        return DTYPES[self.dtype]

    @property
    def stack(self) -> StackConfig:
        """The hyperparameters of the stack; of the encoder in an encoder-decoder."""
        not_copied = StackConfig._field_defaults.keys() | {"dtype"}
        copied = {f: getattr(self, f) for f in StackConfig._fields if f not in not_copied}
        return StackConfig(**copied, dtype=self.compute_dtype, block=self.block)

    def replace(self, **changes) -> "Config":
        """Returns a copy with some fields changed. The new values are checked."""
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True, kw_only=True)
class GPTConfig(Config):
    """Config of GPT (Radford et al. 2018) and, with `norm_first`, of GPT-2 (Radford et al. 2019).

    Attributes:
        attention_window: the number of most recent tokens that a token attends to, itself included;
            None for all.
        scale_residual_init: whether the initial weights of layers whose output is added to the
            residual stream are divided by sqrt(number of such layers) (GPT-2 paper, section 2.3).
        classifier_bias: whether the classifier of the task "classification" has a bias; those of
            other tasks always have one.
    """

    activation: str | Callable = "gelu_tanh"
    attention_window: int | None = None
    scale_residual_init: bool = False
    classifier_bias: bool = True

    def __post_init__(self):
        super().__post_init__()
        self._require("attention_window", lambda v: v is None or v >= 1,
                      "at least 1, or None for no limit")

    @property
    def residual_init_std(self) -> float:
        num_residual_layers = 2 * self.num_layers  # attention and MLP of each block
        return self.init_std / num_residual_layers**0.5 if self.scale_residual_init else (
            self.init_std)

    @property
    def decoder_stack(self) -> StackConfig:
        """The hyperparameters of the only stack."""
        return self.stack


@dataclass(frozen=True, kw_only=True)
class BERTConfig(Config):
    """Config of BERT (Devlin et al. 2018) and of models with the same architecture.

    Such models are RoBERTa (Liu et al. 2019), in which positions count only tokens that are not
    padding (`position_offset`), and DistilBERT (Sanh et al. 2019).

    Attributes:
        num_segments: rows of the segment embedding: 2 (sentences A and B), or 0 (DistilBERT).
        pooler_activation: "tanh" in BERT, "relu" in DistilBERT.
        pooling: the input of the classifier: "first", the pooled first token (BERT), or "mean", the
            mean of all tokens (Reimers & Gurevych 2019, "Sentence-BERT", section 3), for which
            sentence encoders such as all-MiniLM-L6-v2 were trained.
    """

    norm_epsilon: float = 1e-12
    initializer: str = "truncated_normal"
    num_segments: int = 2
    pooler_activation: str = "tanh"
    pooling: str = "first"

    def __post_init__(self):
        super().__post_init__()
        self._require_choice("pooling", ("first", "mean"))
        self._require("num_segments", lambda v: v >= 0, "at least 0")
        self._require_choice("pooler_activation", ACTIVATIONS)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(Config):
    """Config of the encoder-decoder Transformer (Vaswani et al. 2017).

    Attributes:
        num_decoder_layers, num_decoder_heads, decoder_mlp_dim: sizes of the decoder; None for those
            of the encoder.
        embed_norm: whether LayerNorm is applied to the sum of embeddings (BART).
        output_bias: whether the logits have a bias.
        decoder_start_token_id: the first input of the decoder.
        forced_bos_token_id: the first token of every generated text.
        forced_eos_token_id: the last token of a generated text that reaches the maximum length.
    """

    positions: str | Callable = "sinusoidal"
    activation: str | Callable = "relu"
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
            self._require(name, lambda v: v is None or v >= 1, "at least 1, or None")
        heads = self.num_decoder_heads or self.num_heads
        self._require("d_model", lambda v: v % heads == 0,
                      f"a multiple of num_decoder_heads {heads}")

    @property
    def decoder_stack(self) -> StackConfig:
        """The hyperparameters of the decoder."""
        return self.stack._replace(
            num_layers=self.num_decoder_layers or self.num_layers,
            num_heads=self.num_decoder_heads or self.num_heads,
            mlp_dim=self.decoder_mlp_dim or self.mlp_dim,
            cross_attention=True,
        )


@dataclass(frozen=True, kw_only=True)
class BARTConfig(TransformerConfig):
    """Config of BART (Lewis et al. 2019); `models.BART` lists the differences."""

    positions: str | Callable = "learned"
    position_offset: int = 2
    activation: str | Callable = "gelu"
    initializer: str = "normal"
    embed_norm: bool = True


# The types of values that a field of each declared type accepts, so that NumPy numbers are valid.
_ACCEPTED_TYPES = {int: numbers.Integral, float: numbers.Real}


def _check_type(field: dataclasses.Field, value: Any) -> None:
    declared = typing.get_args(field.type) or (field.type,)
    accepted = tuple(_ACCEPTED_TYPES.get(kind, kind) for kind in declared)
    # bool is a subclass of int, but not a valid size or rate.
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in declared):
        names = " or ".join("None" if kind is type(None) else kind.__name__ for kind in declared)
        raise ValueError(f"{field.name} is {value!r}, of type {type(value).__name__}; it must be "
                         f"{names}")
