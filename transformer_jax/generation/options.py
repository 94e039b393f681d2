"""Options of `generate`: validation, defaults of a checkpoint, and conversion to arrays."""

import dataclasses
import json
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, Key

from transformer_jax.errors import did_you_mean
from transformer_jax.generation.logits_processors import DecodingOptions, LogitsProcessor
from transformer_jax.generation.padding import bad_words_table, check_token_ids, power_of_two_length
from transformer_jax.models import Config, Model

DEFAULT_MAX_NEW_TOKENS = 20  # as Hugging Face Transformers


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """The keyword arguments of `generate`, with names and meanings of Hugging Face Transformers.

    Decoding is greedy by default, sampled with `do_sample`, by beam search with `num_beams` above
    1, and speculative with `assistant_model`. Token ids that are None are those of the model's
    config.

    Attributes:
        max_new_tokens: maximum; by default 20, or as many as the model's positions allow.
        max_length: alternative to `max_new_tokens` that includes the T prompt tokens (for an
            encoder-decoder, the decoder start token).
        min_new_tokens: minimum number of tokens before an end-of-sequence token.
        min_length: as `min_new_tokens`, with the prompt tokens included.
        num_beams: number of beams; 1 for no beam search.
        do_sample: sample tokens instead of taking the most probable one; needs `rng`.
        num_return_sequences: samples, or best sequences of a beam search, returned for each row.
        temperature: divisor of the logits when sampling; above 0.
        top_k: sample among the k most probable tokens.
        top_p: sample among the most probable tokens with total probability >= p.
        min_p: sample among tokens with at least p times the probability of the most probable one.
        repetition_penalty: above 1, penalizes tokens that the sequence contains.
        no_repeat_ngram_size: n-grams of this size occur at most once; those of the prompt count,
            those of an encoder-decoder's source do not. 0 for no limit.
        bad_words_ids: token sequences that are not generated.
        suppress_tokens: tokens that are not generated.
        begin_suppress_tokens: tokens that are not generated as the first new token, or as the
            second if the first is forced.
        early_stopping: when a beam search stops. True: once there are `num_beams` finished
            sequences. False: when, in addition, the best running sequence, scored at its current
            length, is not better than any of them. "never": when it cannot become better at any
            length.
        length_penalty: log-probabilities are divided by the number of new tokens ** length_penalty.
        forced_bos_token_id: first token after the decoder start token (encoder-decoders only).
        forced_eos_token_id: last token of a sequence of maximum length.
        decoder_start_token_id: first decoder token; one for all rows, or one for each row.
        eos_token_id: one or several token ids after which a row ends; () for none.
        pad_token_id: token id that fills shorter rows. By default the config's, else the first
            `eos_token_id`, else 0.
        assistant_model: draft model for speculative decoding, as (model, params), of the same type
            and vocabulary. The results are those of `model` alone: the same tokens, or samples from
            the same distribution.
        num_assistant_tokens: tokens that the draft model proposes at a time.
        logits_processors: functions `(scores, sequences) -> scores` that modify the scores of the
            next token, float32 [N, V]: logits, or log-probabilities in a beam search. N is B times
            the number of beams or samples; `Sequences` has the tokens of each row so far. The
            functions are applied in order, after the options above that constrain tokens and before
            `temperature`, `top_k`, `top_p` and `min_p`.
        streamer: called with each column of new tokens, int32 [N], in order, without the prompts.
        rng: key for sampling.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    min_new_tokens: int | None = None
    min_length: int | None = None
    num_beams: int = 1
    do_sample: bool = False
    num_return_sequences: int = 1
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: Sequence[Sequence[int]] | None = None
    suppress_tokens: Sequence[int] | None = None
    begin_suppress_tokens: Sequence[int] | None = None
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | Sequence[int] | None = None
    decoder_start_token_id: int | Sequence[int] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None
    assistant_model: tuple[Any, dict] | None = None
    num_assistant_tokens: int = 5
    logits_processors: Sequence[LogitsProcessor] = ()
    streamer: Callable[[Int[np.ndarray, "N"]], None] | None = None
    rng: Key[jax.Array, ""] | None = None


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(GenerateOptions)}


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _integer_from(minimum: int, meaning: str = "") -> tuple:
    def is_allowed(value):
        return (isinstance(value, numbers.Integral) and not isinstance(value, bool)
                and value >= minimum)
    return is_allowed, f"it must be an integer of at least {minimum}{meaning}"


# Option -> (function that checks a value, end of the error message).
_CHECKPOINT_RULES = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams", "num_return_sequences",
                     "num_assistant_tokens"), _integer_from(1)),
    **dict.fromkeys(("min_new_tokens", "min_length"), _integer_from(0)),
    "temperature": (lambda t: _is_number(t) and t > 0,
                    "it must be above 0 (do_sample=False is greedy)"),
    "top_k": _integer_from(1, ", or None for no limit"),
    "top_p": (lambda p: _is_number(p) and 0 < p <= 1, "it must be above 0 and at most 1"),
    "min_p": (lambda p: _is_number(p) and 0 <= p <= 1, "it must be from 0 to 1"),
    "repetition_penalty": (lambda p: _is_number(p) and p > 0,
                           "it must be above 0; 1 is no penalty"),
    "length_penalty": (_is_number, "it must be a finite number; above 0 it favors long sequences"),
    "no_repeat_ngram_size": _integer_from(0, "; 0 is no limit"),
    "early_stopping": (lambda e: isinstance(e, bool) or e == "never",
                       'it must be True, False or "never"'),
}
_RULES = _CHECKPOINT_RULES | {
    "do_sample": (lambda s: s in (False, True), "it must be True or False"),
    "streamer": (callable, "give a function that takes an array of tokens"),
    "logits_processors": (lambda ps: isinstance(ps, Sequence) and all(map(callable, ps)),
                          "give a list of functions (scores, sequences) -> scores"),
}
# Options without effect: (names, option they need, its value then, what to pass instead).
_REQUIREMENTS = (
    (("temperature", "top_k", "top_p", "min_p"), "do_sample", False, "do_sample=True"),
    (("length_penalty", "early_stopping"), "num_beams", 1, "num_beams of at least 2"),
    (("num_assistant_tokens",), "assistant_model", None, "assistant_model=(model, params)"),
)


def check_options(given: dict[str, Any]) -> GenerateOptions:
    """Checks the range of each option, and that each option that is given has an effect."""
    for name in given.keys() - _DEFAULTS.keys():
        raise ValueError(f"unknown option {name}; {did_you_mean(name, _DEFAULTS)}")
    options = GenerateOptions(**given)
    for name, (is_allowed, allowed) in _RULES.items():
        value = getattr(options, name)
        if not is_allowed(value) and (value is not None or _DEFAULTS[name] is not None):
            raise ValueError(f"{name} is {value!r}; {allowed}")
    if options.do_sample and options.rng is None:
        raise ValueError("do_sample is True but rng is None; pass rng=jax.random.key(seed)")
    for names, required, unused_value, remedy in _REQUIREMENTS:
        for name in names if getattr(options, required) == unused_value else ():
            if (value := getattr(options, name)) != _DEFAULTS[name]:
                raise ValueError(f"{name} is {value!r} but {required} is {unused_value}; pass "
                                 f"{remedy} or omit {name}")
    num_beams, num_sequences = options.num_beams, options.num_return_sequences
    if num_beams == 1:
        if num_sequences > 1 and not options.do_sample:
            raise ValueError(f"num_return_sequences is {num_sequences} but greedy decoding returns "
                             "one sequence for each prompt; pass do_sample=True, or num_beams of "
                             f"at least {num_sequences}")
        return options
    if num_sequences > num_beams:
        raise ValueError(f"num_return_sequences is {num_sequences}, more than num_beams "
                         f"{num_beams}; ask for at most {num_beams} or raise num_beams")
    for name in ("streamer", "assistant_model"):
        if getattr(options, name) is not None:
            raise ValueError(f"{name} is given but num_beams is {num_beams}; beam search does not "
                             f"support it, so pass num_beams=1 or omit {name}")
    return options


def _as_token_ids(value, default, vocab_size: int, name: str) -> np.ndarray:
    """Returns one or several token ids as an array, which is empty for None."""
    value = default if value is None else value
    ids = np.atleast_1d(np.asarray([] if value is None else value))
    ids = ids.astype(np.int64) if not ids.size else ids
    check_token_ids([ids], vocab_size, name)
    return ids


def special_token_ids(
    config: Config, options: GenerateOptions, is_encoder_decoder: bool
) -> dict[str, np.ndarray]:
    """Returns the special token ids: from the option if given, else from the model's config."""
    ids = {name: _as_token_ids(
        getattr(options, name), getattr(config, name, None), config.vocab_size, name)
        for name in ("pad_token_id", *_MASKS.values())}
    if not ids["pad_token_id"].size:
        ids["pad_token_id"] = ids["eos_token_id"][:1]
    for name in ("pad_token_id", "forced_bos_token_id"):
        if len(ids[name]) > 1:
            raise ValueError(f"{name} is {ids[name].tolist()}; give one id")
    if not is_encoder_decoder:
        for name in ("forced_bos_token_id", "decoder_start_token_id"):
            if (value := getattr(options, name)) is not None:
                raise ValueError(f"{name} is {value} but the model is not an encoder-decoder; put "
                                 "the token into the prompts")
        return ids
    start = config.decoder_start_token_id
    start = _as_token_ids(options.decoder_start_token_id,
                          config.bos_token_id if start is None else start,
                          config.vocab_size, "decoder_start_token_id")
    if not start.size:
        raise ValueError("decoder_start_token_id is None, as an argument and in the model's "
                         "config; give the first token of the decoder's training sequences")
    return ids | {"decoder_start_token_id": start}


def new_token_limits(
    options: GenerateOptions, *, width: int, longest: int, max_positions: int, name: str
) -> tuple[int, int]:
    """Returns (max_new_tokens, min_new_tokens).

    `max_length` and `min_length` include the `width` columns of the prompts. `longest` is the
    number of tokens of the longest prompt, and `name` what messages call a prompt.
    """
    maximum, max_length = options.max_new_tokens, options.max_length
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
    minimum = max(options.min_new_tokens or 0, (options.min_length or 0) - width)
    if minimum > maximum:
        raise ValueError(f"the minimum is {minimum} new tokens but the maximum is {maximum}; lower "
                         "min_new_tokens or min_length, or raise max_new_tokens")
    return maximum, minimum


# Field of `DecodingOptions` -> option.
_MASKS = {"is_eos": "eos_token_id", "forced_bos": "forced_bos_token_id",
          "forced_eos": "forced_eos_token_id", "suppressed": "suppress_tokens",
          "begin_suppressed": "begin_suppress_tokens"}


def prepare(
    config: Config, options: GenerateOptions, *, is_encoder_decoder: bool, num_rows: int,
    width: int, longest: int, max_positions: int, round_up: bool,
) -> tuple[DecodingOptions, np.ndarray | None]:
    """Converts checked options. Also returns the first decoder token of each row; None for GPT.

    `width` is the number of columns of the prompts, and `longest` the number of tokens of the
    longest one. `round_up` rounds the number of token slots up to a power of two, so that fewer
    lengths are compiled for.
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
    vocab_size, pad = config.vocab_size, special_ids["pad_token_id"]
    return DecodingOptions(
        rng=jax.random.key(0) if options.rng is None else options.rng,
        max_new_tokens=np.int32(max_new_tokens),
        min_new_tokens=np.int32(min_new_tokens),
        pad_token_id=np.int32(pad[0] if pad.size else 0),
        # begin_suppress_tokens applies to the first token that is not forced.
        begin_index=np.int32(special_ids["forced_bos_token_id"].size > 0),
        repetition_penalty=np.float32(options.repetition_penalty),
        bad_words=bad_words_table(options.bad_words_ids, special_ids["eos_token_id"], vocab_size),
        temperature=np.float32(options.temperature),
        top_k=np.int32(min(options.top_k or vocab_size, vocab_size)),
        top_p=np.float32(options.top_p),
        min_p=np.float32(options.min_p or 0),
        cache_length=cache_length,
        do_sample=bool(options.do_sample),
        rows_per_prompt=max(options.num_beams, options.num_return_sequences),
        no_repeat_ngram_size=int(options.no_repeat_ngram_size),
        num_draft_tokens=0 if options.assistant_model is None else options.num_assistant_tokens,
        logits_processors=tuple(options.logits_processors),
        **{field: np.isin(np.arange(vocab_size), special_ids[name])
           for field, name in _MASKS.items()},
        **_beam_search_params(options, max_new_tokens, cache_length,
                              len(special_ids["eos_token_id"]), vocab_size),
    ), starts


def _beam_search_params(
    options: GenerateOptions, max_new_tokens: int, cache_length: int, num_eos_tokens: int,
    vocab_size: int,
) -> dict[str, Any]:
    """The fields of `DecodingOptions` for beam search, with divisors computed in float64, as in
    Hugging Face Transformers."""
    if options.num_beams == 1:
        return {}
    penalty = float(options.length_penalty)
    with np.errstate(over="ignore"):
        divisor = (np.arange(1, cache_length + 1) ** penalty).astype(np.float32)
    last_divisor = divisor[max_new_tokens - 1]
    if not 0 < last_divisor < np.inf:
        raise ValueError(f"length_penalty is {penalty}, and {max_new_tokens} ** {penalty} is not "
                         "representable in float32; give a length_penalty closer to 0")
    # With "never", a running sequence is assumed to reach the length at which its score is best.
    assume_longest = options.early_stopping == "never" and penalty > 0
    # Enough candidates for `num_beams` to remain if every end-of-sequence token is among them, as
    # in Hugging Face Transformers.
    candidates_per_beam = max(2, 1 + num_eos_tokens)
    return {
        "length_divisor": divisor,
        "best_case_divisor": np.full_like(divisor, last_divisor) if assume_longest else divisor,
        "early_stopping": np.bool_(options.early_stopping is True),
        "num_beam_candidates": min(candidates_per_beam, vocab_size) * options.num_beams,
        "min_tokens_to_keep": candidates_per_beam}


# Options that a checkpoint stores. Special token ids are not included: `generate` takes them from
# the model's config.
_CHECKPOINT_OPTIONS = {*_CHECKPOINT_RULES, "do_sample", "bad_words_ids", "suppress_tokens",
                       "begin_suppress_tokens"}


def generation_options(model: Model) -> dict[str, Any]:
    """Returns the options of `generate` in a checkpoint's generation_config.json.

    If there is no such file, the options in config.json are used. Options that have no effect, such
    as a temperature without sampling, are omitted. The result is {} for a model that was not loaded
    from a checkpoint.

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
    """Removes options that have no effect with the others, such as a temperature without sampling.

    Example:
        >>> drop_unused_options({"num_beams": 1, "length_penalty": 2.0, "max_new_tokens": 5})
        {'num_beams': 1, 'max_new_tokens': 5}
    """
    unused = {name for names, required, unused_value, _ in _REQUIREMENTS for name in names
              if options.get(required, _DEFAULTS[required]) == unused_value}
    unused |= {f"{limit}_length" for limit in ("max", "min") if f"{limit}_new_tokens" in options}
    return {name: value for name, value in options.items() if name not in unused}
