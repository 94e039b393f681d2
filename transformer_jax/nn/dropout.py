"""Dropout (Srivastava et al. 2014) with a counter-based hash as random number generator.

A dropout mask needs no cryptographic random bits. The index of each element is hashed together
with two words of the key by a few integer operations, which XLA fuses into the multiplication.
Threefry, the default generator of JAX, takes about ten times as many operations; on a CPU, these
take as long as the adjacent matmul. The mask depends on the key and the index only, so it is the
same under `jit`, under any sharding and on any number of devices.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Key


def keep_mask(rng: Key[Array, ""], shape: tuple[int, ...], rate: float) -> Bool[Array, "..."]:
    """Samples a mask whose elements are independently True with probability 1 - rate."""
    k0, k1 = jax.random.bits(rng, (2,), jnp.uint32)
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    # The two rounds of Wellons' hash function "lowbias32", then a third one like them. The second
    # word of the key is added before the second multiplication.
    h = index * jnp.uint32(0x9E3779B9) ^ k0
    h = (h ^ (h >> 16)) * jnp.uint32(0x7FEB352D)
    h = ((h ^ (h >> 15)) + k1) * jnp.uint32(0x846CA68B)
    h ^= h >> 16
    h = (h ^ (h >> 15)) * jnp.uint32(0x2C1B3C6D)
    h ^= h >> 13
    return h >= jnp.asarray(rate * 2.0**32, jnp.float32).astype(jnp.uint32)


def dropout(
    x: Float[Array, "..."], rate: float | Array, rng: Key[Array, ""]
) -> Float[Array, "..."]:
    """Sets a fraction `rate` of the elements of x to zero and divides the others by 1 - rate."""
    return jnp.where(keep_mask(rng, x.shape, rate), x / jnp.asarray(1 - rate, x.dtype), 0)


class Dropout(nn.Module):
    """Dropout with the key of the "dropout" RNG collection; the identity if deterministic."""

    rate: float

    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        if deterministic or not self.rate:
            return x
        return dropout(x, self.rate, self.make_rng("dropout"))
