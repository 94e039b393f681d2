"""Where a token stands: fixed sinusoids or a learned table."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int


def sinusoidal(length: int, features: int) -> Float[np.ndarray, "length features"]:
    """Fixed position encoding of Vaswani et al. 2017, section 3.5.

    Row `p`, dimensions `2i` and `2i + 1`: sin and cos of `p / 10000^(2i / features)`; wavelengths
    grow from 2 pi to 10000 * 2 pi positions.

    Raises:
        ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"sinusoidal positions pair sines with cosines: {features} features is "
                         "odd; use an even d_model or learned positions")
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, features, 2) / features)
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, features)


class PositionEmbed(nn.Module):
    """Position vectors: `kind` "learned" owns a table, "sinusoidal" owns nothing."""

    kind: str
    max_length: int
    features: int
    embedding_init: Callable = jax.nn.initializers.normal(0.02)
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        if self.kind == "sinusoidal":
            table = jnp.asarray(sinusoidal(self.max_length, self.features), self.dtype)
            return jnp.take(table, positions, axis=0)
        shape = (self.max_length, self.features)
        table = self.param("embedding", self.embedding_init, shape, jnp.float32)
        return jnp.take(table, positions, axis=0).astype(self.dtype)
