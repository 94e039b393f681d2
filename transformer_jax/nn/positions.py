"""Position embeddings: fixed sinusoids or a learned table."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn.layers import Embed


def sinusoidal_positions(
    length: int, features: int, interleave: bool = True
) -> Float[np.ndarray, "length features"]:
    """Computes the fixed position encoding of Vaswani et al. 2017, section 3.5.

    Row p has the values sin(p / 10000^(2i / features)) in dimension 2i and
    cos(p / 10000^(2i / features)) in dimension 2i + 1. Wavelengths increase from 2 pi to
    10000 * 2 pi positions.

    Args:
        length: the number of positions.
        features: the dimension of an encoding; even.
        interleave: whether sines and cosines alternate. If False, all sines precede all cosines,
            as in the checkpoints of Marian.

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
    order = (1, 2, 0) if interleave else (1, 0, 2)
    return waves.transpose(order).reshape(length, features)


class SinusoidalEmbed(nn.Module):
    """Fixed position embeddings, with the interface of `Embed`. It has no parameters.

    Attributes:
        max_length: the number of positions.
        features: the dimension of an embedding.
        interleave: as for `sinusoidal_positions`.
        dtype: the dtype of the embeddings.
    """

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

    Args:
        kind: "learned" for a table of parameters; "sinusoidal" for fixed sinusoids;
            "sinusoidal_halves" for fixed sinusoids in which all sines precede all cosines; or a
            function or Flax module class that takes the other arguments of this function and
            returns the position embedding.
        max_length: the number of positions.
        features: the dimension of an embedding.
        embedding_init: the initializer of a learned table.
        dtype: the dtype of the embeddings.
    """
    if callable(kind):
        return kind(max_length, features, embedding_init=embedding_init, dtype=dtype)
    if kind != "learned":
        return SinusoidalEmbed(max_length, features, kind == "sinusoidal", dtype)
    return Embed(max_length, features, embedding_init, dtype)
