"""PEFT parameters in layers: LoRA, DoRA, IA3, adapters, prefixes, prompts and added tokens.

`init` never creates these parameters (`finetuning.peft` does); a layer uses them whenever they are
present.

Shape suffixes: B batch, T length, S source length, D d_model, N heads, H head_dim, P length of a
prefix or prompt, E added tokens.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn import quantized
from transformer_jax.nn.dropout import dropout
from transformer_jax.nn.quantized import matmul, optional_param

# If a linear layer has one of these parameters, `linear` applies it.
_LINEAR_PARAMS = ("lora_b", "ia3_input", "ia3_output", *quantized.KERNELS)


def modifies(module: nn.Module) -> bool:
    """Returns whether a linear layer has PEFT parameters, or an int8 or transposed kernel."""
    return any(module.has_variable("params", name) for name in _LINEAR_PARAMS)


def linear(module: nn.Module, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
    """Applies a `layers.Linear` that has PEFT parameters, or an int8 or transposed kernel.

    IA3 scales inputs or outputs (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is
    Better and Cheaper than In-Context Learning", section 3.3); LoRA adds to the product of
    inputs and kernel, and DoRA also rescales the sum.
    """
    kernel_shape = x.shape[-module.num_contracted_axes :] + module.features
    if (ia3_input := optional_param(module, "ia3_input")) is not None:
        x = x * ia3_input
    x = x.astype(module.dtype)
    y = quantized.product(module, x, kernel_shape)
    if module.has_variable("params", "lora_b"):
        y = _add_lora(module, x, y, deterministic)
    if module.use_bias:
        bias = module.param("bias", nn.initializers.zeros, module.features, jnp.float32)
        y = y + bias.astype(module.dtype)
    if (ia3_output := optional_param(module, "ia3_output")) is not None:
        y = y * ia3_output.astype(module.dtype)
    return y


def _add_lora(module, x, y, deterministic):
    """Returns y + s x A B, where y = x W and s is `lora_scale` (Hu et al. 2021, "LoRA", 4.1).

    With a `lora_magnitude` m (DoRA), returns m * (x (W + s A B)) / |W + s A B| instead. The norm is
    that of the column of each output feature, and is treated as a constant in the backward pass
    (Liu et al. 2024, "DoRA", sections 4.1 and 4.3).
    """
    lora_a, lora_b, lora_scale, rate, magnitude = (optional_param(module, f"lora_{name}") for name
                                                   in ("a", "b", "scale", "dropout", "magnitude"))
    if rate is not None and not deterministic:
        x = dropout(x, rate, module.make_rng("dropout"))
    low_rank = matmul(x, lora_a.astype(module.dtype), module.num_contracted_axes)
    low_rank = low_rank * lora_scale.astype(module.dtype)
    y = y + matmul(low_rank, lora_b.astype(module.dtype))
    if magnitude is None:
        return y
    merged_kernel = (
        quantized.float32_kernel(module) + lora_scale * jnp.tensordot(lora_a, lora_b, axes=1))
    norm = jnp.sqrt(jnp.square(merged_kernel).sum(tuple(range(module.num_contracted_axes))))
    norm = jnp.maximum(jax.lax.stop_gradient(norm), jnp.finfo(jnp.float32).tiny)
    return y * (magnitude / norm).astype(module.dtype)


def lookup_with_extra(
    lookup: Callable[[Array], Array], extra: Float[Array, "E D"] | None, ids: Int[Array, "..."],
    num_embeddings: int,
) -> Float[Array, "... D"]:
    """Looks up embeddings; ids of `num_embeddings` or more select rows of `extra` (added tokens).

    Ids are not checked: too large ones give NaN, and negative ones index from the end.
    """
    if extra is None:
        return lookup(ids)
    rows = lookup(jnp.minimum(ids, num_embeddings - 1))
    extra_rows = jnp.take(extra, jnp.maximum(ids - num_embeddings, 0), axis=0)
    return jnp.where((ids < num_embeddings)[..., None], rows, extra_rows.astype(rows.dtype))


def prepend_prefix(
    module: nn.Module, key_BSNH: Float[Array, "B S N H"], value_BSNH: Float[Array, "B S N H"],
    mask: Any, T: int,
) -> tuple[Float[Array, "B P+S N H"], Float[Array, "B P+S N H"], Any, int]:
    """Prefix tuning (Li & Liang 2021, "Prefix-Tuning", section 4.2).

    Prepends the parameters `prefix_key` and `prefix_value` `[P, N, H]` of an attention module to
    its keys and values. All queries attend to the prefix. Without these parameters, the arguments
    are returned unchanged. T is the number of queries.

    Returns:
        (keys, values, the mask that includes the prefix, P); P is 0 without a prefix.
    """
    if not module.has_variable("params", "prefix_key"):
        return key_BSNH, value_BSNH, mask, 0
    prefixes = [module.get_variable("params", f"prefix_{name}") for name in ("key", "value")]
    key_BSNH, value_BSNH = (
        jnp.concatenate(
            [jnp.broadcast_to(prefix.astype(x.dtype), (x.shape[0], *prefix.shape)), x], axis=1)
        for prefix, x in zip(prefixes, (key_BSNH, value_BSNH))
    )
    P = prefixes[0].shape[0]
    return key_BSNH, value_BSNH, mask.with_prefix(P, T, key_BSNH.shape[1] - P), P


class Adapter(nn.Module):
    """Bottleneck adapter: x + up(f(down(x))) (Houlsby et al. 2019, section 2.1).

    The bottleneck width follows from the shape of the parameters. `finetuning.peft` initializes
    them so that the adapter starts as the identity.

    Attributes:
        linear: `layers.Linear`.
        activation: f.
        dtype: the compute dtype.
    """

    linear: type[nn.Module]
    activation: Callable[[Array], Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = self.get_variable("params", "down")["bias"].shape[-1]
        hidden = self.activation(self.linear((width,), dtype=self.dtype, name="down")(x_BTD))
        return x_BTD + self.linear(x_BTD.shape[-1:], dtype=self.dtype, name="up")(hidden)


class PromptedInput(NamedTuple):
    """The input of a stack after `prepend_prompt`.

    Attributes:
        x: embeddings, with the soft prompt in front.
        mask: the attention mask for `x`.
        prompt_length: P; 0 without a soft prompt.
    """

    x: Float[Array, "B P+T D"]
    mask: Any
    prompt_length: int


def prepend_prompt(
    model: nn.Module, x_BTD: Float[Array, "B T D"], mask: Any, causal: bool = False
) -> PromptedInput:
    """Prompt tuning: prepends a soft prompt to the embeddings (Lester et al. 2021, section 2).

    The soft prompt is the PEFT parameter `prompt` `[P, D]` of the model; without it, the arguments
    are returned unchanged. All tokens attend to the prompt. It is scaled like token embeddings and
    has no position embeddings. With `causal`, each vector of the prompt attends only to itself and
    those before it.
    """
    if not model.has_variable("params", "prompt"):
        return PromptedInput(x_BTD, mask, 0)
    prompt_PD = model.get_variable("params", "prompt").astype(x_BTD.dtype)
    prompt_PD = prompt_PD * model.config.embedding_scale
    P, T = len(prompt_PD), x_BTD.shape[1]
    prompt_BPD = jnp.broadcast_to(prompt_PD, (len(x_BTD), *prompt_PD.shape))
    x_BTD = jnp.concatenate([prompt_BPD, x_BTD], axis=1)
    return PromptedInput(x_BTD, mask.with_prompt(P, T, causal), P)


def remove_prompt(out: Any, prompt_length: int) -> Any:
    """Removes the soft prompt from hidden states and attention weights of a `StackOutput`."""
    if not prompt_length:
        return out
    attention = tuple(weights[..., prompt_length:, prompt_length:] for weights in out.attention)
    return out._replace(hidden=out.hidden[:, prompt_length:], attention=attention)
