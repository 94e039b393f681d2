"""Autoregressive decoding with a KV cache: `prefill`, `decode_step`, greedy and sampled decoding.

`start` processes the prompts and selects the first token; `step` selects one more until all rows
are finished. `beam_search` and `speculative` have functions of the same names; `api` runs them.

Shape suffixes: B batch, T tokens of this pass, L token slots of a row, S source length,
V vocabulary.
"""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Bool, Float, Int, Key

from transformer_jax.generation.logits_processors import (
    DecodingOptions,
    Sequences,
    apply_logits_processors,
)
from transformer_jax.models.gpt import GPT
from transformer_jax.models.heads import gather_positions
from transformer_jax.models.transformer import Transformer
from transformer_jax.nn.attention import KVCache
from transformer_jax.tree import flatten_paths, unflatten_paths


class GenerationInputs(NamedTuple):
    """Prompts padded on the right. Those of an encoder-decoder are decoder start tokens."""

    prompts: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    source: Int[Array, "B S"] | None = None
    source_lengths: Int[Array, "B"] | None = None


class Cache(NamedTuple):
    """Keys and values that decoding steps attend to, by layer name.

    Those of self-attention are of the tokens so far, by position; those of cross-attention are of
    the source and stay constant. `source_mask` is True at source tokens, False at padding.
    """

    self_attention: dict[str, KVCache]
    cross_attention: dict[str, KVCache] | None = None
    source_mask: Bool[Array, "B S"] | None = None


def prefill(
    model: GPT | Transformer,
    params: dict,
    prompts: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    source: Int[Array, "B S"] | None = None,
    source_lengths: Int[Array, "B"] | None = None,
    *,
    cache_length: int,
) -> tuple[Float[Array, "B V"], Cache]:
    """Processes the prompts and fills the KV cache. A pure function.

    `prompts` and `source` are padded on the right. `lengths` and `source_lengths` are the numbers
    of tokens of each row, at least 1; by default T and S. The prompts of an encoder-decoder are the
    first tokens of the decoder, such as its start token. `cache_length`, at least T, is the number
    of cache slots of each row; it is static.

    Returns:
        The float32 logits of the first new token, and the cache.

    Raises:
        ValueError: `source` is missing for an encoder-decoder or given for GPT, or `cache_length`
            is below T or above the model's `max_length`.

    Example:
        Greedy decoding of five more tokens in a `scan`:

        >>> from transformer_jax.models import GPTConfig, init_params
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=16, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> logits, cache = prefill(model, params, jnp.array([[1, 2, 3]]), cache_length=9)
        >>> def next_token(carry, position):
        ...     token, cache = carry
        ...     logits, cache = decode_step(
        ...         model, params, token[:, None], jnp.full((1, 1), position), cache)
        ...     return (logits[:, 0].argmax(-1), cache), token
        >>> _, tokens = jax.lax.scan(next_token, (logits.argmax(-1), cache), jnp.arange(3, 8))
        >>> tokens.shape
        (5, 1)
    """
    B, T = prompts.shape
    if (source is not None) != isinstance(model, Transformer):
        raise ValueError(f"source is {'missing' if source is None else 'given'} for a "
                         f"{type(model).__name__}; encoder-decoders require it, GPT has no encoder")
    if cache_length < T:
        raise ValueError(f"cache_length is {cache_length}, below the {T} columns of the prompts; "
                         f"give at least {T}, plus one for each new token")
    cache = Cache(model.init_cache(model.config, B, cache_length))
    if source is not None:
        S = source.shape[1]
        source_lengths_B = jnp.full(B, S) if source_lengths is None else source_lengths
        mask_BS = jnp.arange(S) < source_lengths_B[:, None]
        encoded = model.apply({"params": params}, source, padding_mask=mask_BS, method="encode")
        cache = cache._replace(cross_attention=encoded.hidden, source_mask=mask_BS)
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    out = _decode(model, params, prompts, positions_BT, cache)
    lengths_B = jnp.full(B, T) if lengths is None else lengths
    last_BD = gather_positions(out.hidden, lengths_B[:, None] - 1)[:, 0]
    logits_BV = model.apply({"params": params}, last_BD, method="lm_logits")
    if source is not None:
        cache = cache._replace(cross_attention=out.cross_attention_cache)
    return logits_BV, cache._replace(self_attention=out.cache)


def decode_step(
    model: GPT | Transformer,
    params: dict,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T V"], Cache]:
    """Runs the decoder on further tokens and adds their keys and values to the cache.

    A pure function; the docstring of `prefill` has an example. The position of a token is also its
    cache slot; tokens beyond the last slot are not stored. Returns, for each token, the float32
    logits of the token after it, and the updated cache.
    """
    out = _decode(model, params, tokens, positions, cache)
    logits_BTV = model.apply({"params": params}, out.hidden, method="lm_logits")
    return logits_BTV, cache._replace(self_attention=out.cache)


def _decode(model, params, tokens, positions, cache):
    args, kwargs = (tokens,), {}
    if cache.source_mask is not None:
        args = tokens, cache.cross_attention
        kwargs = {"encoder_padding_mask": cache.source_mask}
    return model.apply({"params": params}, *args, positions=positions, cache=cache.self_attention,
                       method="decode", **kwargs)


class DecodeState(NamedTuple):
    """State of decoding between two steps.

    The cache has the keys and values of all tokens of each row except its last token. Rows with an
    end-of-sequence token or `max_new_tokens` tokens are finished and not extended. `num_steps` is
    the number of forward passes, the prefill included.
    """

    sequences: Sequences
    is_finished: Bool[Array, "B"]
    num_steps: Int[Array, ""]
    cache: Cache


def start(
    model: GPT | Transformer, params: dict, inputs: GenerationInputs, options: DecodingOptions
) -> tuple[dict, DecodeState]:
    """Selects the first new tokens. Returns parameters in the layout for `step`, and the state."""
    logits_BV, cache, sequences = prefill_rows(model, params, inputs, options)
    state = DecodeState(sequences, jnp.zeros(len(logits_BV), bool), jnp.int32(0), cache)
    state = _append_next_token(state, logits_BV, options)
    return transpose_kernels_for_decoding(model, params), state


def step(
    model: GPT | Transformer, params: dict, state: DecodeState, options: DecodingOptions
) -> DecodeState:
    """Selects the next token of each row; `params` and the first `state` are results of `start`."""
    positions_B1 = state.sequences.lengths[:, None] - 1
    logits_B1V, cache = decode_step(
        model, params, state.sequences.tokens_at(positions_B1), positions_B1, state.cache)
    return _append_next_token(state._replace(cache=cache), logits_B1V[:, 0], options)


def prefill_rows(model, params, inputs, options) -> tuple[Array, Cache, Sequences]:
    """Processes the prompts, and repeats each row `options.rows_per_prompt` times.

    Returns the results of `prefill`, and the prompts in `cache_length` token slots.
    """
    logits_BV, cache = prefill(model, params, *inputs, cache_length=options.cache_length)
    (B, T), lengths_B1 = inputs.prompts.shape, inputs.lengths[:, None]
    pad_id = options.pad_token_id
    tokens_BL = jnp.full((B, options.cache_length), pad_id).at[:, :T].set(
        jnp.where(jnp.arange(T) < lengths_B1, inputs.prompts, pad_id))
    rows = logits_BV, cache, Sequences(tokens_BL, inputs.lengths, inputs.lengths)
    if options.rows_per_prompt == 1:
        return rows
    return jax.tree.map(lambda x: jnp.repeat(x, options.rows_per_prompt, 0), rows)


def select_token(
    scores: Float[Array, "B V"], key: Key[Array, ""], do_sample: bool
) -> Int[Array, "B"]:
    """Selects one token per row: a sample if `do_sample`, else the argmax."""
    token_B = jax.random.categorical(key, scores) if do_sample else scores.argmax(-1)
    return token_B.astype(jnp.int32)


def _append_next_token(state, logits_BV, options) -> DecodeState:
    key = jax.random.fold_in(options.rng, state.num_steps)
    scores_BV = apply_logits_processors(logits_BV, state.sequences, options)
    token_B = select_token(scores_BV, key, options.do_sample)
    sequences = state.sequences.append(token_B, ~state.is_finished)
    is_finished_B = (state.is_finished | options.is_eos[token_B]
                     | (sequences.num_new_tokens >= options.max_new_tokens))
    return DecodeState(sequences, is_finished_B, state.num_steps + 1, state.cache)


# Name of an int8 parameter -> its name in the layout for decoding steps.
_INT8_NAMES = {"kernel_scale": "kernel_t_scale", "embedding_int8": "embedding_t",
               "embedding_scale": "embedding_t_scale"}


def transpose_kernels_for_decoding(
    model: GPT | Transformer, params: dict, donate: bool = False
) -> dict:
    """Converts parameters to the decoding layout once, for many calls of `generate`.

    Otherwise, `generate` converts them in each call. On a CPU, the conversion takes 7 % of the time
    of decoding 64 tokens with GPT-2, and memory for a second copy of the kernels during the call.
    The result is for `generate` only: its kernels and embeddings have the compute dtype, and on a
    CPU kernels are transposed to `kernel_t` [out, in].

    The time of a matmul with few rows is that of reading its weight matrix, once for each generated
    token; `nn.backends.cpu.matmul_transposed` explains why a transposed matrix is faster. Layers
    with transposed int8 kernels (`finetuning.frozen`) round their inputs to int8. On other
    backends, and on a mesh, the compiler chooses layouts, and kernels are not transposed. With
    `donate`, which does not work under `jit`, each input array is deleted as soon as its
    replacement is computed.

    Example:
        >>> from transformer_jax.models import GPT, GPTConfig
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=8, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=12))
        >>> params = {"wi": {"kernel": jnp.ones((4, 12)), "bias": jnp.zeros(12)}}
        >>> jax.tree.map(jnp.shape, transpose_kernels_for_decoding(model, params))
        {'wi': {'bias': (12,), 'kernel_t': (12, 4)}}
    """
    dtype = model.config.compute_dtype
    keep_layout = jax.default_backend() != "cpu" or not jax.sharding.get_abstract_mesh().empty
    leaves = flatten_paths(params)
    converted = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        new, is_transposed = leaf, False
        if (keep_layout and name in ("kernel_int8", *_INT8_NAMES)) or (
                f"{layer}/lora_magnitude" in leaves):  # DoRA needs the norms of the stored kernel
            pass
        elif name in ("embedding", "kernel_t") or (name == "kernel" and keep_layout):
            new = leaf if leaf.dtype == jnp.int8 else leaf.astype(dtype)
        elif name in ("kernel", "kernel_int8"):
            num_inputs = leaf.ndim - (2 if re.search(r"(query|key|value)$", layer) else 1)
            order = [*range(num_inputs, leaf.ndim), *range(num_inputs)]
            new = (leaf if name == "kernel_int8" else leaf.astype(dtype)).transpose(order)
            name, is_transposed = "kernel_t", True
        else:
            name = _INT8_NAMES.get(name, name)
        converted[f"{layer}/{name}".removeprefix("/")] = new
        if donate and (is_transposed or new.dtype != leaf.dtype):
            jax.block_until_ready(new)
            leaf.delete()
    return unflatten_paths(converted)
