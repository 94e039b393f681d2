"""Linear, LayerNorm, Embed and Bias, which create all parameters, and position embeddings.

Parameters are float32; `dtype` is the compute dtype. Layers also apply parameters that `init` never
creates, if they are present: PEFT parameters (`nn.peft`), and weights in int8 or transposed for
decoding (`nn.quantized`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn import backends, peft, quantized
from transformer_jax.sharding import BATCH_AXES, constrain, constrain_hidden


def _gelu(approximate: bool) -> Callable[[Array], Array]:
    """GELU that saves only its input for the backward pass, instead of four arrays of its size."""
    return jax.checkpoint(functools.partial(jax.nn.gelu, approximate=approximate))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu(approximate=False),  # x * Phi(x); BERT checkpoints
    "gelu_tanh": _gelu(approximate=True),  # GPT, GPT-2
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,  # Marian
    "tanh": jnp.tanh,
}

# Kernel initializers, by name, as functions of a standard deviation. GPT and BART use a normal
# distribution; BERT uses a normal distribution that is truncated at two standard deviations. The
# Transformer's code (tensor2tensor) uses the uniform distribution of Glorot & Bengio 2010, eq. 16,
# whose limits follow from fan-in and fan-out.
INITIALIZERS: dict[str, Callable[[float], Callable]] = {
    "normal": jax.nn.initializers.normal,
    "truncated_normal": jax.nn.initializers.truncated_normal,
    "xavier_uniform": lambda std: jax.nn.initializers.xavier_uniform(),
}


def get_activation(activation: str | Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Returns an activation function by its name in `ACTIVATIONS`; functions are returned as is."""
    return activation if callable(activation) else ACTIVATIONS[activation]


class Linear(nn.Module):
    """A linear layer, which contracts the last axes of its input with a kernel and adds a bias.

    The kernel keeps the head axes separate, so that heads can be sharded, frozen or selected by
    name: a query projection is `[D, N, H]`, an output projection `[N, H, D]`.

    Example:
        >>> query = Linear(features=(4, 8))
        >>> out, variables = query.init_with_output(jax.random.key(0), jnp.ones((2, 5, 32)))
        >>> out.shape, variables["params"]["kernel"].shape
        ((2, 5, 4, 8), (32, 4, 8))
    """

    features: tuple[int, ...]  # sizes of the output axes
    num_contracted_axes: int = 1  # trailing axes of the input
    use_bias: bool = True
    kernel_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool = True) -> Float[Array, "..."]:
        """Applies the layer; `deterministic` disables the dropout of LoRA."""
        if peft.modifies(self):
            return peft.linear(self, x, deterministic)
        kernel_shape = x.shape[-self.num_contracted_axes :] + self.features
        kernel = self.param("kernel", self.init_kernel, kernel_shape).astype(self.dtype)
        y = quantized.matmul(x.astype(self.dtype), kernel, self.num_contracted_axes)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = y + bias.astype(self.dtype)
        return y

    def init_kernel(self, rng: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        """Initializes the kernel as a matrix [fan_in, fan_out], which initializers expect."""
        fan_in = math.prod(shape[: self.num_contracted_axes])
        return self.kernel_init(rng, (fan_in, math.prod(shape) // fan_in), dtype).reshape(shape)


@backends.dispatched
def materialize_cotangent(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The identity, for an x whose cotangent several gradients use: a variant may store it."""
    return x


class LayerNorm(nn.Module):
    """Layer normalization over the last axis: (x - mean) / sqrt(variance + epsilon) * scale + bias.

    Ba et al. 2016, "Layer Normalization" (arXiv 1607.06450), eq. 4. Statistics are float32.
    """

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        centered = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centered).mean(-1, keepdims=True)
        y = centered * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
        return y.astype(self.dtype)


class LazyLogits(NamedTuple):
    """Unevaluated logits: the inputs and parameters of the output layer.

    A loss that takes these instead of logits does not have to store an array `[B, T, V]`
    (`objectives.cross_entropy`).

    Example:
        >>> lazy_logits = LazyLogits(hidden=jnp.ones((2, 5, 16)), embedding=jnp.ones((100, 16)))
        >>> lazy_logits.logits().shape
        (2, 5, 100)
    """

    hidden: Float[Array, "... D"]  # in the compute dtype
    embedding: Float[Array, "V D"]
    scale: Float[Array, "V"] | None = None  # of each row of an int8 embedding
    bias: Float[Array, "V"] | None = None
    # True to round hidden states to int8, for an int8 embedding. None instead of False, so that the
    # pytree has no additional leaf.
    quantize_activations: bool | None = None

    def logits(self) -> Float[Array, "... V"]:
        """Computes hidden @ embedding.T * scale + bias in float32."""
        if self.quantize_activations:
            logits = quantized.matmul_transposed_int8(self.hidden, self.embedding, self.scale)
        else:
            logits = quantized.matmul_transposed(
                self.hidden, self.embedding.astype(self.hidden.dtype), jnp.float32)
            logits = logits if self.scale is None else logits * self.scale
        logits = constrain(logits, BATCH_AXES, *["sequence"] * (logits.ndim - 2), "tensor")
        return logits if self.bias is None else logits + self.bias


class Embed(nn.Module):
    """An embedding table, which can also serve as the output layer (tied embeddings)."""

    num_embeddings: int
    features: int
    embedding_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.table = quantized.table(
            self, self.embedding_init, (self.num_embeddings, self.features))
        self.extra = quantized.optional_param(self, "extra")

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Looks up embeddings; ids of `num_embeddings` or more are added tokens (`extra`).

        Ids are not checked: too large ones give NaN, and negative ones index from the end.
        """
        lookup = functools.partial(quantized.lookup, self.table, dtype=self.dtype)
        rows = peft.lookup_with_extra(lookup, self.extra, ids, self.num_embeddings)
        # Each device looks up its own shard of D. The rows are resharded to the layout of hidden
        # states only after the lookup, and their gradients before the scatter.
        rows = constrain(rows, "data", *[None] * (ids.ndim - 1), "fsdp")
        return constrain_hidden(rows)

    def project(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """Returns unevaluated logits, with the table as output layer (Press & Wolf 2017)."""
        table = self.table
        return LazyLogits(hidden.astype(self.dtype), table.values, table.scale,
                          quantize_activations=table.quantize_activations)


class Bias(nn.Module):
    """A bias of the logits of a tied output layer."""

    features: int

    @nn.compact
    def __call__(self, lazy_logits: LazyLogits) -> LazyLogits:
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return lazy_logits._replace(bias=bias)


def sinusoidal_positions(
    length: int, features: int, interleave: bool = True
) -> Float[np.ndarray, "length features"]:
    """Computes the fixed position encoding of Vaswani et al. 2017, section 3.5.

    Row p has the values sin(p / 10000^(2i / features)) in dimension 2i and the cosine in dimension
    2i + 1: wavelengths increase from 2 pi to 10000 * 2 pi positions. Without `interleave`, all
    sines precede all cosines, as in the checkpoints of Marian.

    Raises:
        ValueError: `features` is odd.

    Example:
        >>> sinusoidal_positions(length=3, features=4)[0].tolist()
        [0.0, 1.0, 0.0, 1.0]
    """
    if features % 2:
        raise ValueError(f"features is {features}; it must be even for sinusoidal positions, which "
                         "pair sines with cosines. Use an even d_model, or learned positions")
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, features, 2) / features)
    waves = np.stack([np.sin(angles), np.cos(angles)])
    return waves.transpose((1, 2, 0) if interleave else (1, 0, 2)).reshape(length, features)


class SinusoidalEmbed(nn.Module):
    """Fixed position embeddings, with the interface of `Embed`. It has no parameters."""

    max_length: int
    features: int
    interleave: bool = True
    dtype: jnp.dtype = jnp.float32

    def __call__(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = sinusoidal_positions(self.max_length, self.features, self.interleave)
        return jnp.asarray(table, self.dtype)[positions]


def make_position_embed(
    kind: str | Callable, max_length: int, features: int, *, embedding_init: Callable,
    dtype: jnp.dtype,
) -> Callable:
    """Creates the position embedding of a model, a function from positions `[B, T]` to `[B, T, D]`.

    `kind` is "learned" for a table of parameters; "sinusoidal" or "sinusoidal_halves" (not
    interleaved) for `sinusoidal_positions`; or a function or Flax module class that takes the other
    arguments of this function and returns the position embedding.
    """
    if callable(kind):
        return kind(max_length, features, embedding_init=embedding_init, dtype=dtype)
    if kind != "learned":
        return SinusoidalEmbed(max_length, features, kind == "sinusoidal", dtype)
    return Embed(max_length, features, embedding_init, dtype)
