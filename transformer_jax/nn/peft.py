"""PEFT parameters in layers: LoRA, DoRA, IA3, adapters, prefixes, prompts and added tokens.

`init` never creates these parameters (`finetuning.peft` does); a layer uses them whenever they are
present.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.nn import quantized
from transformer_jax.nn.dropout import dropout
from transformer_jax.nn.quantized import optional_param

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
    low_rank = quantized.matmul(x, lora_a.astype(module.dtype), module.num_contracted_axes)
    low_rank = low_rank * lora_scale.astype(module.dtype)
    y = y + quantized.matmul(low_rank, lora_b.astype(module.dtype))
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
    """Looks up embeddings; ids from `num_embeddings` on select rows of `extra` (added tokens)."""
    if extra is None:
        return lookup(ids)
    rows = lookup(jnp.minimum(ids, num_embeddings - 1))
    extra_rows = jnp.take(extra, jnp.maximum(ids - num_embeddings, 0), axis=0)
    return jnp.where((ids < num_embeddings)[..., None], rows, extra_rows.astype(rows.dtype))


def _prepend(rows_P: Float[Array, "P ..."], x: Float[Array, "B S ..."]) -> Array:
    """Prepends the same P rows to each example."""
    rows = jnp.broadcast_to(rows_P.astype(x.dtype), (len(x), *rows_P.shape))
    return jnp.concatenate([rows, x], axis=1)


def prepend_prefix(
    module: nn.Module, key_BSNH: Float[Array, "B S N H"], value_BSNH: Float[Array, "B S N H"],
    mask: Any, T: int,
) -> tuple[Float[Array, "B P+S N H"], Float[Array, "B P+S N H"], Any, int]:
    """Prepends prefixes to keys and values (Li & Liang 2021, "Prefix-Tuning", section 4.2).

    The prefixes are the parameters `prefix_key` and `prefix_value` `[P, N, H]` of an attention
    module. All T queries attend to them. Returns (keys, values, mask, P); P is 0 without prefixes.
    """
    if (prefix_key := optional_param(module, "prefix_key")) is None:
        return key_BSNH, value_BSNH, mask, 0
    P, S = len(prefix_key), key_BSNH.shape[1]
    return (_prepend(prefix_key, key_BSNH),
            _prepend(optional_param(module, "prefix_value"), value_BSNH),
            mask.with_prefix(P, T, S), P)


class Adapter(nn.Module):
    """Bottleneck adapter: x + up(f(down(x))) (Houlsby et al. 2019, section 2.1).

    `linear` is `layers.Linear`, and `activation` is f. The bottleneck width follows from the shape
    of the parameters.
    """

    linear: type[nn.Module]
    activation: Callable[[Array], Array]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        width = self.get_variable("params", "down")["bias"].shape[-1]
        hidden = self.activation(self.linear((width,), dtype=self.dtype, name="down")(x_BTD))
        return x_BTD + self.linear(x_BTD.shape[-1:], dtype=self.dtype, name="up")(hidden)


def prepend_prompt(
    model: nn.Module, x_BTD: Float[Array, "B T D"], mask: Any, causal: bool = False
) -> tuple[Float[Array, "B P+T D"], Any, int]:
    """Prompt tuning: prepends a soft prompt to the embeddings (Lester et al. 2021, section 2).

    The soft prompt is the PEFT parameter `prompt` `[P, D]` of the model. All tokens attend to it.
    It is scaled like token embeddings and has no position embeddings. With `causal`, each vector of
    the prompt attends only to itself and those before it. Returns (embeddings, mask, P); P is 0
    without a prompt.
    """
    if (prompt_PD := optional_param(model, "prompt")) is None:
        return x_BTD, mask, 0
    prompt_PD = prompt_PD.astype(x_BTD.dtype) * model.config.embedding_scale
    P, T = len(prompt_PD), x_BTD.shape[1]
    return _prepend(prompt_PD, x_BTD), mask.with_prompt(P, T, causal), P


def remove_prompt(out: Any, prompt_length: int) -> Any:
    """Removes the soft prompt from hidden states and attention weights of a `StackOutput`."""
    if not prompt_length:
        return out
    attention = tuple(weights[..., prompt_length:, prompt_length:] for weights in out.attention)
    return out._replace(hidden=out.hidden[:, prompt_length:], attention=attention)
