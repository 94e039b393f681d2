"""`generate`: texts from GPT and from encoder-decoders.

It checks, lays the rows out, and leaves the writing to `sample`, `beam` or `speculative`.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import Array
from jaxtyping import Int, Key

from transformer_jax.generation import beam_search, decode_loop, options, speculative
from transformer_jax.generation.padding import (
    as_lists,
    check_prompt_ids,
    lengths_of,
    pad_left,
    pad_right,
    power_of_two_length,
)
from transformer_jax.generation.prefill import Inputs
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
    """Continue prompts (GPT), or write the target of a source (encoder-decoders).

    Greedy; with `do_sample` drawn; with `num_beams` above 1 by beam search; with `assistant_model`
    by speculative decoding. Options are named and mean what they do in Hugging Face Transformers,
    and where nothing is drawn the tokens are the same. Keys and values are cached; a source is read
    once. One program is compiled for each bucket of lengths (powers of two) and number of rows, and
    for each of do_sample, num_beams, num_return_sequences of draws, no_repeat_ngram_size,
    num_assistant_tokens, and number of end tokens of a beam search; other values reuse it.

    Args:
        input_ids: prompts, or sources for an encoder-decoder: lists of unequal length, or an array
            with `attention_mask` (1 at tokens, 0 at padding on either side).
        max_new_tokens: at most so many; `max_length` counts the T prompt tokens too (an
            encoder-decoder's start token). Neither: 20, or as many as there are positions.
        min_new_tokens, min_length: no end token before.
        num_return_sequences: texts for each row: draws, or the best of a beam search.
        temperature: scores are divided by it; above 0.
        top_k, top_p, min_p: draw among the k best; the best whose probability reaches p; those with
            p times the probability of the best.
        repetition_penalty: above 1 against tokens that the text has.
        no_repeat_ngram_size: no n tokens come twice, the prompt included (a source is not).
        bad_words_ids, suppress_tokens, begin_suppress_tokens: sequences that may not come, tokens
            that may not, tokens that may not come first.
        early_stopping: when a beam search ends: True, with num_beams finished texts; False, when
            the best running text, at its present length, is no better than they; "never", when
            it cannot become better.
        length_penalty: scores of finished texts are divided by length ** length_penalty.
        forced_bos_token_id, forced_eos_token_id: what an encoder-decoder's text begins with behind
            its start token, and what a text ends with where it reaches its greatest length.
        decoder_start_token_id: what the decoder begins with; one, or one for each row.
        eos_token_id: one or several ids after which a row stops; () for none.
        pad_token_id: fills rows that stop earlier than others, and prompts that are shorter.
        assistant_model: a small (model, params) of the same kind and vocabulary; it proposes
            `num_assistant_tokens` at a time. The text is as from `model` alone: the same tokens,
            or drawn from the same distribution.
        streamer: called with an int32 array [B], the next new token of every row, once for each
            column of the result in order, prompts left out.
        rng: key for sampling.

        None for one of the token ids takes the config's; a pad_token_id that is not there either is
        the first eos_token_id, or 0.

    Returns:
        int32 array on the host, `num_return_sequences` rows for each of `input_ids`, as wide as
        the longest text. GPT: the prompts, padded on the left to T (an array's own width), then
        the new tokens, from column T in every row. Encoder-decoders: the decoder's tokens, start
        token first.

    Raises:
        ValueError: an empty row, an id outside the vocabulary, more tokens than the model has
            positions, or an option out of range or without effect; nothing is compiled.
    """
    o = dict(locals())  # the options by name
    if not isinstance(model, GPT | Transformer):
        raise ValueError(f"{type(model).__name__} does not write texts; give a GPT or an "
                         "encoder-decoder (fill_mask is for BERT)")
    options.check(o)
    c, is_seq2seq = model.config, isinstance(model, Transformer)
    rows = as_lists(input_ids, attention_mask, "source" if is_seq2seq else "prompt")
    check_prompt_ids(rows, c.vocab_size)
    special = options.special_tokens(c, o, is_seq2seq)
    if is_seq2seq:
        starts = special["decoder_start_token_id"]
        if len(starts) not in (1, len(rows)):
            raise ValueError(f"decoder_start_token_id has {len(starts)} ids for {len(rows)} "
                             "sources; give one, or one for each")
        beginnings, width, longest = list(np.broadcast_to(starts, len(rows))[:, None]), 1, 1
    else:
        beginnings, longest = rows, max(map(len, rows))
        width = input_ids.shape[1] if hasattr(input_ids, "shape") else longest
    models = _models(model, params, assistant_model)
    max_positions = min(m.config.max_length for m, _ in models)
    count, least = options.lengths(
        o, width=width, longest=longest, max_positions=max_positions,
        what="start token" if is_seq2seq else "prompt")
    rules = options.make_rules(o, special, count, least, c.vocab_size)
    cache_length = power_of_two_length(longest + count, max_positions)
    plan = options.make_plan(o, len(special["eos_token_id"]), c.vocab_size, cache_length)

    prompt_bucket = 1 if is_seq2seq else power_of_two_length(longest, max_positions)
    prompt = pad_right(beginnings, prompt_bucket, rules.pad_id)
    inputs = Inputs(prompt, lengths_of(beginnings))
    if is_seq2seq:
        longest_source = max(map(len, rows))
        if longest_source > max_positions:
            raise ValueError(f"source of {longest_source} tokens is longer than the model's "
                             f"{max_positions} positions; shorten it")
        source = pad_right(rows, power_of_two_length(longest_source, max_positions), rules.pad_id)
        inputs = inputs._replace(source=source, source_lengths=lengths_of(rows))
    rng = jax.random.key(0) if rng is None else rng

    if assistant_model is not None:
        pairs = (speculative.ModelPair(*pair) for pair in zip(*models))
        arguments = (*pairs, speculative.ModelPair(inputs, inputs), rules, rng)
        write, stream = speculative.decode_speculative, speculative.decode_speculative_streaming
    else:
        arguments = (model, params, inputs, rules, rng)
        write, stream = decode_loop.decode, decode_loop.decode_streaming
    if num_beams > 1:
        search = options.make_search(o, count, cache_length)
        found = beam_search.beam_search(model, params, inputs, rules, search, rng, plan=plan)
        out = [np.concatenate(np.asarray(x)[:, :num_return_sequences])
               for x in (found.tokens, found.lengths)]
    elif streamer is not None:
        out = stream(*arguments, plan=plan, streamer=streamer)
    else:
        out = write(*arguments, plan=plan)

    tokens, new = (np.asarray(x) for x in out[:2])
    repeats = len(tokens) // len(rows)
    places = np.repeat(inputs.prompt_lengths, repeats)[:, None] + np.arange(new.max())
    left = np.repeat(pad_left(beginnings, width, rules.pad_id), repeats, axis=0)
    return np.concatenate([left, np.take_along_axis(tokens, places, axis=1)], axis=1)


def _models(model, params, assistant) -> list[tuple[GPT | Transformer, dict]]:
    """The model, and its assistant if there is one."""
    if assistant is None:
        return [(model, params)]
    try:
        draft, draft_params = assistant
    except TypeError:
        raise ValueError(f"assistant_model is a {type(assistant).__name__}; give the pair "
                         "(model, params)") from None
    kinds = GPT, Transformer
    if not any(isinstance(model, kind) and isinstance(draft, kind) for kind in kinds):
        raise ValueError(f"assistant_model is a {type(draft).__name__} and model a "
                         f"{type(model).__name__}; both must continue prompts, or both have a "
                         "source")
    sizes = model.config.vocab_size, draft.config.vocab_size
    if sizes[0] != sizes[1]:
        raise ValueError(f"assistant_model has a vocabulary of {sizes[1]} and model one of "
                         f"{sizes[0]}; they must share a tokenizer")
    return [(model, params), (draft, draft_params)]
