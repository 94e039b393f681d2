"""The layers that own parameters; nothing else in the library creates one.

Parameters are float32; `dtype` is the type of the arithmetic. LayerNorm statistics are always
computed in float32. Shape suffixes: B batch, T length, D d_model, V vocabulary.

Layers honour edits of their parameters (`finetuning.peft`): leaves that `init` never makes, such as
`lora_a`, count where they are present. A frozen kernel or embedding may be of another type, or be
int8 with a scale (`finetuning.quantize`).
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int, Int8

from transformer_jax.nn.dropout import dropout
from transformer_jax.sharding import BATCH_AXES, constrain, constrain_hidden


def _gelu(approximate: bool) -> Callable[[Array], Array]:
    """GELU that keeps its input alone for the way back, not four arrays of its size."""
    return jax.checkpoint(functools.partial(jax.nn.gelu, approximate=approximate))


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": _gelu(approximate=False),  # x * Phi(x); BERT's checkpoints
    "gelu_tanh": _gelu(approximate=True),  # GPT, GPT-2
    "relu": jax.nn.relu,
    "swish": jax.nn.swish,  # Marian
    "tanh": jnp.tanh,
}

# The laws that initial kernels are drawn from, given a standard deviation: GPT and BART normal,
# BERT normal cut off at two deviations. The Transformer's code (tensor2tensor) takes its width from
# each kernel's own shape instead (Glorot & Bengio 2010, eq. 16).
INITIALIZERS: dict[str, Callable[[float], Callable]] = {
    "normal": jax.nn.initializers.normal,
    "truncated_normal": jax.nn.initializers.truncated_normal,
    "xavier_uniform": lambda std: jax.nn.initializers.xavier_uniform(),
}


def embedding_init(initializer: str, std: float) -> Callable:
    """The law of initial embeddings: that of kernels, or normal where that has no deviation."""
    return INITIALIZERS["normal" if initializer == "xavier_uniform" else initializer](std)


MATVEC_MAX_ROWS = 32  # up to which `by_outputs` was faster on the CPUs that were measured


def _optional_param(module: nn.Module, name: str) -> Array | None:
    """A leaf that an edit of the parameters put into a layer."""
    return module.get_variable("params", name) if module.has_variable("params", name) else None


def get_weight(module: nn.Module, name: str, init: Callable, shape: tuple[int, ...]):
    """A matrix as it is kept: (values, None), or (int8, the scale to multiply outputs by)."""
    if (small := _optional_param(module, f"{name}_int8")) is not None:
        return small, _optional_param(module, f"{name}_scale")
    return module.param(name, init, shape), None


def dequantize(kernel: Array, scale: Array | None) -> Array:
    """The float32 kernel that int8 values and the scale of their outputs stand for."""
    kernel = kernel.astype(jnp.float32)
    return kernel if scale is None else kernel * scale


def matmul(x: Float[Array, "..."], kernel: Float[Array, "..."], contract: int = 1) -> Array:
    """The last `contract` axes of x against the first of a kernel.

    Of two matrices, but on a mesh, which may cut axes that this merges: of arrays with more axes,
    XLA for CPUs transposes operands of both gradients in memory first (GPT-2: 2 % of the step).
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.tensordot(x, kernel, axes=contract)
    inputs = math.prod(kernel.shape[:contract])
    y = x.reshape(-1, inputs) @ kernel.reshape(inputs, -1)
    return y.reshape(*x.shape[: x.ndim - contract], *kernel.shape[contract:])


def matmul_transposed(
    x: Float[Array, "... D"], matrix: Float[Array, "F D"], dtype: jnp.dtype | None = None
) -> Float[Array, "... F"]:
    """x @ matrix.T, of a matrix that is kept by outputs.

    XLA for CPUs packs the right side of a product anew each time. For the few rows of a text that
    is being written that costs as much as the product, so there the matrix is the left side; and a
    single row of bfloat16 meets its slowest loop, so there are two.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        return jnp.einsum("...D,FD->...F", x, matrix, preferred_element_type=dtype)
    rows = math.prod(x.shape[:-1])
    few = x.reshape(rows, x.shape[-1])
    if rows > MATVEC_MAX_ROWS or jax.default_backend() != "cpu":
        y = jnp.einsum("MD,FD->MF", few, matrix, preferred_element_type=dtype)
        return y.reshape(*x.shape[:-1], -1)
    if rows == 1 and matrix.dtype != jnp.float32:
        few = jnp.concatenate([few, few])
    y = jnp.einsum("FD,MD->FM", matrix, few, preferred_element_type=dtype)
    # Otherwise XLA turns the transposed product into the one with sides exchanged.
    y = jax.lax.optimization_barrier(y)[:, :rows].T
    return y.reshape(*x.shape[:-1], -1)


def matmul_transposed_int8(
    x: Float[Array, "... D"], matrix: Int8[Array, "F D"], scale: Float[Array, "F"]
) -> Float[Array, "... F"]:
    """x @ matrix.T * scale, float32, with each row of x rounded to 127 steps of its largest value.

    Both sides are then of 8 bits, for which CPUs have instructions, and a quarter of the bytes is
    read. (Dettmers et al. 2022, "LLM.int8()", section 2.2, vector-wise quantization.) There is no
    gradient. A single row meets XLA's slowest loop, so there are two.
    """
    rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    largest = jnp.abs(rows).max(-1, keepdims=True)
    unit = jnp.where(largest > 0, largest / 127, 1.0)
    few = jnp.round(rows / unit).astype(jnp.int8)
    if len(rows) == 1:
        few = jnp.concatenate([few, few])
    y = jnp.einsum("FD,MD->FM", matrix, few, preferred_element_type=jnp.int32)
    # As in `by_outputs`.
    y = jax.lax.optimization_barrier(y)[:, : len(rows)].T
    return (y.astype(jnp.float32) * unit * scale).reshape(*x.shape[:-1], -1)


class Linear(nn.Module):
    """Contract the last `contract` axes of the input with a kernel; add a bias.

    The kernel keeps its axes apart: a query projection is `[D, N, H]`, an output projection
    `[N, H, D]`, so that heads can be sharded, frozen or read by name.
    """

    features: tuple[int, ...]
    contract: int = 1
    use_bias: bool = True
    kernel_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool = True) -> Float[Array, "..."]:
        shape = x.shape[-self.contract :] + self.features
        if (ia3 := _optional_param(self, "ia3_input")) is not None:
            x = x * ia3
        x, scale = x.astype(self.dtype), None
        if (kernel := _optional_param(self, "kernel_t")) is not None:
            rows = x.reshape(*x.shape[: x.ndim - self.contract], -1)
            if kernel.dtype == jnp.int8:
                y = matmul_transposed_int8(rows, kernel.reshape(-1, rows.shape[-1]),
                                    _optional_param(self, "kernel_t_scale").reshape(-1)).astype(self.dtype)
            else:
                y = matmul_transposed(rows, kernel.astype(self.dtype).reshape(-1, rows.shape[-1]))
            y = y.reshape(*rows.shape[:-1], *self.features)
        else:
            kernel, scale = get_weight(self, "kernel", self._init, shape)
            y = matmul(x, kernel.astype(self.dtype), self.contract)
        if scale is not None:
            y = y * scale.astype(self.dtype)
        if (lora_b := _optional_param(self, "lora_b")) is not None:
            y = self._lora(x, y, kernel, scale, lora_b, deterministic)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
            y = y + bias.astype(self.dtype)
        if (ia3 := _optional_param(self, "ia3_output")) is not None:
            y = y * ia3.astype(self.dtype)
        return y

    def _lora(self, x, y, kernel, scale, lora_b, deterministic):
        """y + s x A B (Hu et al. 2021, "LoRA", section 4.1), s being `lora_scale`. With a
        `lora_magnitude` m, DoRA: m (W + s A B) / |W + s A B| instead of the sum, the norm of each
        output's column taken as a constant (Liu et al. 2024, sections 4.1 and 4.3)."""
        lora_a, lora_scale = _optional_param(self, "lora_a"), _optional_param(self, "lora_scale")
        rate = _optional_param(self, "lora_dropout")
        if rate is not None and not deterministic:
            x = dropout(x, rate, self.make_rng("dropout"))
        low = matmul(x, lora_a.astype(self.dtype), self.contract) * lora_scale.astype(self.dtype)
        y = y + matmul(low, lora_b.astype(self.dtype))
        magnitude = _optional_param(self, "lora_magnitude")
        if magnitude is None:
            return y
        whole = dequantize(kernel, scale) + lora_scale * jnp.tensordot(lora_a, lora_b, axes=1)
        norm = jnp.sqrt(jnp.square(whole).sum(tuple(range(self.contract))))
        norm = jnp.maximum(jax.lax.stop_gradient(norm), jnp.finfo(jnp.float32).tiny)
        return y * (magnitude / norm).astype(self.dtype)

    def _init(self, rng, shape):
        """Drawn as the matrix it stands for, whose two sides a law may look at."""
        inputs, outputs = math.prod(shape[: self.contract]), math.prod(shape[self.contract :])
        return self.kernel_init(rng, (inputs, outputs), jnp.float32).reshape(shape)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardize(x: Float[Array, "... D"], epsilon: float) -> Float[Array, "... D"]:
    """Mean 0 and variance 1 along the last axis."""
    return _standardize(x, epsilon)[0]


def _standardize(x, epsilon):
    mean = x.mean(-1, keepdims=True)
    per_std = jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)
    if jax.default_backend() == "gpu":
        # Kept for the way back. XLA would compute them again for each gradient, and store what it
        # made of them: 0.97 of GPT-2's step.
        mean, per_std = jax.lax.optimization_barrier((mean, per_std))
    return (x - mean) * per_std, per_std


@standardize.defjvp
def _(epsilon, primals, tangents):
    """The derivative in closed form. It is its own transpose, and keeps two arrays for the way
    back; XLA makes strided copies of the one that it is left to derive."""
    (x,), (t,) = primals, tangents
    y, per_std = _standardize(x, epsilon)
    return y, per_std * (t - t.mean(-1, keepdims=True) - y * (y * t).mean(-1, keepdims=True))


@jax.custom_jvp
def materialize_cotangent(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """`x`; its gradient is computed once and stored.

    XLA for CPUs fuses elementwise operations into each of their uses. The gradient of the residual
    stream is a sum of what all layers above send down, so each layer would compute it again from
    the top: a third of a LoRA step of 12 layers. That of an activation serves the products of a
    kernel, of a LoRA and of a bias: a third of a step of `lora:8:all`. XLA drops optimization
    barriers before it fuses, but does not fuse through a branch.
    """
    return x


@materialize_cotangent.defjvp
def _(primals, tangents):
    def branch(x):
        certain = jax.lax.optimization_barrier(jnp.array(True))
        return jax.lax.cond(certain, lambda x: x, lambda x: x * jnp.nan, x)

    (x,), (t,) = primals, tangents
    return x, jax.lax.platform_dependent(t, cpu=branch, default=lambda t: t)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv 1607.06450, eq. 4)."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        y = standardize(x.astype(jnp.float32), self.epsilon) * scale + bias
        return y.astype(self.dtype)


class LazyLogits(NamedTuple):
    """Hidden states and the output layer that they are for. A loss that takes these instead of
    logits need not hold `[B, T, V]` (`objectives.chunked_cross_entropy`)."""

    hidden: Float[Array, "... D"]  # of the type of the arithmetic
    embedding: Float[Array, "V D"]
    scale: Float[Array, "V"] | None = None  # of an int8 table
    bias: Float[Array, "V"] | None = None
    rounds: bool | None = None  # hidden states to 8 bits, as the table is; None is no leaf

    def logits(self) -> Float[Array, "... V"]:
        """hidden @ embedding.T * scale + bias, in float32."""
        if self.rounds:
            logits = matmul_transposed_int8(self.hidden, self.embedding, self.scale)
        else:
            logits = matmul_transposed(
                self.hidden, self.embedding.astype(self.hidden.dtype), jnp.float32)
            logits = logits if self.scale is None else logits * self.scale
        logits = constrain(logits, BATCH_AXES, *["sequence"] * (logits.ndim - 2), "tensor")
        return logits if self.bias is None else logits + self.bias


class Embed(nn.Module):
    """A table of `num_embeddings` rows, looked up by id or, transposed, used as output layer."""

    num_embeddings: int
    features: int
    embedding_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.rounds = _optional_param(self, "embedding_t") is not None
        if self.rounds:
            self.embedding, self.scale = _optional_param(self, "embedding_t"), _optional_param(
                self, "embedding_t_scale")
        else:
            self.embedding, self.scale = get_weight(self, "embedding", self._init, shape)
        self.extra = _optional_param(self, "extra")

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows for `ids`; those from `num_embeddings` on are in the edit `extra`, if there is one.
        Ids outside the table give NaN, negative ones count from its end: check them on the host."""
        rows = self._rows(ids if self.extra is None else jnp.minimum(ids, self.num_embeddings - 1))
        if self.extra is not None:
            more = jnp.take(self.extra, jnp.maximum(ids - self.num_embeddings, 0), axis=0)
            rows = jnp.where((ids < self.num_embeddings)[..., None], rows, more.astype(self.dtype))
        # Each device looks up its cut of D; only then are rows exchanged, and gradients likewise.
        rows = constrain(rows, "data", *[None] * (ids.ndim - 1), "fsdp")
        return constrain_hidden(rows)

    def _init(self, rng, shape):
        return self.embedding_init(rng, shape, jnp.float32)

    def _rows(self, ids):
        rows = jnp.take(self.embedding, ids, axis=0).astype(self.dtype)
        if self.scale is None:
            return rows
        return rows * jnp.take(self.scale, ids, axis=0)[..., None].astype(self.dtype)

    def project(self, x: Float[Array, "... D"]) -> LazyLogits:
        """The table as output layer (Press & Wolf 2017)."""
        rounds = True if self.rounds else None
        return LazyLogits(x.astype(self.dtype), self.embedding, self.scale, rounds=rounds)


class Bias(nn.Module):
    """A bias on its own: the output bias of a tied decoder."""

    features: int

    @nn.compact
    def __call__(self, projection: LazyLogits) -> LazyLogits:
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return projection._replace(bias=bias)
