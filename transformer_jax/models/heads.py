"""What stands on top of a stack: from hidden states to the numbers a task asks for."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.nn.attention import Mask
from transformer_jax.nn.blocks import StackOutput
from transformer_jax.nn.layers import ACTIVATIONS, Bias, Embed, LayerNorm, LazyLogits, Linear


def gather_positions(
    hidden_BTD: Float[Array, "B T D"], positions_BP: Int[Array, "B P"]
) -> Float[Array, "B P D"]:
    """The hidden states at `positions` of each row."""
    return jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)


def last_token_positions(
    tokens: Int[Array, "B T"], padding_mask: Bool[Array, "B T"] | None
) -> Int[Array, "B"]:
    """Where each row has its last real token, wherever its padding is."""
    B, T = tokens.shape
    if padding_mask is None:
        return jnp.full((B,), T - 1)
    return jnp.where(padding_mask, jnp.arange(T), 0).max(-1)


def mean_pool(
    hidden: Float[Array, "B T D"], padding_mask: Bool[Array, "B T"] | None
) -> Float[Array, "B D"]:
    """The mean of the real tokens' states."""
    if padding_mask is None:
        return hidden.mean(1)
    real = padding_mask[..., None].astype(hidden.dtype)
    return (hidden * real).sum(1) / jnp.maximum(real.sum(1), 1)


class Prompted(NamedTuple):
    """A stack's input with a prompt of P vectors in front, and its mask."""

    x: Float[Array, "B P+T D"]
    mask: Mask
    length: int  # P


def prepend_prompt(module: nn.Module, x_BTD: Float[Array, "B T D"], mask: Mask) -> Prompted:
    """Prompt tuning (Lester et al. 2021, section 2): an edit `prompt` `[P, D]` of the parameters
    stands in front of the embedded tokens, which all see it. It is scaled as they are, and takes
    no positions. A causal prompt sees only what of it stands before.
    """
    if not module.has_variable("params", "prompt"):
        return Prompted(x_BTD, mask, 0)
    prompt_PD = module.get_variable("params", "prompt").astype(x_BTD.dtype)
    prompt_PD = prompt_PD * module.config.embedding_scale
    P, T = len(prompt_PD), x_BTD.shape[1]
    prompt_BPD = jnp.broadcast_to(prompt_PD, (len(x_BTD), *prompt_PD.shape))
    x_BTD = jnp.concatenate([prompt_BPD, x_BTD], axis=1)
    prompted = mask.after(P, T, T)
    if mask.causal:
        own = jnp.tril(jnp.ones((P, P + T), bool))
        above = jnp.broadcast_to(own, (*prompted.allowed.shape[:2], P, P + T))
        prompted = Mask(allowed=jnp.concatenate([above, prompted.allowed], axis=2))
    return Prompted(x_BTD, prompted, P)


def remove_prompt(out: StackOutput, length: int) -> StackOutput:
    """What a stack says of the tokens alone."""
    if not length:
        return out
    attention = tuple(weights[..., length:, length:] for weights in out.attention)
    return out._replace(hidden=out.hidden[:, length:], attention=attention)


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
    ) -> LazyLogits:
        features = (hidden.shape[-1],)
        x = Linear(features, kernel_init=self.kernel_init, dtype=self.dtype, name="dense")(hidden)
        x = ACTIVATIONS[self.activation](x)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        return Bias(decoder.num_embeddings, name="output")(decoder.project(x))

