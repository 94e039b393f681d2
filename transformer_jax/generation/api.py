"""`generate` and `decode` for GPT and encoder-decoders, and `fill_mask` for BERT.

`decode` is a pure function for `jit`, `vmap` and `scan`. `generate` runs it from the host: it
validates and pads lists of prompts, and caches compiled programs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int, Key

from transformer_jax.generation import beam_search, decoding, speculative
from transformer_jax.generation.decoding import GenerationInputs
from transformer_jax.generation.logits_processors import DecodingOptions
from transformer_jax.generation.options import GenerateOptions, check_options, prepare
from transformer_jax.generation.padding import (
    check_token_ids,
    pad,
    power_of_two_length,
    unpad_rows,
)
from transformer_jax.models import Model
from transformer_jax.models.bert import BERT
from transformer_jax.models.gpt import GPT
from transformer_jax.models.transformer import Transformer


class DecodeOutput(NamedTuple):
    """Result of `decode`. N is the batch size times `num_return_sequences`.

    Attributes:
        tokens: the prompt (for an encoder-decoder, the start token), then the new tokens, then
            padding. L is the number of columns of the prompts plus `max_new_tokens`.
        lengths: number of tokens of each row, the prompt and the end-of-sequence token included.
        scores: for beam search, the log-probability of the new tokens divided by
            (number of new tokens) ** length_penalty; else None.
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
    **options: Any,
) -> DecodeOutput:
    """Decodes a padded batch. A pure function, for use in `jit`, `vmap` and `scan`.

    The tokens are those that `generate` returns.

    Args:
        model: GPT or an encoder-decoder.
        params: its parameters.
        input_ids: prompts, or sources for an encoder-decoder, padded on the right.
        lengths: number of tokens of each row, from 1 to T; T if None.
        rng: key for sampling, with `do_sample=True`.
        **options: fields of `GenerateOptions` except `streamer`. They are static, except for the
            parameters in `assistant_model`. A logits processor may use traced values.

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
    if "streamer" in options:
        raise ValueError("decode is pure and has no streamer; use generate, or decode_step in a "
                         "loop of your own")
    for name, value in options.items():
        if name != "assistant_model" and _is_traced(value):
            raise ValueError(f"{name} is a traced array; options of decode are static, so pass a "
                             "Python value, or use a logits processor")
    _check_model(model)
    given = check_options(options | {"rng": rng})
    input_ids, lengths = _checked_rows(input_ids, lengths, model.config.vocab_size)
    B, T = input_ids.shape
    model, params, (prepared, starts) = _prepare(model, params, given, B, width=T, longest=T)
    inputs, prepared = jax.tree.map(
        jnp.asarray, (_make_inputs(starts, input_ids, lengths), prepared))
    out = _run(model, params, inputs, prepared)
    R = given.num_return_sequences
    return DecodeOutput(*(
        x if x is None or not x.ndim else x[:, :R].reshape(B * R, *x.shape[2:]) for x in out))


def generate(
    model: GPT | Transformer,
    params: dict,
    input_ids: Sequence[Sequence[int]] | Int[np.ndarray, "B T"],
    attention_mask: Int[np.ndarray, "B T"] | None = None,
    **options: Any,
) -> Int[np.ndarray, "R T+new"]:
    """Generates continuations of prompts (GPT) or targets for sources (encoder-decoders).

    Decoding is greedy by default, sampled with `do_sample` and `rng`, by beam search with
    `num_beams` above 1, and speculative with `assistant_model`. Without sampling, the tokens are
    those of Hugging Face Transformers. Keys and values are cached, and a source is encoded once.

    Lengths are padded to powers of two. One program is compiled for each combination of models,
    padded lengths, number of rows, `do_sample`, `num_beams`, `num_return_sequences` (when
    sampling), `no_repeat_ngram_size`, size of `bad_words_ids` (rounded up to powers of two),
    `num_assistant_tokens`, `logits_processors` (by identity), and number of end-of-sequence tokens
    in a beam search; changing other options does not recompile.

    Args:
        model: GPT or an encoder-decoder.
        params: its parameters.
        input_ids: prompts, or sources for an encoder-decoder: lists of token ids, or an array,
            with an `attention_mask` if it has padding.
        attention_mask: 1 at tokens, 0 at padding, which may be on either side.
        **options: fields of `GenerateOptions`, which documents them: `max_new_tokens`,
            `do_sample`, `temperature`, `top_k`, `top_p`, `num_beams`, `logits_processors`, ...

    Returns:
        int32 array on the host, with `num_return_sequences` rows for each row of `input_ids`,
        padded to the longest sequence. GPT: the prompts, padded on the left to T columns (the width
        of `input_ids` if it is an array, else the longest prompt), then the new tokens.
        Encoder-decoders: the decoder's tokens, start token first.

    Raises:
        ValueError: a row is empty, an id is outside the vocabulary, there are more tokens than the
            model has positions, an option is unknown, out of range or without effect, or an
            argument is traced. Nothing is compiled before these checks.

    Example:
        >>> from transformer_jax.models import GPTConfig, init_params
        >>> model = GPT(GPTConfig(vocab_size=11, max_length=16, num_layers=1, d_model=4,
        ...                       num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> generate(model, params, [[1, 2, 3], [4]], max_new_tokens=5, pad_token_id=0).shape
        (2, 8)
    """
    if _is_traced((params, input_ids, attention_mask, options)):
        raise ValueError("generate is host code, and an argument is traced by jit, vmap, scan or "
                         "grad; use transformer_jax.generation.decode there")
    _check_model(model)
    given = check_options(options)
    max_length, is_encoder_decoder = model.config.max_length, isinstance(model, Transformer)
    rows = unpad_rows(input_ids, attention_mask, "source" if is_encoder_decoder else "prompt")
    check_token_ids(rows, model.config.vocab_size)
    longest = max(map(len, rows))
    width = input_ids.shape[1] if hasattr(input_ids, "shape") else longest
    model, params, (prepared, starts) = _prepare(
        model, params, given, len(rows), width, longest, round_up=True)
    if given.assistant_model is not None:
        max_length = min(max_length, given.assistant_model[0].config.max_length)
    if longest > max_length:
        raise ValueError(f"source of {longest} tokens is longer than the model's "
                         f"max_length of {max_length}; shorten it")
    padded = pad(rows, power_of_two_length(longest, max_length), prepared.pad_token_id)
    inputs = _make_inputs(starts, padded, np.array([len(row) for row in rows], np.int32))
    out = (_run_compiled(model, params, inputs, prepared) if given.streamer is None
           else _run_streaming(model, params, inputs, prepared, given.streamer))
    return _collect(out, inputs, given.num_return_sequences, (
        starts[:, None] if is_encoder_decoder else pad(rows, width, prepared.pad_token_id, "left")))


def _collect(out: DecodeOutput, inputs: GenerationInputs, num_sequences: int, prompts):
    """Returns `num_sequences` rows for each prompt: the prompt, then its new tokens."""
    tokens, lengths = (np.concatenate(np.asarray(x)[:, :num_sequences]) for x in out[:2])
    repeats = len(tokens) // len(prompts)
    prompt_lengths = np.repeat(inputs.lengths, repeats)
    new_positions = prompt_lengths[:, None] + np.arange((lengths - prompt_lengths).max())
    new_tokens = np.take_along_axis(tokens, new_positions, axis=1)
    return np.concatenate([np.repeat(prompts, repeats, axis=0), new_tokens], axis=1)


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


def _prepare(model, params, given: GenerateOptions, num_rows, width, longest, round_up=False):
    """Returns the model and its parameters, paired with those of the draft model if there is one,
    and the result of `options.prepare`."""
    config, is_encoder_decoder, models = model.config, isinstance(model, Transformer), (model,)
    if given.assistant_model is not None:
        model, params = speculative.pair_with_draft(model, params, given.assistant_model)
        models = model
    return model, params, prepare(
        config, given, is_encoder_decoder=is_encoder_decoder, num_rows=num_rows, width=width,
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


def generate_texts(
    model: Model, params: dict, tokenizer: Any, rows: Sequence[Sequence[int]], *,
    batch_size: int = 64, **options: Any,
) -> list[str]:
    """Generates a text for each row: the target of an encoder-decoder, or a GPT's continuation.

    Args:
        model: a GPT or an encoder-decoder.
        params: its parameters.
        tokenizer: the tokenizer of the model (`data.tokenizers`), which decodes the generated ids.
        rows: token ids of the prompts, or of the sources of an encoder-decoder.
        batch_size: number of rows, of similar lengths, that are decoded together.
        **options: fields of `GenerateOptions`. A key `rng` is folded with the number of each batch.

    Raises:
        ValueError: `num_return_sequences` is above 1, or as in `generate`.
    """
    if (count := options.get("num_return_sequences", 1)) != 1:
        raise ValueError(f"num_return_sequences is {count}; it must be 1, because one text is "
                         "returned for each row. Repeat the rows, or call generation.generate")
    rng = options.pop("rng", None)
    params = decoding.transpose_kernels_for_decoding(model, params)
    texts: dict[int, str] = {}
    for k, (members, batch) in enumerate(_length_sorted_batches(rows, batch_size)):
        if rng is not None:
            options["rng"] = jax.random.fold_in(rng, k)
        start = max(map(len, batch)) if isinstance(model, GPT) else 0
        for i, row in zip(members, generate(model, params, batch, **options)):
            texts[i] = tokenizer.decode(row[start:]).strip()
    return [texts[i] for i in range(len(rows))]


def _length_sorted_batches(
    rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[tuple[list[int], list[Sequence[int]]]]:
    """Yields batches of rows of similar lengths, as (indices, rows). The last batch is padded with
    copies of its last row, because another batch size would be compiled for."""
    order = np.argsort([len(row) for row in rows], kind="stable").tolist()
    for k in range(0, len(order), batch_size):
        members = order[k : k + batch_size]
        filled = members + members[-1:] * (batch_size - len(members))
        yield members, [rows[i] for i in filled]


class MaskPrediction(NamedTuple):
    """The k most probable tokens at one mask and their probabilities, most probable first."""

    position: int
    token_ids: Int[np.ndarray, "k"]
    probabilities: Float[np.ndarray, "k"]


def fill_mask(
    model: BERT, params: dict, tokens: Sequence[int], *, mask_id: int, top_k: int = 5
) -> list[MaskPrediction]:
    """Predicts the tokens at the masks of one row with BERT, in order of position.

    `tokens` includes special tokens such as [CLS] and [SEP]; `mask_id` is the token id of [MASK].

    Raises:
        ValueError: there is no mask, an id is outside the vocabulary, the row is longer than the
            model's `max_length`, or `top_k` is below 1.

    Example:
        >>> from transformer_jax.models import BERTConfig, init_params
        >>> model = BERT(BERTConfig(vocab_size=11, max_length=8, num_layers=1, d_model=4,
        ...                         num_heads=2, mlp_dim=8))
        >>> params = init_params(model, jax.random.key(0))
        >>> [mask] = fill_mask(model, params, [1, 5, 4, 2], mask_id=4, top_k=3)
        >>> mask.position, mask.token_ids.shape
        (2, (3,))
    """
    max_length, vocab_size = model.config.max_length, model.config.vocab_size
    ids = np.asarray(tokens)
    check_token_ids([ids], vocab_size)
    if top_k < 1:
        raise ValueError(f"top_k is {top_k}; it must be at least 1")
    masks = np.flatnonzero(ids == mask_id)
    if not len(masks):
        raise ValueError(f"none of {len(ids)} tokens is the mask token {mask_id}; put [MASK] into "
                         "the text")
    if len(ids) > max_length:
        raise ValueError(f"text of {len(ids)} tokens is longer than the model's max_length of "
                         f"{max_length}; shorten it")
    length = power_of_two_length(len(ids), max_length)
    positions = pad([masks], power_of_two_length(len(masks), length), 0)
    probabilities, token_ids = map(np.asarray, _top_k_predictions(
        model, params, pad([ids], length, 0), np.arange(length)[None] < len(ids), positions,
        min(top_k, vocab_size)))
    return [MaskPrediction(int(position), token_ids[0, i], probabilities[0, i])
            for i, position in enumerate(masks)]


@functools.partial(jax.jit, static_argnames=("model", "top_k"))
def _top_k_predictions(model, params, tokens, padding_mask, positions, top_k):
    logits_BPV = model.apply({"params": params}, tokens, padding_mask=padding_mask,
                             masked_positions=positions, method="masked_lm_logits")
    return jax.lax.top_k(jax.nn.softmax(logits_BPV, axis=-1), top_k)
