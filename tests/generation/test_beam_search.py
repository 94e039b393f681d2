"""Beam search against exhaustive search, and against a textbook implementation without a cache."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from generation_models import (
    FAMILIES,
    GPT,
    NUM_NEW,
    PROMPTS,
    new_tokens,
    next_logits,
    run,
    varied_model,
)

from transformer_jax.generation import api, decode

BEAMS = 3
TINY = GPT.replace(vocab_size=4)


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def textbook(config, prompt, ends, *, penalty=1.0, early=False, ngram=0, beams=BEAMS, new=NUM_NEW):
    """Beam search for one row. Returns the finished sequences, best first: (score, tokens)."""
    running, finished = [(0.0, ())], []
    for length in range(1, new + 1):
        candidates = []
        for score, sequence in running:
            scores = score + log_softmax(next_logits(config, tuple(prompt), sequence))
            # n-grams of a prompt count, those of a source do not.
            start = tuple(prompt) if config is GPT else (config.decoder_start_token_id,)
            seen = (*start, *sequence)
            for token in range(config.vocab_size):
                gram = (*seen, token)[-ngram:] if ngram else None
                if not ngram or gram not in zip(*(seen[i:] for i in range(ngram))):
                    candidates.append((scores[token], (*sequence, token)))
        candidates.sort(reverse=True)
        is_end = [sequence[-1] in ends or length == new for _, sequence in candidates]
        finished += [(score / length**penalty, sequence)
                     for (score, sequence), end in zip(candidates[:beams], is_end) if end]
        finished = sorted(finished, reverse=True)[:beams]
        running = [candidate for candidate, end in zip(candidates, is_end) if not end][:beams]
        if not running:
            break
        best_length = new if early == "never" and penalty > 0 else length
        best_case = running[0][0] / best_length**penalty
        cannot_improve = best_case <= finished[-1][0] if finished else False
        if len(finished) == beams and (early is True or cannot_improve):
            break
    return finished


def rare_tokens(config) -> list[int]:
    """Three tokens that occur in few greedy sequences, so that rows end at different lengths."""
    new = new_tokens(run(config=config), config)
    first_column = new[:, 0].tolist()
    generated = [int(token) for token in np.unique(new) if token not in first_column]
    return sorted(sorted(generated, key=lambda token: (new == token).any(1).sum())[:3])


SEARCHES = [
    {},
    {"length_penalty": 0.6, "early_stopping": True},
    {"length_penalty": 3.0, "early_stopping": True},  # finished rows wait for others unchanged
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"length_penalty": -0.5, "early_stopping": "never"},
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "bart"])
@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_beam_search_equals_the_textbook_implementation(family, options):
    """One compiled program serves all these searches."""
    config = FAMILIES[family]
    ends = rare_tokens(config)
    out = run(config=config, num_beams=BEAMS, num_return_sequences=2, eos_token_id=ends,
              pad_token_id=0, **options)
    rows = new_tokens(out, config)
    longest = 0
    for i, prompt in enumerate(PROMPTS):
        expected = textbook(config, prompt, ends, penalty=options.get("length_penalty", 1.0),
                            early=options.get("early_stopping", False))
        for row, (_, sequence) in zip(rows[2 * i :], expected[:2]):
            assert row[: len(sequence)].tolist() == list(sequence)
            assert (row[len(sequence) :] == 0).all()
            longest = max(longest, len(sequence))
    assert rows.shape == (6, longest)


def test_searches_have_different_results():
    """Otherwise the comparison above would be vacuous."""
    ends = rare_tokens(GPT)
    found = [tuple(sequence for prompt in PROMPTS for _, sequence in textbook(
        GPT, prompt, ends, penalty=o.get("length_penalty", 1.0),
        early=o.get("early_stopping", False))) for o in SEARCHES]
    assert len(set(found)) >= 3
    assert len({len(sequence) for sequences in found for sequence in sequences}) > 2


def test_no_ngram_occurs_twice():
    ends = [58, 59, 60]
    prompts = [[5, 9, 5, 9], [7] * 8, [11]]
    call = {"num_beams": BEAMS, "eos_token_id": ends, "pad_token_id": 0}
    rows = run(prompts, no_repeat_ngram_size=2, **call)[:, 8:]
    for row, prompt in zip(rows, prompts):
        _, sequence = textbook(GPT, prompt, ends, ngram=2)[0]
        assert row[: len(sequence)].tolist() == list(sequence)
    unlimited = run(prompts, **call)[:, 8:]
    assert rows.shape != unlimited.shape or (rows != unlimited).any()


def test_wide_beams_find_the_best_of_all_sequences():
    """4 tokens, of which the last ends a sequence of up to 4: 121 sequences, 110 beams."""
    prompt, end, new = (1, 2, 0), 3, 4
    scored = []
    for length in range(1, new + 1):
        for sequence in itertools.product(range(4), repeat=length):
            if end in sequence[:-1] or (length < new and sequence[-1] != end):
                continue
            score = sum(log_softmax(next_logits(TINY, prompt, sequence[:i]))[sequence[i]]
                        for i in range(length))
            scored.append((score, sequence))
    assert len(scored) == 121
    found = set()
    for penalty, early in itertools.product((0.0, 0.6, 1.0, 2.0, -1.0), (False, "never")):
        best = sorted(((score / len(sequence)**penalty, sequence) for score, sequence in scored),
                      reverse=True)
        out = run([prompt], TINY, num_beams=110, num_return_sequences=5, eos_token_id=end,
                  pad_token_id=0, max_new_tokens=new, length_penalty=penalty, early_stopping=early)
        expected = [sequence + (0,) * (out.shape[1] - 3 - len(sequence))
                    for _, sequence in best[:5]]
        assert [tuple(row) for row in out[:, 3:].tolist()] == expected, (penalty, early)
        found.add(tuple(expected))
    assert len(found) >= 3  # the penalty matters


def test_one_beam_is_greedy(monkeypatch):
    """Greedy decoding equals beam search with one beam."""
    ends = rare_tokens(GPT)
    expected = run(eos_token_id=ends)
    original = api._run_compiled

    def search(model, params, inputs, options):
        divisor = np.ones(options.cache_length, np.float32)
        return original(model, params, inputs, dataclasses.replace(
            options, length_divisor=divisor, best_case_divisor=divisor,
            early_stopping=np.bool_(True), num_beam_candidates=4))

    monkeypatch.setattr(api, "_run_compiled", search)
    np.testing.assert_array_equal(run(eos_token_id=ends), expected)


def test_scores_are_those_of_the_sequences():
    ends, longest = rare_tokens(GPT), max(map(len, PROMPTS))
    padded = np.array([prompt + [0] * (longest - len(prompt)) for prompt in PROMPTS])
    out = decode(*varied_model(GPT), padded, np.array([len(prompt) for prompt in PROMPTS]),
                 num_beams=BEAMS, num_return_sequences=2, eos_token_id=ends, length_penalty=0.6,
                 max_new_tokens=NUM_NEW, pad_token_id=0)
    expected = [best for prompt in PROMPTS
                for best in textbook(GPT, prompt, ends, penalty=0.6)[:2]]
    np.testing.assert_allclose(out.scores, [score for score, _ in expected], rtol=1e-5)
    for i, (row, length, (_, sequence)) in enumerate(zip(out.tokens, out.lengths, expected)):
        found = np.asarray(row)[:length].tolist()
        assert found == [*PROMPTS[i // 2], *sequence]
        assert not np.asarray(row)[length:].any()


def test_forced_tokens_and_minimum_length():
    config = FAMILIES["bart"]
    ends = rare_tokens(config)
    call = {"num_beams": BEAMS, "num_return_sequences": 2, "config": config}
    out = run(eos_token_id=ends, min_new_tokens=9, forced_bos_token_id=50, forced_eos_token_id=51,
              pad_token_id=0, **call)
    assert (out[:, 1] == 50).all()
    assert not np.isin(out[:, 2:10], [0, *ends]).any()
    assert all(row[-1] == 51 for row in out if 0 not in row)
    assert (out[:, -1] == 51).any()


def test_samples_without_replacement_have_their_distribution():
    """Two beams of one new token, with which both finish: all pairs of two out of four."""
    n, prompt = 4000, (1, 2, 0)

    def sample(seed):
        out = run([prompt] * n, TINY, num_beams=2, num_return_sequences=2, max_new_tokens=1,
                  do_sample=True, rng=jax.random.key(seed), temperature=4.0)
        return out[:, 3].reshape(n, 2)

    pairs = sample(0)
    np.testing.assert_array_equal(pairs, sample(0))
    assert (pairs != sample(1)).any()
    p = np.exp(log_softmax(next_logits(TINY, prompt, ()) / 4))
    for a, b in itertools.combinations(range(4), 2):
        expected = n * (p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]))
        count = (np.sort(pairs, axis=1) == [a, b]).all(1).sum()
        assert abs(count - expected) < 4 * expected**0.5


def test_rows_are_independent():
    for name in ("gpt", "bart"):
        config = FAMILIES[name]
        options = {"num_beams": BEAMS, "num_return_sequences": 2,
                   "eos_token_id": rare_tokens(config)}
        together = new_tokens(run(config=config, **options), config)
        alone = new_tokens(run([PROMPTS[1]] * 3, config, **options), config)
        width = alone.shape[1]
        np.testing.assert_array_equal(alone, np.tile(together[2:4, :width], (3, 1)))
