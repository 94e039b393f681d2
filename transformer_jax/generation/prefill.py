"""Forward passes of cached decoding, with one signature for GPT and for encoder-decoders.

`prefill` processes the prompts and fills the KV cache; `decode_step` extends it.

Shape suffixes: B batch, T tokens of this pass, S source length, D d_model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.models.gpt import GPT
from transformer_jax.models.heads import gather_positions
from transformer_jax.models.transformer import Transformer
from transformer_jax.nn.attention import KVCache

Cache = dict[str, KVCache]  # layer name -> keys and values


class GenerationInputs(NamedTuple):
    """The input of a decoding loop. Rows are padded on the right.

    Attributes:
        prompt: prompt tokens; for an encoder-decoder, the start token of the decoder.
        prompt_lengths: number of prompt tokens of each row.
        source: source tokens of an encoder-decoder; None for GPT.
        source_lengths: number of source tokens of each row; None for GPT.
    """

    prompt: Int[Array, "B T"]
    prompt_lengths: Int[Array, "B"]
    source: Int[Array, "B S"] | None = None
    source_lengths: Int[Array, "B"] | None = None


class EncoderMemory(NamedTuple):
    """The input of the decoder's cross-attention.

    Attributes:
        encoder_output: the encoder's hidden states, or the keys and values computed from them.
        padding_mask: True at source tokens, False at padding.
    """

    encoder_output: Float[Array, "B S D"] | Cache
    padding_mask: Bool[Array, "B S"]


def prefill(
    model: GPT | Transformer,
    params: dict,
    inputs: GenerationInputs,
    cache_length: int,
    rows_per_prompt: int = 1,
) -> tuple[Float[Array, "B V"], Cache, EncoderMemory | None]:
    """Processes the prompts and fills the KV cache.

    Args:
        model: GPT or encoder-decoder.
        params: its parameters.
        inputs: the prompts, and the sources of an encoder-decoder.
        cache_length: number of cache slots of each row.
        rows_per_prompt: how often each row of the results is repeated (beams or samples).

    Returns:
        The logits of the first new token, the KV cache, and, for an encoder-decoder, the
        cross-attention keys and values, which stay constant while decoding.
    """
    B, T = inputs.prompt.shape
    encoder_memory = None
    if inputs.source is not None:
        mask_BS = jnp.arange(inputs.source.shape[1]) < inputs.source_lengths[:, None]
        encoded = model.apply(
            {"params": params}, inputs.source, padding_mask=mask_BS, method="encode")
        encoder_memory = EncoderMemory(encoded.hidden, mask_BS)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = model.init_cache(model.config, B, cache_length)
    out = _decode(model, params, inputs.prompt, positions_BT, cache, encoder_memory)
    last_BD = gather_positions(out.hidden, inputs.prompt_lengths[:, None] - 1)[:, 0]
    logits_BV = model.apply({"params": params}, last_BD, method="lm_logits")
    if encoder_memory is not None:
        encoder_memory = encoder_memory._replace(encoder_output=out.cross_attention_cache)
    result = logits_BV, out.cache, encoder_memory
    if rows_per_prompt == 1:
        return result
    return jax.tree.map(lambda x: jnp.repeat(x, rows_per_prompt, 0), result)


def decode_step(
    model: GPT | Transformer,
    params: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    encoder_memory: EncoderMemory | None,
) -> tuple[Float[Array, "B T V"], Cache]:
    """Runs the decoder on further tokens, whose keys and values are added to the cache.

    Args:
        model: GPT or encoder-decoder.
        params: its parameters.
        tokens: the tokens that follow those in the cache.
        positions: the position of each token, which is also its cache slot.
        cache: keys and values of earlier tokens.
        encoder_memory: the third result of `prefill`.

    Returns:
        For each token the logits of the token after it, and the updated cache.
    """
    out = _decode(model, params, tokens, positions, cache, encoder_memory)
    return model.apply({"params": params}, out.hidden, method="lm_logits"), out.cache


def _decode(model, params, tokens, positions, cache, encoder_memory):
    args, kwargs = (tokens,), {}
    if encoder_memory is not None:
        args = tokens, encoder_memory.encoder_output
        kwargs = {"encoder_padding_mask": encoder_memory.padding_mask}
    return model.apply({"params": params}, *args, positions=positions, cache=cache,
                       method="decode", **kwargs)
