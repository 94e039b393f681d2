"""Host-side validation of the options of `generate`, and their conversion to arrays.

Nothing in this module compiles: invalid options raise an error before compilation.
"""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from transformer_jax.generation.beam_search import BeamSearchParams
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    StaticGenerationConfig,
)
from transformer_jax.generation.padding import check_token_ids
from transformer_jax.models import Config

DEFAULT_MAX_NEW_TOKENS = 20  # as Hugging Face Transformers


def _is_finite_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer_from(minimum: int) -> Callable[[Any], bool]:
    return lambda value: (isinstance(value, numbers.Integral) and not isinstance(value, bool)
                          and value >= minimum)


# Option -> (function that checks a value, end of the error message). None is not checked.
OPTION_RULES = {
    "max_new_tokens": (_is_integer_from(1), "it must be an integer of at least 1"),
    "max_length": (_is_integer_from(1), "it must be an integer of at least 1"),
    "min_new_tokens": (_is_integer_from(0), "it must be an integer of at least 0"),
    "min_length": (_is_integer_from(0), "it must be an integer of at least 0"),
    "num_beams": (_is_integer_from(1), "it must be an integer of at least 1"),
    "num_return_sequences": (_is_integer_from(1), "it must be an integer of at least 1"),
    "temperature": (lambda t: _is_finite_number(t) and t > 0,
                    "it must be above 0 (do_sample=False is greedy)"),
    "top_k": (_is_integer_from(1), "it must be an integer of at least 1, or None for no limit"),
    "top_p": (lambda p: _is_finite_number(p) and 0 < p <= 1, "it must be above 0 and at most 1"),
    "min_p": (lambda p: _is_finite_number(p) and 0 <= p <= 1, "it must be from 0 to 1"),
    "repetition_penalty": (lambda p: _is_finite_number(p) and p > 0,
                           "it must be above 0; 1 is no penalty"),
    "length_penalty": (_is_finite_number,
                       "it must be a finite number; above 0 it favors long sequences"),
    "no_repeat_ngram_size": (_is_integer_from(0),
                             "it must be an integer of at least 0; 0 is no limit"),
    "num_assistant_tokens": (_is_integer_from(1), "it must be an integer of at least 1"),
    "early_stopping": (lambda e: isinstance(e, bool) or e == "never",
                       'it must be True, False or "never"'),
    "streamer": (callable, "give a function that takes an array of tokens"),
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
    for name, (is_allowed, allowed) in OPTION_RULES.items():
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


def as_token_ids(
    value: int | Sequence[int] | None, default: Any, vocab_size: int, name: str
) -> np.ndarray:
    """Converts one or several token ids to an array, which is empty for None.

    Args:
        value: the option; None for `default`.
        default: the value in the model's config.
        vocab_size: number of valid ids.
        name: name of the option in error messages.

    Raises:
        ValueError: an id is outside the vocabulary.
    """
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
    names = ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
             "suppress_tokens", "begin_suppress_tokens")
    ids = {name: as_token_ids(options[name], getattr(config, name, None), config.vocab_size, name)
           for name in names}
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
    start = as_token_ids(options["decoder_start_token_id"],
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


def bad_words_table(
    bad_words_ids: Sequence[Sequence[int]] | None, eos_token_ids, vocab_size: int
) -> np.ndarray:
    """Returns forbidden token sequences as rows, aligned on the right and padded with -1.

    Both sizes of the table are powers of two, to bound the number of shapes to compile for. A
    sequence that consists of one end-of-sequence token is ignored; use `min_new_tokens` instead.

    Args:
        bad_words_ids: forbidden token sequences.
        eos_token_ids: end-of-sequence tokens.
        vocab_size: number of valid ids.

    Raises:
        ValueError: a sequence is empty, or an id is outside the vocabulary.

    Example:
        >>> bad_words_table([[4], [1, 2]], [], 10)
        array([[-1,  4],
               [ 1,  2]], dtype=int32)
    """
    if bad_words_ids is None:
        return np.zeros((0, 1), np.int32)
    rows = [np.atleast_1d(np.asarray(word)) for word in bad_words_ids]
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise ValueError(f"bad_words_ids {empty} have no tokens; omit them")
    check_token_ids(rows, vocab_size, "bad_words_ids {}")
    rows = [row for row in rows if not (len(row) == 1 and row[0] in eos_token_ids)]
    if not rows:
        return np.zeros((0, 1), np.int32)
    shape = [1 << (n - 1).bit_length() for n in (len(rows), max(map(len, rows)))]
    table = np.full(shape, -1, np.int32)
    for i, row in enumerate(rows):
        table[i, -len(row) :] = row
    return table


def make_processor_params(
    options: dict[str, Any],
    special_ids: dict[str, np.ndarray],
    max_new_tokens: int,
    min_new_tokens: int,
    vocab_size: int,
) -> LogitsProcessorParams:
    """Converts checked options to the traced parameters of the logits processors."""
    def mask(name):
        out = np.zeros(vocab_size, bool)
        out[special_ids[name]] = True
        return out

    pad, top_k = special_ids["pad_token_id"], options["top_k"]
    return LogitsProcessorParams(
        max_new_tokens=np.int32(max_new_tokens),
        min_new_tokens=np.int32(min_new_tokens),
        pad_token_id=np.int32(pad[0] if pad.size else 0),
        is_eos=mask("eos_token_id"),
        forced_bos=mask("forced_bos_token_id"),
        forced_eos=mask("forced_eos_token_id"),
        suppressed=mask("suppress_tokens"),
        begin_suppressed=mask("begin_suppress_tokens"),
        # begin_suppress_tokens applies to the first token that is not forced.
        begin_index=np.int32(special_ids["forced_bos_token_id"].size > 0),
        repetition_penalty=np.float32(options["repetition_penalty"]),
        bad_words=bad_words_table(
            options["bad_words_ids"], special_ids["eos_token_id"], vocab_size),
        temperature=np.float32(options["temperature"]),
        top_k=np.int32(vocab_size if top_k is None else min(top_k, vocab_size)),
        top_p=np.float32(options["top_p"]),
        min_p=np.float32(options["min_p"] or 0),
    )


def make_static_config(
    options: dict[str, Any], num_eos_tokens: int, vocab_size: int, cache_length: int
) -> StaticGenerationConfig:
    """Converts checked options to the compile-time configuration."""
    num_beams = options["num_beams"]
    # Candidates per beam, as in Hugging Face Transformers: enough for `num_beams` candidates to
    # remain if every end-of-sequence token is among them.
    candidates_per_beam = min(max(2, 1 + num_eos_tokens), vocab_size)
    min_tokens_to_keep = 1 + num_eos_tokens if num_eos_tokens else 2
    return StaticGenerationConfig(
        cache_length=cache_length,
        do_sample=bool(options["do_sample"]),
        rows_per_prompt=max(num_beams, options["num_return_sequences"]),
        no_repeat_ngram_size=int(options["no_repeat_ngram_size"]),
        num_beam_candidates=candidates_per_beam * num_beams if num_beams > 1 else 0,
        num_draft_tokens=(
            0 if options["assistant_model"] is None else options["num_assistant_tokens"]),
        min_tokens_to_keep=min_tokens_to_keep if num_beams > 1 else 1,
    )


def make_beam_search_params(
    options: dict[str, Any], max_new_tokens: int, cache_length: int
) -> BeamSearchParams:
    """Converts checked options to the traced parameters of beam search.

    The divisors are computed in float64, as in Hugging Face Transformers.

    Raises:
        ValueError: a divisor is not representable in float32.
    """
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
    return BeamSearchParams(
        divisor, best_case_divisor, np.bool_(options["early_stopping"] is True))
