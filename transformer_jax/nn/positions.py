"""Where a token stands: fixed sinusoids or a learned table."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn.layers import Embed


def sinusoidal(
    length: int, features: int, interleave: bool = True
) -> Float[np.ndarray, "length features"]:
    """Fixed position encoding of Vaswani et al. 2017, section 3.5.

    Row `p`, dimensions `2i` and `2i + 1`: sin and cos of `p / 10000^(2i / features)`; wavelengths
    grow from 2 pi to 10000 * 2 pi positions. Without `interleave` all sines stand before all
    cosines, as in the checkpoints of Marian.

    Raises:
        ValueError: `features` is odd.
    """
    if features % 2:
        raise ValueError(f"sinusoidal positions pair sines with cosines: {features} features is "
                         "odd; use an even d_model or learned positions")
    angles = np.arange(length)[:, None] / 10_000 ** (np.arange(0, features, 2) / features)
    waves = np.stack([np.sin(angles), np.cos(angles)])
    order = (1, 2, 0) if interleave else (1, 0, 2)
    return waves.transpose(order).reshape(length, features)


class Sinusoids(nn.Module):
    """`Embed` with fixed rows, those of `sinusoidal`; it owns no parameters."""

    max_length: int
    features: int
    interleave: bool = True
    dtype: jnp.dtype = jnp.float32

    def __call__(self, positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        table = sinusoidal(self.max_length, self.features, self.interleave)
        return jnp.asarray(table, self.dtype)[positions]


def make_position_embed(
    kind: str, max_length: int, features: int, *, embedding_init: Callable, dtype: jnp.dtype
) -> nn.Module:
    """The module that gives position vectors: `kind` "learned" owns a table, "sinusoidal" and
    "sinusoidal_halves" none."""
    if kind != "learned":
        return Sinusoids(max_length, features, kind == "sinusoidal", dtype)
    return Embed(max_length, features, embedding_init, dtype)
