"""Linear, LayerNorm, Embed and Bias: the layers that create all parameters of the models.

Parameters are float32; `dtype` is the compute dtype. LayerNorm always computes its statistics in
float32.

Layers also apply parameters that `init` never creates, if they are present in the parameter tree:

- PEFT parameters, such as `lora_a` (`finetuning.peft`);
- frozen kernels and embeddings in another dtype, or as int8 values with a scale
  (`finetuning.quantize`);
- for decoding, transposed kernels `kernel_t`, and int8 embedding tables `embedding_t`; an output
  layer with such a table also quantizes its inputs to int8 (`generation.decoding`).

Shape suffixes: B batch, T length, D d_model, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn.dropout import dropout
from transformer_jax.nn.matmul import matmul, matmul_transposed, matmul_transposed_int8
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


def embedding_init(initializer: str, std: float) -> Callable:
    """Returns the initializer of embeddings for a kernel initializer.

    It is the same one, except that "normal" replaces "xavier_uniform".
    """
    return INITIALIZERS["normal" if initializer == "xavier_uniform" else initializer](std)


def _optional_param(module: nn.Module, name: str) -> Array | None:
    """Returns a parameter that `init` does not create (PEFT or quantized), or None if absent."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def get_weight(
    module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]
) -> tuple[Array, Array | None]:
    """Returns a weight of a module, which may be quantized.

    Returns:
        (weight, None); or (int8 values, scale) if the weight is quantized.
    """
    if (quantized := _optional_param(module, f"{name}_int8")) is not None:
        return quantized, _optional_param(module, f"{name}_scale")
    return module.param(name, init, shape), None


def dequantize(kernel: Array, scale: Array | None) -> Array:
    """Returns a float32 kernel from int8 values and the scale of each output feature.

    Without a scale, casts the kernel to float32.
    """
    kernel = kernel.astype(jnp.float32)
    return kernel if scale is None else kernel * scale


class Linear(nn.Module):
    """A linear layer, which contracts the last axes of its input with a kernel and adds a bias.

    The kernel keeps the head axes separate, so that heads can be sharded, frozen or selected by
    name: a query projection is `[D, N, H]`, an output projection `[N, H, D]`.

    Attributes:
        features: the sizes of the output axes.
        num_contracted_axes: the number of trailing input axes that are contracted.
        use_bias: whether to add a bias.
        kernel_init: the initializer of the kernel.
        dtype: the compute dtype.

    Example:
        >>> query = Linear(features=(4, 8))
        >>> out, variables = query.init_with_output(jax.random.key(0), jnp.ones((2, 5, 32)))
        >>> out.shape, variables["params"]["kernel"].shape
        ((2, 5, 4, 8), (32, 4, 8))
    """

    features: tuple[int, ...]
    num_contracted_axes: int = 1
    use_bias: bool = True
    kernel_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool = True) -> Float[Array, "..."]:
        """Applies the layer; `deterministic` disables the dropout of LoRA."""
        kernel_shape = x.shape[-self.num_contracted_axes :] + self.features
        if (ia3_input := _optional_param(self, "ia3_input")) is not None:
            x = x * ia3_input
        x, scale = x.astype(self.dtype), None
        if (kernel := _optional_param(self, "kernel_t")) is not None:
            x_flat = x.reshape(*x.shape[: x.ndim - self.num_contracted_axes], -1)
            matrix = kernel.reshape(-1, x_flat.shape[-1])  # [out, in]
            if kernel.dtype == jnp.int8:
                matrix_scale = _optional_param(self, "kernel_t_scale").reshape(-1)
                y = matmul_transposed_int8(x_flat, matrix, matrix_scale).astype(self.dtype)
            else:
                y = matmul_transposed(x_flat, matrix.astype(self.dtype))
            y = y.reshape(*x_flat.shape[:-1], *self.features)
        else:
            kernel, scale = get_weight(self, "kernel", self._init_kernel, kernel_shape)
            y = matmul(x, kernel.astype(self.dtype), self.num_contracted_axes)
        if scale is not None:
            y = y * scale.astype(self.dtype)
        if (lora_b := _optional_param(self, "lora_b")) is not None:
            y = self._add_lora(x, y, kernel, scale, lora_b, deterministic)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = y + bias.astype(self.dtype)
        if (ia3_output := _optional_param(self, "ia3_output")) is not None:
            y = y * ia3_output.astype(self.dtype)
        return y

    def _add_lora(self, x, y, kernel, scale, lora_b, deterministic):
        """Returns y + s x A B, where y = x W and s is `lora_scale` (Hu et al. 2021, "LoRA", 4.1).

        With a `lora_magnitude` m (DoRA), returns m * (x (W + s A B)) / |W + s A B| instead. The
        norm is that of the column of each output feature, and is treated as a constant in the
        backward pass (Liu et al. 2024, "DoRA", sections 4.1 and 4.3).
        """
        lora_a, lora_scale = _optional_param(self, "lora_a"), _optional_param(self, "lora_scale")
        rate = _optional_param(self, "lora_dropout")
        if rate is not None and not deterministic:
            x = dropout(x, rate, self.make_rng("dropout"))
        low_rank = matmul(x, lora_a.astype(self.dtype), self.num_contracted_axes)
        low_rank = low_rank * lora_scale.astype(self.dtype)
        y = y + matmul(low_rank, lora_b.astype(self.dtype))
        magnitude = _optional_param(self, "lora_magnitude")
        if magnitude is None:
            return y
        merged_kernel = (
            dequantize(kernel, scale) + lora_scale * jnp.tensordot(lora_a, lora_b, axes=1))
        norm = jnp.sqrt(jnp.square(merged_kernel).sum(tuple(range(self.num_contracted_axes))))
        norm = jnp.maximum(jax.lax.stop_gradient(norm), jnp.finfo(jnp.float32).tiny)
        return y * (magnitude / norm).astype(self.dtype)

    def _init_kernel(self, rng, shape):
        """Initializes the kernel as a matrix [fan_in, fan_out], which initializers expect."""
        fan_in = math.prod(shape[: self.num_contracted_axes])
        fan_out = math.prod(shape[self.num_contracted_axes :])
        return self.kernel_init(rng, (fan_in, fan_out), jnp.float32).reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """Standardizes x to mean 0 and variance 1 along the last axis.

    Like `jax.nn.standardize`, but with a derivative in closed form.

    Example:
        >>> standardize(jnp.array([1.0, 5.0]), epsilon=0.0).tolist()
        [-1.0, 1.0]
    """
    return _standardize(x, epsilon)[0]


def _standardize(x, epsilon):
    """Returns the standardized x and the inverse standard deviation."""
    mean = x.mean(-1, keepdims=True)
    inv_std = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)
    if jax.default_backend() == "gpu":
        # The barrier saves the statistics for the backward pass. Without it, XLA recomputes them
        # for each gradient and stores arrays derived from them, and GPT-2's training step takes
        # 3 % longer.
        mean, inv_std = jax.lax.optimization_barrier((mean, inv_std))
    return (x - mean) * inv_std, inv_std


@standardize.defjvp
def _(epsilon, primals, tangents):
    """The derivative of `standardize` in closed form.

    The derivative is self-adjoint, so the backward pass is the same formula, and it saves only two
    arrays. For the derivative that autodiff would produce, XLA creates strided copies.
    """
    (x,), (t,) = primals, tangents
    y, inv_std = _standardize(x, epsilon)
    return y, inv_std * (t - t.mean(-1, keepdims=True) - y * (y * t).mean(-1, keepdims=True))


@jax.custom_jvp
def materialize_cotangent(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The identity function, whose cotangent is computed once and stored in memory.

    XLA on CPU fuses elementwise operations into each of their consumers, which repeats their
    computation. Two such repetitions each took a third of the time of a training step: the
    cotangent of the residual stream, a sum over all later layers that every layer recomputed (LoRA,
    12 layers), and the cotangent of an activation, which was recomputed for the gradients of a
    kernel, of its LoRA parameters and of its bias (trainable spec `lora:8:all`).

    XLA removes optimization barriers before fusion, but it does not fuse through a conditional, so
    the cotangent passes through one.
    """
    return x


@materialize_cotangent.defjvp
def _(primals, tangents):
    def through_conditional(x):
        always_true = jax.lax.optimization_barrier(jnp.array(True))
        return jax.lax.cond(always_true, lambda x: x, lambda x: x * jnp.nan, x)

    (x,), (t,) = primals, tangents
    return x, jax.lax.platform_dependent(t, cpu=through_conditional, default=lambda t: t)


class LayerNorm(nn.Module):
    """Layer normalization over the last axis: (x - mean) / sqrt(variance + epsilon) * scale + bias.

    Ba et al. 2016, "Layer Normalization" (arXiv 1607.06450), eq. 4.

    Attributes:
        epsilon: added to the variance.
        dtype: the dtype of the output; statistics are float32.
    """

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        y = standardize(x.astype(jnp.float32), self.epsilon) * scale + bias
        return y.astype(self.dtype)


class LazyLogits(NamedTuple):
    """Unevaluated logits: the inputs and parameters of the output layer.

    A loss that takes these instead of logits does not have to store an array `[B, T, V]`
    (`objectives.chunked_cross_entropy`).

    Attributes:
        hidden: hidden states, in the compute dtype.
        embedding: the weight matrix of the output layer.
        scale: the scale of each row of `embedding` if it is int8.
        bias: the bias of the output layer.
        quantize_activations: True to quantize hidden states to int8, which requires an int8
            `embedding`. None instead of False, so that the pytree has no additional leaf.

    Example:
        >>> lazy_logits = LazyLogits(hidden=jnp.ones((2, 5, 16)), embedding=jnp.ones((100, 16)))
        >>> lazy_logits.logits().shape
        (2, 5, 100)
    """

    hidden: Float[Array, "... D"]
    embedding: Float[Array, "V D"]
    scale: Float[Array, "V"] | None = None
    bias: Float[Array, "V"] | None = None
    quantize_activations: bool | None = None

    def logits(self) -> Float[Array, "... V"]:
        """Computes hidden @ embedding.T * scale + bias in float32."""
        if self.quantize_activations:
            logits = matmul_transposed_int8(self.hidden, self.embedding, self.scale)
        else:
            logits = matmul_transposed(
                self.hidden, self.embedding.astype(self.hidden.dtype), jnp.float32)
            logits = logits if self.scale is None else logits * self.scale
        logits = constrain(logits, BATCH_AXES, *["sequence"] * (logits.ndim - 2), "tensor")
        return logits if self.bias is None else logits + self.bias


class Embed(nn.Module):
    """An embedding table, which can also serve as the output layer (tied embeddings).

    Attributes:
        num_embeddings: the number of rows of the table.
        features: the dimension of an embedding.
        embedding_init: the initializer of the table.
        dtype: the compute dtype.
    """

    num_embeddings: int
    features: int
    embedding_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.quantize_activations = _optional_param(self, "embedding_t") is not None
        if self.quantize_activations:
            self.embedding = _optional_param(self, "embedding_t")
            self.scale = _optional_param(self, "embedding_t_scale")
        else:
            self.embedding, self.scale = get_weight(self, "embedding", self._init_table, shape)
        self.extra = _optional_param(self, "extra")

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Looks up embeddings.

        If the PEFT parameter `extra` is present, ids of `num_embeddings` or more select its rows.
        Ids are not checked: too large ones give NaN, and negative ones index from the end.
        """
        rows = self._lookup(
            ids if self.extra is None else jnp.minimum(ids, self.num_embeddings - 1))
        if self.extra is not None:
            extra_rows = jnp.take(self.extra, jnp.maximum(ids - self.num_embeddings, 0), axis=0)
            rows = jnp.where(
                (ids < self.num_embeddings)[..., None], rows, extra_rows.astype(self.dtype))
        # Each device looks up its own shard of D. The rows are resharded to the layout of hidden
        # states only after the lookup, and their gradients before the scatter.
        rows = constrain(rows, "data", *[None] * (ids.ndim - 1), "fsdp")
        return constrain_hidden(rows)

    def _init_table(self, rng, shape):
        return self.embedding_init(rng, shape, jnp.float32)

    def _lookup(self, ids):
        rows = jnp.take(self.embedding, ids, axis=0).astype(self.dtype)
        if self.scale is None:
            return rows
        return rows * jnp.take(self.scale, ids, axis=0)[..., None].astype(self.dtype)

    def project(self, hidden: Float[Array, "... D"]) -> LazyLogits:
        """Returns unevaluated logits, with the table as output layer (Press & Wolf 2017)."""
        return LazyLogits(
            hidden.astype(self.dtype), self.embedding, self.scale,
            quantize_activations=True if self.quantize_activations else None)


class Bias(nn.Module):
    """A bias of the logits of a tied output layer."""

    features: int

    @nn.compact
    def __call__(self, lazy_logits: LazyLogits) -> LazyLogits:
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return lazy_logits._replace(bias=bias)
