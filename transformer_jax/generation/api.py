"""`generate`: text generation with GPT and encoder-decoders.

This module validates the options and pads the inputs. The decoding loops are in `decode_loop`,
`beam_search` and `speculative`.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Int, Key

from transformer_jax.generation import beam_search, decode_loop, speculative
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    StaticGenerationConfig,
)
from transformer_jax.generation.options import (
    check_options,
    make_beam_search_params,
    make_processor_params,
    make_static_config,
    new_token_limits,
    special_token_ids,
)
from transformer_jax.generation.padding import (
    check_token_ids,
    pad_left,
    pad_right,
    power_of_two_length,
    row_lengths,
    unpad_rows,
)
from transformer_jax.generation.prefill import GenerationInputs
from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer


def generate(
    model: GPT | Transformer,
    params: dict,
    input_ids: Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    attention_mask: Int[np.ndarray, "B T"] | None = None,
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    min_new_tokens: int | None = None,
    min_length: int | None = None,
    num_beams: int = 1,
    do_sample: bool = False,
    num_return_sequences: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    bad_words_ids: Sequence[Sequence[int]] | None = None,
    suppress_tokens: Sequence[int] | None = None,
    begin_suppress_tokens: Sequence[int] | None = None,
    early_stopping: bool | str = False,
    length_penalty: float = 1.0,
    forced_bos_token_id: int | None = None,
    forced_eos_token_id: int | Sequence[int] | None = None,
    decoder_start_token_id: int | Sequence[int] | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    assistant_model: tuple[GPT | Transformer, dict] | None = None,
    num_assistant_tokens: int = 5,
    streamer: Callable[[Int[np.ndarray, "B"]], None] | None = None,
    rng: Key[Array, ""] | None = None,
) -> Int[np.ndarray, "R T+new"]:
    """Generates continuations of prompts (GPT) or targets for sources (encoder-decoders).

    Decoding is greedy by default, sampled with `do_sample`, by beam search with `num_beams` above
    1, and speculative with `assistant_model`. The options have the names and meanings of Hugging
    Face Transformers, and without sampling the tokens are the same. Keys and values are cached, and
    a source is encoded once. Token ids that are None are taken from the model's config.

    Lengths are padded to powers of two. One program is compiled for each combination of padded
    lengths, number of rows, `do_sample`, `num_beams`, `num_return_sequences` (when sampling),
    `no_repeat_ngram_size`, `num_assistant_tokens`, and number of end-of-sequence tokens in a beam
    search; changing other options does not recompile.

    Args:
        model: GPT or an encoder-decoder.
        params: parameters of the model.
        input_ids: prompts, or sources for an encoder-decoder: lists of token ids, or an array with
            an `attention_mask`.
        attention_mask: 1 at tokens, 0 at padding, which may be on either side.
        max_new_tokens: maximum number of generated tokens. By default 20, or as many as the
            model's positions allow.
        max_length: alternative to `max_new_tokens` that includes the T prompt tokens (for an
            encoder-decoder, the decoder start token).
        min_new_tokens: minimum number of tokens before an end-of-sequence token.
        min_length: as `min_new_tokens`, with the prompt tokens included.
        num_beams: number of beams; 1 for no beam search.
        do_sample: sample tokens instead of taking the most probable one; needs `rng`.
        num_return_sequences: sequences returned for each row: samples, or the best of a beam
            search.
        temperature: divisor of the logits when sampling; above 0.
        top_k: sample among the k most probable tokens.
        top_p: sample among the most probable tokens with total probability >= p.
        min_p: sample among tokens with at least p times the probability of the most probable one.
        repetition_penalty: above 1, penalizes tokens that the sequence contains.
        no_repeat_ngram_size: n-grams of this size occur at most once; those of the prompt count,
            those of an encoder-decoder's source do not. 0 for no limit.
        bad_words_ids: token sequences that are not generated.
        suppress_tokens: tokens that are not generated.
        begin_suppress_tokens: tokens that are not generated as the first new token.
        early_stopping: when a beam search stops. True: once there are `num_beams` finished
            sequences. False: when the best running sequence, scored at its current length, is not
            better than the finished ones. "never": when it cannot become better at any length.
        length_penalty: scores of finished sequences are divided by length ** length_penalty.
        forced_bos_token_id: first token after the decoder start token (encoder-decoders only).
        forced_eos_token_id: last token of a sequence of maximum length.
        decoder_start_token_id: first decoder token; one for all rows, or one for each row.
        eos_token_id: one or several token ids after which a row ends; () for none.
        pad_token_id: token id that fills shorter rows. By default the config's, else the first
            `eos_token_id`, else 0.
        assistant_model: draft model for speculative decoding, as (model, params), of the same
            type and vocabulary. The results are those of `model` alone: the same tokens, or
            samples from the same distribution.
        num_assistant_tokens: tokens that the draft model proposes at a time.
        streamer: called with each column of new tokens, int32 [B], in order, without the prompts.
        rng: key for sampling.

    Returns:
        int32 array on the host, with `num_return_sequences` rows for each row of `input_ids`,
        padded to the longest sequence. GPT: the prompts, padded on the left to T columns (the width
        of `input_ids` if it is an array, else the longest prompt), then the new tokens.
        Encoder-decoders: the decoder's tokens, start token first.

    Raises:
        ValueError: a row is empty, an id is outside the vocabulary, there are more tokens than the
            model has positions, or an option is out of range or has no effect. Nothing is compiled
            before these checks.

    Example:
        >>> from transformer_jax.models import GPTConfig, init_params
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=16, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5, pad_token_id=0).shape
        (2, 8)
    """
    options = dict(locals())
    if not isinstance(model, GPT | Transformer):
        raise ValueError(f"{type(model).__name__} does not generate text; give a GPT or an "
                         "encoder-decoder (fill_mask is for BERT)")
    check_options(options)
    config, is_encoder_decoder = model.config, isinstance(model, Transformer)
    rows = unpad_rows(input_ids, attention_mask, "source" if is_encoder_decoder else "prompt")
    check_token_ids(rows, config.vocab_size)
    special_ids = special_token_ids(config, options, is_encoder_decoder)
    if is_encoder_decoder:
        starts = special_ids["decoder_start_token_id"]
        if len(starts) not in (1, len(rows)):
            raise ValueError(f"decoder_start_token_id has {len(starts)} ids for {len(rows)} "
                             "sources; give one, or one for each source")
        prompts, width, longest = list(np.broadcast_to(starts, len(rows))[:, None]), 1, 1
    else:
        prompts, longest = rows, max(map(len, rows))
        width = input_ids.shape[1] if hasattr(input_ids, "shape") else longest
    models, all_params = _models_and_params(model, params, assistant_model)
    max_positions = min(m.config.max_length for m in models)
    max_new_tokens, min_new_tokens = new_token_limits(
        options, width=width, longest=longest, max_positions=max_positions,
        name="decoder prompt" if is_encoder_decoder else "prompt")
    processor_params = make_processor_params(
        options, special_ids, max_new_tokens, min_new_tokens, config.vocab_size)
    cache_length = power_of_two_length(longest + max_new_tokens, max_positions)
    static_config = make_static_config(
        options, len(special_ids["eos_token_id"]), config.vocab_size, cache_length)

    pad_id = processor_params.pad_token_id
    prompt_width = 1 if is_encoder_decoder else power_of_two_length(longest, max_positions)
    prompt_lengths = row_lengths(prompts)
    inputs = GenerationInputs(pad_right(prompts, prompt_width, pad_id), prompt_lengths)
    if is_encoder_decoder:
        longest_source = max(map(len, rows))
        if longest_source > max_positions:
            raise ValueError(f"source of {longest_source} tokens is longer than the model's "
                             f"max_length of {max_positions}; shorten it")
        source = pad_right(rows, power_of_two_length(longest_source, max_positions), pad_id)
        inputs = inputs._replace(source=source, source_lengths=row_lengths(rows))
    rng = jax.random.key(0) if rng is None else rng

    if num_beams > 1:
        search_params = make_beam_search_params(options, max_new_tokens, cache_length)
        finished = beam_search.beam_search(
            model, params, inputs, processor_params, search_params, rng,
            static_config=static_config)
        tokens, num_new = (np.concatenate(np.asarray(x)[:, :num_return_sequences])
                           for x in (finished.tokens, finished.lengths))
    else:
        tokens, num_new = _decode(
            models, all_params, inputs, processor_params, rng, static_config, streamer)

    repeats = len(tokens) // len(rows)
    new_positions = np.repeat(prompt_lengths, repeats)[:, None] + np.arange(num_new.max())
    new_tokens = np.take_along_axis(tokens, new_positions, axis=1)
    left_padded = np.repeat(pad_left(prompts, width, pad_id), repeats, axis=0)
    return np.concatenate([left_padded, new_tokens], axis=1)


def _decode(
    models: tuple[GPT | Transformer, ...],
    all_params: tuple[dict, ...],
    inputs: GenerationInputs,
    processor_params: LogitsProcessorParams,
    rng: Key[Array, ""],
    static_config: StaticGenerationConfig,
    streamer: Callable[[Int[np.ndarray, "B"]], None] | None,
) -> tuple[Int[np.ndarray, "B L"], Int[np.ndarray, "B"]]:
    """Decodes without beam search; speculatively if there are two models.

    Returns:
        Tokens by position, and the number of new tokens of each row.
    """
    if len(models) == 2:
        pair = speculative.ModelPair
        arguments = pair(*models), pair(*all_params), pair(inputs, inputs)
        decode = speculative.decode_speculative
        decode_streaming = speculative.decode_speculative_streaming
    else:
        arguments = models[0], all_params[0], inputs
        decode, decode_streaming = decode_loop.decode, decode_loop.decode_streaming
    if streamer is None:
        out = decode(*arguments, processor_params, rng, static_config=static_config)
    else:
        out = decode_streaming(*arguments, processor_params, rng, static_config=static_config,
                               streamer=streamer)
    return np.asarray(out[0]), np.asarray(out[1])


def _models_and_params(
    model: GPT | Transformer, params: dict, assistant_model: tuple[GPT | Transformer, dict] | None
) -> tuple[tuple[GPT | Transformer, ...], tuple[dict, ...]]:
    """Returns the model, and the draft model if there is one, and their parameters.

    Raises:
        ValueError: `assistant_model` is not a pair, or its type or vocabulary differs from the
            model's.
    """
    if assistant_model is None:
        return (model,), (params,)
    try:
        draft, draft_params = assistant_model
    except TypeError:
        raise ValueError(f"assistant_model is a {type(assistant_model).__name__}; give the pair "
                         "(model, params)") from None
    model_types = GPT, Transformer
    if not any(isinstance(model, t) and isinstance(draft, t) for t in model_types):
        raise ValueError(f"assistant_model is a {type(draft).__name__} and model a "
                         f"{type(model).__name__}; both must be GPT models, or both "
                         "encoder-decoders")
    sizes = model.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"assistant_model has a vocabulary of {sizes[1]} and model one of "
                         f"{sizes[0]}; they must share a tokenizer")
    return (model, draft), (params, draft_params)
