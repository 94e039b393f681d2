"""The layers that own parameters; nothing else in the library creates one.

Parameters are float32; `dtype` is the type of the arithmetic. LayerNorm statistics are always
computed in float32. Shape suffixes: B batch, T length, D d_model, V vocabulary.
"""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.sharding import constrain, constrain_batch

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),  # x * Phi(x); BERT's checkpoints
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),  # GPT, GPT-2
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
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        shape = x.shape[-self.contract :] + self.features
        kernel = self.param("kernel", self._init, shape)
        y = jnp.tensordot(x.astype(self.dtype), kernel.astype(self.dtype), axes=self.contract)
        if not self.use_bias:
            return y
        bias = self.param("bias", nn.initializers.zeros, self.features, jnp.float32)
        return y + bias.astype(self.dtype)

    def _init(self, rng, shape):
        """Drawn as the matrix it stands for, whose two sides a law may look at."""
        inputs, outputs = math.prod(shape[: self.contract]), math.prod(shape[self.contract :])
        return self.kernel_init(rng, (inputs, outputs), jnp.float32).reshape(shape)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv 1607.06450, eq. 4)."""

    epsilon: float
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        variance = jnp.square(centred).mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
        return y.astype(self.dtype)


class Embed(nn.Module):
    """A table of `num_embeddings` rows, looked up by id or, transposed, used as output layer."""

    num_embeddings: int
    features: int
    embedding_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        shape = (self.num_embeddings, self.features)
        self.embedding = self.param("embedding", self.embedding_init, shape, jnp.float32)

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Rows for `ids`. Ids outside the table give NaN, negative ones count from its end: check
        them on the host."""
        rows = jnp.take(self.embedding, ids, axis=0).astype(self.dtype)
        # Each device looks up its cut of D; only then are rows exchanged, and gradients likewise.
        rows = constrain(rows, "data", *[None] * (ids.ndim - 1), "fsdp")
        return constrain_batch(rows)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of a tied output layer (Press & Wolf 2017), in float32."""
        logits = jnp.einsum(
            "...D,VD->...V",
            x.astype(self.dtype),
            self.embedding.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return constrain_batch(logits)


class Bias(nn.Module):
    """A bias on its own: the output bias of a tied decoder."""

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "... V"]) -> Float[Array, "... V"]:
        return x + self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
