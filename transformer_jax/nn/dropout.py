"""Dropout (Srivastava et al. 2014) whose bits cost next to nothing.

A mask needs no cryptographic bits: each element's number in its array, mixed with two words of the
key, is hashed by a few integer operations that XLA fuses into the multiplication. Threefry takes
about ten times as many, which on a CPU is as long as the matrix product beside it. The mask is a
function of key and place alone: the same under `jit`, sharding and any number of devices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key


def keep_mask(rng: Key[Array, ""], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """True with probability 1 - rate, independently at each place of an array."""
    k0, k1 = jax.random.bits(rng, (2,), jnp.uint32)
    place, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    # The finalizer of Wellons' "lowbias32", with the key's other word between its two rounds.
    h = place * jnp.uint32(0x9E3779B9) ^ k0
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = ((h ^ (h >> 15)) + k1) * jnp.uint32(0x846CA68B)
    h ^= h >> 16
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    h ^= h >> 13
    return h >= jnp.asarray(rate * 2.0**32, jnp.float32).astype(jnp.uint32)


def dropout(
    x: Float[Array, "..."], rate: float | Array, rng: Key[Array, ""]
) -> Float[Array, "..."]:
    """`x` with a share `rate` of its elements at zero and the others larger by as much."""
    return jnp.where(keep_mask(rng, x.shape, rate), x / jnp.asarray(1 - rate, x.dtype), 0)


class Dropout(nn.Module):
    """`dropout` under the key "dropout" of a call; the identity where that is deterministic."""

    rate: float

    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        if deterministic or not self.rate:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))
