"""`generate` and `decode`: text generation with GPT and encoder-decoders.

`decode` is a pure function for `jit`, `vmap` and `scan`. `generate` runs it from the host: it
validates and pads lists of prompts, and caches compiled programs. The algorithms are in `decoding`,
`beam_search` and `speculative`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.errors import did_you_mean
from transformer_jax.generation import beam_search, decoding, speculative
from transformer_jax.generation.decoding import GenerationInputs
from transformer_jax.generation.logits_processors import DecodingOptions, LogitsProcessor
from transformer_jax.generation.options import check_options, prepare
from transformer_jax.generation.padding import (
    check_token_ids,
    pad,
    power_of_two_length,
    unpad_rows,
)
from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer


class DecodeOutput(NamedTuple):
    """Result of `decode`. N is the batch size times `num_return_sequences`.

    Attributes:
        tokens: the prompt (for an encoder-decoder, the start token), then the new tokens, then
            padding. L is the number of columns of the prompts plus `max_new_tokens`.
        lengths: number of tokens of each row, the prompt and the end-of-sequence token included.
        scores: for beam search, log-probability of the new tokens, divided by their number **
            length_penalty; else None.
        num_steps: number of forward passes of `model`, the prefill included.
    """

    tokens: Int[Array, "N L"]
    lengths: Int[Array, "N"]
    scores: Float[Array, "N"] | None
    num_steps: Int[Array, ""]


def decode(
    model: GPT | Transformer,
    params: dict,
    input_ids: Int[Array, "B T"],
    lengths: Int[Array, "B"] | None = None,
    *,
    rng: Key[Array, ""] | None = None,
    **options,
) -> DecodeOutput:
    """Decodes a padded batch. A pure function, for use in `jit`, `vmap` and `scan`.

    Args:
        model: GPT or an encoder-decoder.
        params: parameters of the model.
        input_ids: prompts, or sources for an encoder-decoder, padded on the right.
        lengths: number of tokens of each row, from 1 to T; T if None.
        rng: key for sampling, with `do_sample=True`.
        **options: options of `generate` except `streamer`, such as `max_new_tokens`, `num_beams` or
            `logits_processors`. They are static, except for the parameters in `assistant_model`. A
            logits processor may use traced values.

    Returns:
        A `DecodeOutput`. The tokens are those that `generate` returns.

    Raises:
        ValueError: as for `generate`. Token ids and lengths are not checked if they are traced.

    Example:
        Four samples for each of two prompts, without token 7:

        >>> from transformer_jax.models import GPTConfig, init_params
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=16, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> def forbid_token_7(scores, sequences):
        ...     return scores.at[:, 7].set(-jnp.inf)
        >>> def sample(params, key):
        ...     return decode(model, params, jnp.array([[1, 2, 3], [4, 5, 6]]), rng=key,
        ...                   do_sample=True, max_new_tokens=5,
        ...                   logits_processors=[forbid_token_7]).tokens
        >>> keys = jax.random.split(jax.random.key(1), 4)
        >>> jax.jit(jax.vmap(sample, in_axes=(None, 0)))(params, keys).shape
        (4, 2, 8)
    """
    for name, value in options.items():
        if name not in _DEFAULTS or name == "streamer":
            raise ValueError(f"unknown option {name} of decode; {did_you_mean(name, _DEFAULTS)}"
                             if name != "streamer" else "decode is pure and has no streamer; use "
                             "generate, or decode_step in a loop of your own")
        if name != "assistant_model" and _is_traced(value):
            raise ValueError(f"{name} is a traced array; options of decode are static, so pass a "
                             "Python value, or use a logits processor")
    arguments = _DEFAULTS | options | {"rng": rng}
    _check_model(model)
    check_options(arguments)
    input_ids, lengths = _checked_rows(input_ids, lengths, model.config.vocab_size)
    B, T = input_ids.shape
    model, params, (options, starts) = _prepare(model, params, arguments, B, width=T, longest=T)
    inputs, options = jax.tree.map(
        jnp.asarray, (_make_inputs(starts, input_ids, lengths), options))
    out = _run(model, params, inputs, options)
    R = arguments["num_return_sequences"]
    return DecodeOutput(*(
        x if x is None or not x.ndim else x[:, :R].reshape(B * R, *x.shape[2:]) for x in out))


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
    logits_processors: Sequence[LogitsProcessor] = (),
    streamer: Callable[[Int[np.ndarray, "N"]], None] | None = None,
    rng: Key[Array, ""] | None = None,
) -> Int[np.ndarray, "R T+new"]:
    """Generates continuations of prompts (GPT) or targets for sources (encoder-decoders).

    Decoding is greedy by default, sampled with `do_sample`, by beam search with `num_beams` above
    1, and speculative with `assistant_model`. The options have the names and meanings of Hugging
    Face Transformers, and without sampling the tokens are the same. Keys and values are cached, and
    a source is encoded once. Token ids that are None are taken from the model's config.

    Lengths are padded to powers of two. One program is compiled for each combination of models,
    padded lengths, number of rows, `do_sample`, `num_beams`, `num_return_sequences` (when
    sampling), `no_repeat_ngram_size`, size of `bad_words_ids` (rounded up to powers of two),
    `num_assistant_tokens`, `logits_processors` (by identity), and number of end-of-sequence tokens
    in a beam search; changing other options does not recompile.

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
            sequences. False: when, in addition, the best running sequence, scored at its current
            length, is not better than any of them. "never": when it cannot become better at any
            length.
        length_penalty: the log-probability of a finished sequence is divided by its number of new
            tokens ** length_penalty.
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
        logits_processors: functions `(scores, sequences) -> scores` that modify the scores of the
            next token, float32 [N, V]: logits, or log-probabilities in a beam search. A row is a
            sequence that is being decoded, so N is B times the number of beams or samples. In
            `sequences`, `tokens[n, :lengths[n]]` are the tokens of row n so far, with the prompt,
            and `num_new_tokens[n]` is the number of new ones; later slots have other contents.
            The functions are applied in order, after the options above that constrain tokens and
            before `temperature`, `top_k`, `top_p` and `min_p`.
        streamer: called with each column of new tokens, int32 [N], in order, without the prompts.
        rng: key for sampling.

    Returns:
        int32 array on the host, with `num_return_sequences` rows for each row of `input_ids`,
        padded to the longest sequence. GPT: the prompts, padded on the left to T columns (the width
        of `input_ids` if it is an array, else the longest prompt), then the new tokens.
        Encoder-decoders: the decoder's tokens, start token first.

    Raises:
        ValueError: a row is empty, an id is outside the vocabulary, there are more tokens than the
            model has positions, an option is out of range or has no effect, or an argument is
            traced. Nothing is compiled before these checks.

    Example:
        >>> from transformer_jax.models import GPTConfig, init_params
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=16, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5, pad_token_id=0).shape
        (2, 8)
    """
    arguments = dict(locals())
    if _is_traced(arguments):
        raise ValueError("generate is host code, and an argument is traced by jit, vmap, scan or "
                         "grad; use transformer_jax.generation.decode there")
    _check_model(model)
    check_options(arguments)
    max_length, is_encoder_decoder = model.config.max_length, isinstance(model, Transformer)
    rows = unpad_rows(input_ids, attention_mask, "source" if is_encoder_decoder else "prompt")
    check_token_ids(rows, model.config.vocab_size)
    longest = max(map(len, rows))
    width = input_ids.shape[1] if hasattr(input_ids, "shape") else longest
    model, params, (options, starts) = _prepare(
        model, params, arguments, len(rows), width, longest, round_up=True)
    if assistant_model is not None:
        max_length = min(max_length, assistant_model[0].config.max_length)
    if longest > max_length:
        raise ValueError(f"source of {longest} tokens is longer than the model's "
                         f"max_length of {max_length}; shorten it")
    pad_id = options.pad_token_id
    padded = pad(rows, power_of_two_length(longest, max_length), pad_id)
    inputs = _make_inputs(starts, padded, np.array([len(row) for row in rows], np.int32))
    out = (_run_compiled(model, params, inputs, options) if streamer is None
           else _run_streaming(model, params, inputs, options, streamer))

    tokens, lengths = (np.concatenate(np.asarray(x)[:, :num_return_sequences]) for x in out[:2])
    repeats = len(tokens) // len(rows)
    prompt_lengths = np.repeat(inputs.lengths, repeats)
    new_positions = prompt_lengths[:, None] + np.arange((lengths - prompt_lengths).max())
    new_tokens = np.take_along_axis(tokens, new_positions, axis=1)
    prompts = starts[:, None] if is_encoder_decoder else pad(rows, width, pad_id, "left")
    return np.concatenate([np.repeat(prompts, repeats, axis=0), new_tokens], axis=1)


_DEFAULTS = {name: parameter.default for name, parameter in inspect.signature(
    generate).parameters.items() if parameter.kind == parameter.KEYWORD_ONLY}
"""The options of `generate` and their defaults."""


def _is_traced(tree) -> bool:
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree))


def _check_model(model) -> None:
    if not isinstance(model, GPT | Transformer):
        raise ValueError(f"{type(model).__name__} does not generate text; give a GPT or an "
                         "encoder-decoder (fill_mask is for BERT)")


def _checked_rows(input_ids, lengths, vocab_size: int) -> tuple[Array, Array]:
    """Converts the arguments of `decode` to arrays and checks what is known of them."""
    input_ids, lengths = (x if x is None or isinstance(x, jax.Array) else np.asarray(x)
                          for x in (input_ids, lengths))
    if input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids have shape {input_ids.shape}; they must have 2 axes, "
                         "[batch, length], and at least one token")
    B, T = input_ids.shape
    lengths = np.full(B, T, np.int32) if lengths is None else lengths
    if lengths.shape != (B,):
        raise ValueError(f"lengths have shape {lengths.shape}; give one for each of {B} rows")
    if not _is_traced(lengths):
        known = np.asarray(lengths)
        if known.dtype.kind not in "iu" or known.min() < 1 or known.max() > T:
            raise ValueError(f"lengths are {known.tolist()}; they must be integers from 1 to {T}")
        if not _is_traced(input_ids):
            check_token_ids([row[:n] for row, n in zip(np.asarray(input_ids), known)], vocab_size)
    return input_ids, lengths


def _prepare(model, params, arguments, num_rows, width, longest, round_up=False):
    """Returns the model and its parameters, paired with those of the draft model if there is one,
    and the result of `options.prepare`."""
    config, is_encoder_decoder, models = model.config, isinstance(model, Transformer), (model,)
    if arguments["assistant_model"] is not None:
        model, params = speculative.pair_with_draft(model, params, arguments["assistant_model"])
        models = model
    return model, params, prepare(
        config, arguments, is_encoder_decoder=is_encoder_decoder, num_rows=num_rows, width=width,
        longest=longest, max_positions=min(m.config.max_length for m in models), round_up=round_up)


def _make_inputs(starts, rows, lengths) -> GenerationInputs:
    """Returns the rows as prompts, or as sources if there are decoder start tokens."""
    if starts is None:
        return GenerationInputs(rows, lengths)
    return GenerationInputs(starts[:, None], np.ones_like(starts), rows, lengths)


def _algorithm(options: DecodingOptions):
    if options.num_beam_candidates:
        return beam_search
    return speculative if options.num_draft_tokens else decoding


def _start(model, params, inputs, options):
    return _algorithm(options).start(model, params, inputs, options)


def _step(model, params, state, options):
    return _algorithm(options).step(model, params, state, options)


def _run(model, params, inputs, options) -> DecodeOutput:
    """Decodes in a single loop. Arrays of the result have axes [B, rows_per_prompt, ...]."""
    params, state = _start(model, params, inputs, options)
    state = jax.lax.while_loop(lambda state: ~state.is_finished.all(),
                               lambda state: _step(model, params, state, options), state)
    return _output(state, options)


def _output(state, options) -> DecodeOutput:
    tokens, lengths, prompt_lengths = (
        x.reshape(-1, options.rows_per_prompt, *x.shape[1:]) for x in state.sequences)
    if not options.num_beam_candidates:
        return DecodeOutput(tokens, lengths, None, state.num_steps)
    finished = state.finished
    return DecodeOutput(
        finished.tokens, prompt_lengths + finished.lengths, finished.scores, state.num_steps)


_run_compiled = jax.jit(_run, static_argnames="model")
_start_compiled = jax.jit(_start, static_argnames="model")
_step_compiled = jax.jit(_step, static_argnames="model", donate_argnames="state")


def _run_streaming(model, params, inputs, options, streamer) -> DecodeOutput:
    """Like `_run`, with one compiled call per step. `streamer` is called with the next token of
    each row as soon as it is known for every unfinished row."""
    params, state = _start_compiled(model, params, inputs, options)
    num_streamed = 0
    while True:
        tokens, lengths, prompt_lengths = (np.array(x) for x in state.sequences)
        num_new, is_finished = lengths - prompt_lengths, np.array(state.is_finished)
        num_ready = num_new.max() if is_finished.all() else num_new[~is_finished].min()
        for i in range(num_streamed, num_ready):  # slots after the end of a row hold padding
            streamer(tokens[np.arange(len(tokens)), prompt_lengths + i])
        num_streamed = max(num_streamed, num_ready)
        if is_finished.all():
            return _output(state, options)
        state = _step_compiled(model, params, state, options)
