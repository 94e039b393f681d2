"""Pooling, soft prompts, and the masked language modeling head.

Shape suffixes: B batch, T length, D d_model, V vocabulary, P number of selected positions, or the
length of a soft prompt.
"""

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
    """Gathers the hidden states at P positions of each row.

    Example:
        >>> hidden = jnp.arange(4.0).reshape(1, 4, 1)
        >>> gather_positions(hidden, jnp.array([[3, 1]]))[0, :, 0].tolist()
        [3.0, 1.0]
    """
    return jnp.take_along_axis(hidden_BTD, positions_BP[..., None], axis=1)


def last_token_positions(
    tokens: Int[Array, "B T"], padding_mask: Bool[Array, "B T"] | None
) -> Int[Array, "B"]:
    """Returns the position of the last token of each row that is not padding.

    The padding may be on either side. `padding_mask` is True at tokens; None means no padding.

    Example:
        >>> mask = jnp.array([[True, True, False], [False, True, True]])
        >>> last_token_positions(jnp.zeros((2, 3), jnp.int32), mask).tolist()
        [1, 2]
    """
    B, T = tokens.shape
    if padding_mask is None:
        return jnp.full((B,), T - 1)
    return jnp.where(padding_mask, jnp.arange(T), 0).max(-1)


def mean_pool(
    hidden_BTD: Float[Array, "B T D"], padding_mask: Bool[Array, "B T"] | None
) -> Float[Array, "B D"]:
    """Averages the hidden states of the tokens of each row; padding is excluded."""
    if padding_mask is None:
        return hidden_BTD.mean(1)
    weights_BT1 = padding_mask[..., None].astype(hidden_BTD.dtype)
    return (hidden_BTD * weights_BT1).sum(1) / jnp.maximum(weights_BT1.sum(1), 1)


class PromptedInput(NamedTuple):
    """The input of a stack after `prepend_prompt`.

    Attributes:
        x: embeddings, with the soft prompt in front.
        mask: the attention mask for `x`.
        prompt_length: P; 0 without a soft prompt.
    """

    x: Float[Array, "B P+T D"]
    mask: Mask
    prompt_length: int


def prepend_prompt(model: nn.Module, x_BTD: Float[Array, "B T D"], mask: Mask) -> PromptedInput:
    """Prompt tuning: prepends a soft prompt to the embeddings (Lester et al. 2021, section 2).

    The soft prompt is the PEFT parameter `prompt` `[P, D]` of the model; without it, the arguments
    are returned unchanged. All tokens attend to the prompt. It is scaled like token embeddings and
    has no position embeddings. If the mask is causal, each vector of the prompt attends only to
    itself and those before it.
    """
    if not model.has_variable("params", "prompt"):
        return PromptedInput(x_BTD, mask, 0)
    prompt_PD = model.get_variable("params", "prompt").astype(x_BTD.dtype)
    prompt_PD = prompt_PD * model.config.embedding_scale
    P, T = len(prompt_PD), x_BTD.shape[1]
    prompt_BPD = jnp.broadcast_to(prompt_PD, (len(x_BTD), *prompt_PD.shape))
    x_BTD = jnp.concatenate([prompt_BPD, x_BTD], axis=1)
    prompted_mask = mask.with_prefix(P, T, T)
    if mask.causal:
        token_rows = prompted_mask.dense_mask
        prompt_rows = jnp.tril(jnp.ones((P, P + T), bool))
        prompt_rows = jnp.broadcast_to(prompt_rows, (*token_rows.shape[:2], P, P + T))
        prompted_mask = Mask(dense_mask=jnp.concatenate([prompt_rows, token_rows], axis=2))
    return PromptedInput(x_BTD, prompted_mask, P)


def remove_prompt(out: StackOutput, prompt_length: int) -> StackOutput:
    """Removes the soft prompt from hidden states and attention weights."""
    if not prompt_length:
        return out
    attention = tuple(weights[..., prompt_length:, prompt_length:] for weights in out.attention)
    return out._replace(hidden=out.hidden[:, prompt_length:], attention=attention)


class MLMHead(nn.Module):
    """BERT's masked language modeling head: dense, activation, LayerNorm, output layer, bias.

    Devlin et al. 2018, section 3.1, and `get_masked_lm_output` of the released code. The output
    layer is the embedding that is passed to `__call__`, usually the token embedding (tied).
    """

    activation: str
    epsilon: float
    kernel_init: Callable
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, hidden: Float[Array, "... D"], output_embed: Embed) -> LazyLogits:
        features = (hidden.shape[-1],)
        x = Linear(features, kernel_init=self.kernel_init, dtype=self.dtype, name="dense")(hidden)
        x = ACTIVATIONS[self.activation](x)
        x = LayerNorm(self.epsilon, dtype=self.dtype, name="norm")(x)
        return Bias(output_embed.num_embeddings, name="output")(output_embed.project(x))
