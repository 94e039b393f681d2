"""What stands on top of a stack: from hidden states to the numbers a task asks for."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.nn.layers import ACTIVATIONS, Bias, Embed, LayerNorm, Linear


def take_positions(
    hidden_BTD: Float[Array, "B T D"], positions_BP: Int[Array, "B P"]
) -> Float[Array, "B P D"]:
    """The hidden states at `positions` of each row."""
    return jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)


def last_tokens(
    tokens: Int[Array, "B T"], padding_mask: Bool[Array, "B T"] | None
) -> Int[Array, "B"]:
    """Where each row has its last real token, wherever its padding is."""
    B, T = tokens.shape
    if padding_mask is None:
        return jnp.full((B,), T - 1)
    return jnp.where(padding_mask, jnp.arange(T), 0).max(-1)


class MLMHead(nn.Module):
    """BERT's masked-word head: dense, activation, LayerNorm, then `decoder`, the tied token
    embedding, and a bias of its own (Devlin et al. 2018, section 3.1; `get_masked_lm_output` of the
    release)."""

    activation: str
    epsilon: float
    kernel_init: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, hidden: Float[Array, "... D"], decoder: Embed
    ) -> Float[Array, "... V"]:
        features = (hidden.shape[-1],)
        x = Linear(features, kernel_init=self.kernel_init, dtype=self.dtype, name="dense")(hidden)
        x = ACTIVATIONS[self.activation](x)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        return Bias(decoder.num_embeddings, name="output")(decoder.attend(x))

