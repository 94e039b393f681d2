"""Options of `generate`: validation, defaults of a checkpoint, and conversion to arrays.

Invalid options raise an error before anything is compiled.
"""

import json
import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from transformer_jax.generation.logits_processors import DecodingOptions
from transformer_jax.generation.padding import (
    bad_words_table,
    check_token_ids,
    power_of_two_length,
)
from transformer_jax.models import Config, Model

DEFAULT_MAX_NEW_TOKENS = 20  # as Hugging Face Transformers


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _integer_from(minimum: int) -> tuple:
    def is_allowed(value):
        return (isinstance(value, numbers.Integral) and not isinstance(value, bool)
                and value >= minimum)
    return is_allowed, f"it must be an integer of at least {minimum}"


# Option -> (function that checks a value, end of the error message). None is not checked.
OPTION_RULES = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences",
                     "num_assistant_tokens"), _integer_from(1)),
    **dict.fromkeys(("min_new_tokens", "min_length"), _integer_from(0)),
    "temperature": (lambda t: _is_number(t) and t > 0,
                    "it must be above 0 (do_sample=False is greedy)"),
    "top_k": (_integer_from(1)[0], "it must be an integer of at least 1, or None for no limit"),
    "top_p": (lambda p: _is_number(p) and 0 < p <= 1, "it must be above 0 and at most 1"),
    "min_p": (lambda p: _is_number(p) and 0 <= p <= 1, "it must be from 0 to 1"),
    "repetition_penalty": (lambda p: _is_number(p) and p > 0,
                           "it must be above 0; 1 is no penalty"),
    "length_penalty": (_is_number, "it must be a finite number; above 0 it favors long sequences"),
    "no_repeat_ngram_size": (_integer_from(0)[0],
                             "it must be an integer of at least 0; 0 is no limit"),
    "early_stopping": (lambda e: isinstance(e, bool) or e == "never",
                       'it must be True, False or "never"'),
}
# Likewise, for options that are not stored in a checkpoint.
_FUNCTION_RULES = {
    "streamer": (callable, "give a function that takes an array of tokens"),
    "logits_processors": (lambda ps: isinstance(ps, Sequence) and all(map(callable, ps)),
                          "give a list of functions (scores, sequences) -> scores"),
}
# Options that have an effect only with sampling or with several beams, and their neutral values.
SAMPLING_DEFAULTS = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": None}
BEAM_SEARCH_DEFAULTS = {"length_penalty": 1.0, "early_stopping": False}


def check_options(options: dict[str, Any]) -> None:
    """Checks the range of each option, and that each option that is given has an effect.

    Args:
        options: the arguments of `generate` by name.

    Raises:
        ValueError: an option is out of range or would be ignored.
    """
    for name, (is_allowed, allowed) in (OPTION_RULES | _FUNCTION_RULES).items():
        if options[name] is not None and not is_allowed(options[name]):
            raise ValueError(f"{name} is {options[name]!r}; {allowed}")
    if options["do_sample"]:
        if options["rng"] is None:
            raise ValueError("do_sample is True but rng is None; pass rng=jax.random.key(seed)")
    else:
        for name, neutral in SAMPLING_DEFAULTS.items():
            if options[name] != neutral:
                raise ValueError(f"{name} is {options[name]!r} but do_sample is False; pass "
                                 f"do_sample=True or omit {name}")
    num_beams, num_sequences = options["num_beams"], options["num_return_sequences"]
    if num_beams == 1:
        for name, neutral in BEAM_SEARCH_DEFAULTS.items():
            if options[name] != neutral:
                raise ValueError(f"{name} is {options[name]!r} but num_beams is 1; pass num_beams "
                                 f"of at least 2 or omit {name}")
        if num_sequences > 1 and not options["do_sample"]:
            raise ValueError(f"num_return_sequences is {num_sequences} but greedy decoding returns "
                             "one sequence for each prompt; pass do_sample=True, or num_beams of "
                             f"at least {num_sequences}")
        return
    if num_sequences > num_beams:
        raise ValueError(f"num_return_sequences is {num_sequences}, more than num_beams "
                         f"{num_beams}; ask for at most {num_beams} or raise num_beams")
    for name in ("streamer", "assistant_model"):
        if options[name] is not None:
            raise ValueError(f"{name} is given but num_beams is {num_beams}; beam search does not "
                             f"support it, so pass num_beams=1 or omit {name}")


def _as_token_ids(value, default, vocab_size: int, name: str) -> np.ndarray:
    """Returns one or several token ids as an array, which is empty for None."""
    value = default if value is None else value
    ids = np.atleast_1d(np.asarray([] if value is None else value))
    ids = ids.astype(np.int64) if not ids.size else ids
    check_token_ids([ids], vocab_size, name)
    return ids


def special_token_ids(
    config: Config, options: dict[str, Any], is_encoder_decoder: bool
) -> dict[str, np.ndarray]:
    """Returns the special token ids: from the option if given, else from the model's config.

    Args:
        config: config of the model.
        options: the arguments of `generate` by name.
        is_encoder_decoder: whether the model has a decoder start token.

    Raises:
        ValueError: an id is outside the vocabulary, there are several where one is allowed, an
            option is for encoder-decoders only, or there is no decoder start token.
    """
    names = ("pad_token_id", *_MASKS.values())
    ids = {name: _as_token_ids(
        options[name], getattr(config, name, None), config.vocab_size, name) for name in names}
    if not ids["pad_token_id"].size:
        ids["pad_token_id"] = ids["eos_token_id"][:1]
    for name in ("pad_token_id", "forced_bos_token_id"):
        if len(ids[name]) > 1:
            raise ValueError(f"{name} is {ids[name].tolist()}; give one id")
    if not is_encoder_decoder:
        for name in ("forced_bos_token_id", "decoder_start_token_id"):
            if options[name] is not None:
                raise ValueError(f"{name} is {options[name]} but the model is not an "
                                 "encoder-decoder; put the token into the prompts")
        return ids
    start = config.decoder_start_token_id
    start = _as_token_ids(options["decoder_start_token_id"],
                          config.bos_token_id if start is None else start,
                          config.vocab_size, "decoder_start_token_id")
    if not start.size:
        raise ValueError("decoder_start_token_id is None, as an argument and in the model's "
                         "config; give the first token of the decoder's training sequences")
    return ids | {"decoder_start_token_id": start}


def new_token_limits(
    options: dict[str, Any], *, width: int, longest: int, max_positions: int, name: str
) -> tuple[int, int]:
    """Returns (max_new_tokens, min_new_tokens).

    Args:
        options: the arguments of `generate` by name.
        width: number of columns of the prompts, which `max_length` and `min_length` include.
        longest: number of tokens of the longest prompt.
        max_positions: number of positions of the model.
        name: what a prompt is called in error messages.

    Raises:
        ValueError: the sequences would be longer than the model allows, or the minimum is above
            the maximum.
    """
    maximum, max_length = options["max_new_tokens"], options["max_length"]
    if maximum is not None and max_length is not None:
        raise ValueError(
            f"max_new_tokens is {maximum} and max_length is {max_length}; give only one of them")
    if maximum is None and max_length is not None:
        maximum = max_length - width
        if maximum < 1:
            raise ValueError(f"max_length is {max_length}, which includes the {width} tokens of "
                             f"the {name}; it must be at least {width + 1}")
    available = max_positions - longest
    if maximum is None:
        maximum = max(min(DEFAULT_MAX_NEW_TOKENS, available), 1)
    if maximum > available:
        raise ValueError(f"{name} of {longest} tokens and {maximum} new tokens exceed the model's "
                         f"max_length of {max_positions}; ask for at most {available} new tokens"
                         + (" or shorten the prompt" if name == "prompt" else ""))
    minimum = max(options["min_new_tokens"] or 0, (options["min_length"] or 0) - width)
    if minimum > maximum:
        raise ValueError(f"the minimum is {minimum} new tokens but the maximum is {maximum}; lower "
                         "min_new_tokens or min_length, or raise max_new_tokens")
    return maximum, minimum


# Field of `DecodingOptions` -> option.
_MASKS = {"is_eos": "eos_token_id", "forced_bos": "forced_bos_token_id",
          "forced_eos": "forced_eos_token_id", "suppressed": "suppress_tokens",
          "begin_suppressed": "begin_suppress_tokens"}


def prepare(
    config: Config,
    options: dict[str, Any],
    *,
    is_encoder_decoder: bool,
    num_rows: int,
    width: int,
    longest: int,
    max_positions: int,
    round_up: bool,
) -> tuple[DecodingOptions, np.ndarray | None]:
    """Converts options that `check_options` has checked.

    Args:
        config: config of the model.
        options: the arguments of `generate` by name.
        is_encoder_decoder: whether rows are sources and not prompts.
        num_rows: number of prompts or sources.
        width: number of columns of the prompts.
        longest: number of tokens of the longest prompt.
        max_positions: number of positions of the model.
        round_up: round the number of token slots up to a power of two, so that fewer lengths are
            compiled for.

    Returns:
        Options of decoding, and the first decoder token of each row; None for GPT.

    Raises:
        ValueError: an option does not fit the model or the prompts.
    """
    special_ids = special_token_ids(config, options, is_encoder_decoder)
    starts = special_ids.get("decoder_start_token_id")
    if starts is not None:
        width = longest = 1
        if len(starts) not in (1, num_rows):
            raise ValueError(f"decoder_start_token_id has {len(starts)} ids for {num_rows} "
                             "sources; give one, or one for each source")
        starts = np.broadcast_to(starts, num_rows).astype(np.int32)
    max_new_tokens, min_new_tokens = new_token_limits(
        options, width=width, longest=longest, max_positions=max_positions,
        name="decoder prompt" if is_encoder_decoder else "prompt")
    cache_length = longest + max_new_tokens
    if round_up:
        cache_length = power_of_two_length(cache_length, max_positions)

    masks = {field: np.isin(np.arange(config.vocab_size), special_ids[name])
             for field, name in _MASKS.items()}
    search = _beam_search_params(options, max_new_tokens, cache_length)
    pad, top_k = special_ids["pad_token_id"], options["top_k"]
    num_beams, num_eos_tokens = options["num_beams"], len(special_ids["eos_token_id"])
    # Candidates per beam, as in Hugging Face Transformers: enough for `num_beams` candidates to
    # remain if every end-of-sequence token is among them.
    candidates_per_beam = min(max(2, 1 + num_eos_tokens), config.vocab_size)
    min_tokens_to_keep = 1 + num_eos_tokens if num_eos_tokens else 2
    return DecodingOptions(
        rng=jax.random.key(0) if options["rng"] is None else options["rng"],
        max_new_tokens=np.int32(max_new_tokens),
        min_new_tokens=np.int32(min_new_tokens),
        pad_token_id=np.int32(pad[0] if pad.size else 0),
        # begin_suppress_tokens applies to the first token that is not forced.
        begin_index=np.int32(special_ids["forced_bos_token_id"].size > 0),
        repetition_penalty=np.float32(options["repetition_penalty"]),
        bad_words=bad_words_table(
            options["bad_words_ids"], special_ids["eos_token_id"], config.vocab_size),
        temperature=np.float32(options["temperature"]),
        top_k=np.int32(config.vocab_size if top_k is None else min(top_k, config.vocab_size)),
        top_p=np.float32(options["top_p"]),
        min_p=np.float32(options["min_p"] or 0),
        cache_length=cache_length,
        do_sample=bool(options["do_sample"]),
        rows_per_prompt=max(num_beams, options["num_return_sequences"]),
        no_repeat_ngram_size=int(options["no_repeat_ngram_size"]),
        num_beam_candidates=candidates_per_beam * num_beams if num_beams > 1 else 0,
        num_draft_tokens=(
            0 if options["assistant_model"] is None else options["num_assistant_tokens"]),
        min_tokens_to_keep=min_tokens_to_keep if num_beams > 1 else 1,
        logits_processors=tuple(options["logits_processors"]),
        **masks, **search,
    ), starts


def _beam_search_params(
    options: dict[str, Any], max_new_tokens: int, cache_length: int
) -> dict[str, Any]:
    """The fields of `DecodingOptions` for beam search, with divisors computed in float64, as in
    Hugging Face Transformers."""
    if options["num_beams"] == 1:
        return {}
    penalty = float(options["length_penalty"])
    with np.errstate(over="ignore"):
        divisor = (np.arange(1, cache_length + 1) ** penalty).astype(np.float32)
    last_divisor = divisor[max_new_tokens - 1]
    if not 0 < last_divisor < np.inf:
        raise ValueError(f"length_penalty is {penalty}, and {max_new_tokens} ** {penalty} is not "
                         "representable in float32; give a length_penalty closer to 0")
    # With "never", a running sequence is assumed to reach the length at which its score is best.
    assume_longest = options["early_stopping"] == "never" and penalty > 0
    best_case_divisor = np.full_like(divisor, last_divisor) if assume_longest else divisor
    return {"length_divisor": divisor, "best_case_divisor": best_case_divisor,
            "early_stopping": np.bool_(options["early_stopping"] is True)}


# Options that a checkpoint stores. Special token ids are not included: `generate` takes them from
# the model's config.
_CHECKPOINT_OPTIONS = {*OPTION_RULES, "do_sample", "bad_words_ids", "suppress_tokens",
                       "begin_suppress_tokens"}


def generation_options(model: Model) -> dict[str, Any]:
    """Returns the options of `generate` in a checkpoint's generation_config.json.

    If there is no such file, the options in config.json are used. Options that have no effect, such
    as a temperature without sampling, are omitted.

    Args:
        model: a model from `load_pretrained`.

    Returns:
        Keyword arguments for `generate`; `{}` for a model that was not loaded from a checkpoint.

    Example:
        >>> from transformer_jax.models import BART, presets
        >>> model = BART(presets.get("bart_base"),
        ...              hf_config='{"num_beams": 4, "max_length": 60, "temperature": 0.7}')
        >>> sorted(generation_options(model).items())
        [('max_length', 60), ('num_beams', 4)]
    """
    values = json.loads(model.hf_config or "{}")
    values = values.get("generation_config", values)
    options = {name: values[name] for name in _CHECKPOINT_OPTIONS & values.keys()
               if values[name] is not None}
    if options.get("top_k") == 0:  # in Hugging Face Transformers, no limit
        del options["top_k"]
    return drop_unused_options(options)


def drop_unused_options(options: dict[str, Any]) -> dict[str, Any]:
    """Removes options that have no effect with the others.

    These are sampling options without `do_sample`, beam search options without `num_beams` above 1,
    and `max_length` or `min_length` beside `max_new_tokens` or `min_new_tokens`.

    Example:
        >>> drop_unused_options({"num_beams": 1, "length_penalty": 2.0, "max_new_tokens": 5})
        {'num_beams': 1, 'max_new_tokens': 5}
    """
    unused = set() if options.get("do_sample") else SAMPLING_DEFAULTS.keys()
    if options.get("num_beams", 1) == 1:
        unused |= BEAM_SEARCH_DEFAULTS.keys()
    for preferred, other in (("max_new_tokens", "max_length"), ("min_new_tokens", "min_length")):
        if preferred in options:
            unused |= {other}
    return {name: value for name, value in options.items() if name not in unused}
