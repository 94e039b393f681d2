"""Forward passes of a text that is being written, the same for GPT and for encoder-decoders.

Shape suffixes: B rows, T tokens of this pass, S source, V vocabulary.
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

Cache = dict[str, KVCache]


class Inputs(NamedTuple):
    """What a text is written from; rows are padded on the right to a bucket."""

    prompt: Int[Array, "B T"]  # an encoder-decoder's is its start token
    prompt_lengths: Int[Array, "B"]
    source: Int[Array, "B S"] | None = None  # for encoder-decoders
    source_lengths: Int[Array, "B"] | None = None


class EncoderMemory(NamedTuple):
    """What the decoder of an encoder-decoder looks back at."""

    memory: Float[Array, "B S D"] | Cache
    mask: Bool[Array, "B S"]


def prefill(
    model: GPT | Transformer, params: dict, inputs: Inputs, cache_length: int, copies: int = 1
) -> tuple[Float[Array, "B V"], Cache, EncoderMemory | None]:
    """The first pass, over the prompts: scores of the first new token, the cache, and the source's
    keys and values, which do not change any more; each row `copies` times."""
    B, T = inputs.prompt.shape
    source = None
    if inputs.source is not None:
        mask_BS = jnp.arange(inputs.source.shape[1]) < inputs.source_lengths[:, None]
        encoded = model.apply(
            {"params": params}, inputs.source, padding_mask=mask_BS, method="encode")
        source = EncoderMemory(encoded.hidden, mask_BS)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = model.init_cache(model.config, B, cache_length)
    out = _decode(model, params, inputs.prompt, positions_BT, cache, source)
    last_BD = gather_positions(out.hidden, inputs.prompt_lengths[:, None] - 1)[:, 0]
    logits_BV = model.apply({"params": params}, last_BD, method="lm_logits")
    if source is not None:
        source = source._replace(memory=out.memory)
    result = logits_BV, out.cache, source
    return result if copies == 1 else jax.tree.map(lambda x: jnp.repeat(x, copies, 0), result)


def decode_step(
    model: GPT | Transformer,
    params: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    source: EncoderMemory | None,
) -> tuple[Float[Array, "B T V"], Cache]:
    """A later pass: scores of what comes after each of `tokens`, and the cache with them."""
    out = _decode(model, params, tokens, positions, cache, source)
    return model.apply({"params": params}, out.hidden, method="lm_logits"), out.cache


def _decode(model, params, tokens, positions, cache, source):
    memory = () if source is None else (source.memory,)
    mask = {} if source is None else {"memory_mask": source.mask}
    return model.apply({"params": params}, tokens, *memory, positions=positions, cache=cache,
                       method="decode", **mask)
