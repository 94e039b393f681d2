"""The options of `generate`: checked, and filled from the model's config where not given.

Everything here happens on the host, before anything is compiled.
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from transformer_jax.generation.beam_search import Search
from transformer_jax.generation.logits_processors import (
    LogitsProcessorParams,
    StaticGenerationConfig,
)
from transformer_jax.generation.padding import check_prompt_ids

DEFAULT_NEW_TOKENS = 20  # as the reference


def _number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _count(least: int):
    return lambda value: (
        isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= least)


# What each option has to be. None passes where it stands for a default.
LIMITS = {
    "max_new_tokens": (_count(1), "ask for at least 1"),
    "max_length": (_count(1), "it must be a whole number of at least 1"),
    "min_new_tokens": (_count(0), "it must be a whole number of at least 0"),
    "min_length": (_count(0), "it must be a whole number of at least 0"),
    "num_beams": (_count(1), "it must be a whole number of at least 1"),
    "num_return_sequences": (_count(1), "ask for at least 1"),
    "temperature": (lambda t: _number(t) and t > 0,
                    "it must be above 0 (do_sample=False is greedy)"),
    "top_k": (_count(1), "keep at least 1 token, or None for all"),
    "top_p": (lambda p: _number(p) and 0 < p <= 1, "it must be above 0 and at most 1"),
    "min_p": (lambda p: _number(p) and 0 <= p <= 1, "it must be at least 0 and at most 1"),
    "repetition_penalty": (lambda p: _number(p) and p > 0, "it must be above 0, 1 for none"),
    "length_penalty": (_number, "it must be a finite number, above 0 to favour long texts"),
    "no_repeat_ngram_size": (_count(0), "it must be a whole number, 0 for no rule"),
    "num_assistant_tokens": (_count(1), "propose at least 1 token at a time"),
    "early_stopping": (lambda e: isinstance(e, bool) or e == "never",
                       'it must be True, False or "never"'),
    "streamer": (callable, "give a function that takes an array of tokens"),
}
# Options that mean something only beside another one, and their values that change nothing.
SAMPLING = {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": None}
BEAMS = {"length_penalty": 1.0, "early_stopping": False}


def check(o: dict[str, Any]) -> None:
    """Refuse options out of range, and those that would be ignored.

    Raises:
        ValueError: names the option, its value, and what to give.
    """
    for name, (holds, mend) in LIMITS.items():
        if o[name] is not None and not holds(o[name]):
            raise ValueError(f"{name} is {o[name]!r}; {mend}")
    if o["do_sample"]:
        if o["rng"] is None:
            raise ValueError("do_sample needs rng; pass jax.random.key(seed)")
    else:
        for name, neutral in SAMPLING.items():
            if o[name] != neutral:
                raise ValueError(f"{name} is {o[name]!r} but nothing is sampled; pass "
                                 f"do_sample=True, or leave {name} out")
    beams, copies = o["num_beams"], o["num_return_sequences"]
    if beams == 1:
        for name, neutral in BEAMS.items():
            if o[name] != neutral:
                raise ValueError(f"{name} is {o[name]!r} but num_beams is 1; pass num_beams of at "
                                 f"least 2, or leave {name} out")
        if copies > 1 and not o["do_sample"]:
            raise ValueError(f"num_return_sequences is {copies} but the best text is one; pass "
                             f"do_sample=True, or num_beams of at least {copies}")
        return
    if copies > beams:
        raise ValueError(f"num_return_sequences is {copies}, more than num_beams {beams}; ask for "
                         f"at most {beams} or search with more beams")
    for name in ("streamer", "assistant_model"):
        if o[name] is not None:
            raise ValueError(f"{name} is given but num_beams is {beams}, and a beam search settles "
                             f"its text only at the end; pass num_beams=1, or leave {name} out")


def ids(value: int | Sequence[int] | None, default: Any, vocab_size: int, name: str) -> np.ndarray:
    """One or several token ids as an array; empty for none.

    Raises:
        ValueError: an id outside the vocabulary.
    """
    value = default if value is None else value
    found = np.atleast_1d(np.asarray([] if value is None else value))
    found = found.astype(np.int64) if not found.size else found
    check_prompt_ids([found], vocab_size, name)
    return found


def special_tokens(config, o: dict[str, Any], is_seq2seq: bool) -> dict[str, np.ndarray]:
    """The ids with a part to play, each from its option, else from the config."""
    names = ("eos_token_id", "pad_token_id", "forced_bos_token_id", "forced_eos_token_id",
             "suppress_tokens", "begin_suppress_tokens")
    found = {name: ids(o[name], getattr(config, name, None), config.vocab_size, name)
             for name in names}
    if not found["pad_token_id"].size:
        found["pad_token_id"] = found["eos_token_id"][:1]
    for name in ("pad_token_id", "forced_bos_token_id"):
        if len(found[name]) > 1:
            raise ValueError(f"{name} is {found[name].tolist()}; give one id")
    if not is_seq2seq:
        for name in ("forced_bos_token_id", "decoder_start_token_id"):
            if o[name] is not None:
                raise ValueError(f"{name} is {o[name]} but the model has no decoder of its own, "
                                 "and continues its prompts; put the token into the prompts")
        return found
    start = config.decoder_start_token_id
    start = ids(o["decoder_start_token_id"], config.bos_token_id if start is None else start,
                config.vocab_size, "decoder_start_token_id")
    if not start.size:
        raise ValueError("decoder_start_token_id is None, here and in the model's config; give the "
                         "token that every target began with in training")
    return found | {"decoder_start_token_id": start}


def lengths(
    o: dict[str, Any], *, width: int, longest: int, max_positions: int, what: str
) -> tuple[int, int]:
    """(max_new_tokens, min_new_tokens) for beginnings of `longest` tokens in rows `width` wide.

    Raises:
        ValueError: no room, or a least length above the greatest.
    """
    count, total = o["max_new_tokens"], o["max_length"]
    if count is not None and total is not None:
        raise ValueError(f"max_new_tokens is {count} and max_length is {total}; give one of them")
    if count is None and total is not None:
        count = total - width
        if count < 1:
            raise ValueError(f"max_length is {total}, but {what} has {width} tokens already; ask "
                             f"for at least {width + 1}, or give max_new_tokens")
    room = max_positions - longest
    if count is None:
        count = max(min(DEFAULT_NEW_TOKENS, room), 1)
    if count > room:
        raise ValueError(f"{what} of {longest} and {count} new tokens exceed the model's "
                         f"{max_positions} positions; ask for at most {room} new tokens"
                         + (" or shorten the prompt" if what == "prompt" else ""))
    least = max(o["min_new_tokens"] or 0, (o["min_length"] or 0) - width)
    if least > count:
        raise ValueError(f"at least {least} new tokens are asked for, but at most {count}; lower "
                         "min_new_tokens or min_length, or raise max_new_tokens")
    return count, least


def bad_words(words: Sequence[Sequence[int]] | None, ends, vocab_size: int) -> np.ndarray:
    """Forbidden words as one table, aligned on the right behind -1; its sides are powers of two,
    so that compiled code is kept. End tokens alone are no words: min_new_tokens is for them."""
    if words is None:
        return np.zeros((0, 1), np.int32)
    rows = [np.atleast_1d(np.asarray(word)) for word in words]
    if empty := [i for i, row in enumerate(rows) if not row.size]:
        raise ValueError(f"bad_words_ids {empty} have no tokens; leave them out")
    check_prompt_ids(rows, vocab_size, "bad_words_ids {}")
    rows = [row for row in rows if not (len(row) == 1 and row[0] in ends)]
    if not rows:
        return np.zeros((0, 1), np.int32)
    sides = [1 << (n - 1).bit_length() for n in (len(rows), max(map(len, rows)))]
    table = np.full(sides, -1, np.int32)
    for i, row in enumerate(rows):
        table[i, -len(row) :] = row
    return table


def make_rules(
    o: dict[str, Any], special: dict[str, np.ndarray], count: int, least: int, vocab_size: int
) -> LogitsProcessorParams:
    def mask(name):
        out = np.zeros(vocab_size, bool)
        out[special[name]] = True
        return out

    pad, ends = special["pad_token_id"], special["eos_token_id"]
    return LogitsProcessorParams(
        max_new_tokens=np.int32(count),
        min_new_tokens=np.int32(least),
        pad_id=np.int32(pad[0] if pad.size else 0),
        is_end=mask("eos_token_id"),
        forced_first=mask("forced_bos_token_id"),
        forced_last=mask("forced_eos_token_id"),
        suppressed=mask("suppress_tokens"),
        begin_suppressed=mask("begin_suppress_tokens"),
        # A first token that is forced is not the beginning that is meant.
        begin=np.int32(special["forced_bos_token_id"].size > 0),
        repetition_penalty=np.float32(o["repetition_penalty"]),
        bad_words=bad_words(o["bad_words_ids"], ends, vocab_size),
        temperature=np.float32(o["temperature"]),
        top_k=np.int32(vocab_size if o["top_k"] is None else min(o["top_k"], vocab_size)),
        top_p=np.float32(o["top_p"]),
        min_p=np.float32(o["min_p"] or 0),
    )


def make_plan(o: dict[str, Any], num_ends: int, vocab_size: int, cache_length: int) -> StaticGenerationConfig:
    beams = o["num_beams"]
    # So many that as many beams go on when every end token is taken; the reference's count.
    kept = max(2, 1 + num_ends)
    return StaticGenerationConfig(
        cache_length=cache_length,
        do_sample=bool(o["do_sample"]),
        copies=max(beams, o["num_return_sequences"]),
        ngram_size=int(o["no_repeat_ngram_size"]),
        num_candidates=min(kept, vocab_size) * beams if beams > 1 else 0,
        draft_length=0 if o["assistant_model"] is None else o["num_assistant_tokens"],
        min_kept=(1 + num_ends if num_ends else 2) if beams > 1 else 1,
    )


def make_search(o: dict[str, Any], count: int, cache_length: int) -> Search:
    """Divisors as tables: computed here in float64, as the reference does."""
    penalty = float(o["length_penalty"])
    with np.errstate(over="ignore"):
        divisor = (np.arange(1, cache_length + 1) ** penalty).astype(np.float32)
    longest = divisor[count - 1]
    if not 0 < longest < np.inf:
        raise ValueError(f"length_penalty is {penalty}, and {count} ** {penalty} is no number of "
                         "float32; take one nearer to 0")
    never = o["early_stopping"] == "never" and penalty > 0
    best = np.full_like(divisor, longest) if never else divisor
    return Search(divisor, best, np.bool_(o["early_stopping"] is True))
