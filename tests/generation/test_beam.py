"""Beam search against a search over all texts, and against the textbook's without a cache."""

import itertools

import jax
import numpy as np
import pytest
from writers import FAMILIES, GPT, NEW, PROMPTS, new_tokens, next_logits, run

from transformer_jax.generation import api, beam_search

BEAMS = 3
TINY = GPT.replace(vocab_size=4)


def log_softmax(x):
    x = x - x.max()
    return x - np.log(np.exp(x).sum())


def textbook(config, prompt, ends, *, penalty=1.0, early=False, ngram=0, beams=BEAMS, new=NEW):
    """The finished texts of one row, best first: (score, tokens)."""
    running, finished = [(0.0, ())], []
    for length in range(1, new + 1):
        found = []
        for score, text in running:
            scores = score + log_softmax(next_logits(config, tuple(prompt), text))
            # n-grams count from the prompt on, a source does not.
            seen = (*prompt, *text) if config is GPT else (config.decoder_start_token_id, *text)
            for token in range(config.vocab_size):
                gram = (*seen, token)[-ngram:] if ngram else None
                if not ngram or gram not in zip(*(seen[i:] for i in range(ngram))):
                    found.append((scores[token], (*text, token)))
        found.sort(reverse=True)
        is_over = [text[-1] in ends or length == new for _, text in found]
        finished += [(score / length**penalty, text)
                     for (score, text), over in zip(found[:beams], is_over) if over]
        finished = sorted(finished, reverse=True)[:beams]
        running = [one for one, over in zip(found, is_over) if not over][:beams]
        if not running:
            break
        at_best = new if early == "never" and penalty > 0 else length
        hopeless = running[0][0] / at_best**penalty <= finished[-1][0] if finished else False
        if len(finished) == beams and (early is True or hopeless):
            break
    return finished


def frequent(config) -> list[int]:
    """Three tokens that end some rows early and others late: those that few rows have."""
    new = new_tokens(run(config=config), config)
    first_column = new[:, 0].tolist()
    written = [int(token) for token in np.unique(new) if token not in first_column]
    return sorted(sorted(written, key=lambda token: (new == token).any(1).sum())[:3])


SEARCHES = [
    {},
    {"length_penalty": 0.6, "early_stopping": True},
    {"length_penalty": 3.0, "early_stopping": True},  # rows that wait for others stay as they are
    {"length_penalty": 2.0, "early_stopping": "never"},
    {"length_penalty": -0.5, "early_stopping": "never"},
]


@pytest.mark.parametrize("family", ["gpt", "bart"])
@pytest.mark.parametrize("options", SEARCHES, ids=str)
def test_beam_search_is_the_textbook_s(family, options):
    """One program serves all these searches."""
    config = FAMILIES[family]
    ends = frequent(config)
    out = run(config=config, num_beams=BEAMS, num_return_sequences=2, eos_token_id=ends,
              pad_token_id=0, **options)
    rows = new_tokens(out, config)
    longest = 0
    for i, prompt in enumerate(PROMPTS):
        expected = textbook(config, prompt, ends, penalty=options.get("length_penalty", 1.0),
                            early=options.get("early_stopping", False))
        for row, (_, text) in zip(rows[2 * i :], expected[:2]):
            assert row[: len(text)].tolist() == list(text)
            assert (row[len(text) :] == 0).all()
            longest = max(longest, len(text))
    assert rows.shape == (6, longest)


def test_searches_differ():
    """So that the comparison above compares something."""
    ends = frequent(GPT)
    found = [tuple(text for prompt in PROMPTS for _, text in textbook(
        GPT, prompt, ends, penalty=o.get("length_penalty", 1.0),
        early=o.get("early_stopping", False))) for o in SEARCHES]
    assert len(set(found)) >= 3
    assert len({len(text) for texts in found for text in texts}) > 2


def test_no_ngram_comes_twice():
    ends = [58, 59, 60]
    prompts = [[5, 9, 5, 9], [7] * 8, [11]]
    call = {"num_beams": BEAMS, "eos_token_id": ends, "pad_token_id": 0}
    rows = run(prompts, no_repeat_ngram_size=2, **call)[:, 8:]
    for row, prompt in zip(rows, prompts):
        _, text = textbook(GPT, prompt, ends, ngram=2)[0]
        assert row[: len(text)].tolist() == list(text)
    free = run(prompts, **call)[:, 8:]
    assert rows.shape != free.shape or (rows != free).any()


def test_wide_beams_find_the_best_of_all_texts():
    """Four tokens, the last of which ends, and up to four of them: 121 texts, 110 beams."""
    prompt, end, new = (1, 2, 0), 3, 4
    rated = []
    for length in range(1, new + 1):
        for text in itertools.product(range(4), repeat=length):
            if end in text[:-1] or (length < new and text[-1] != end):
                continue
            score = sum(log_softmax(next_logits(TINY, prompt, text[:i]))[text[i]]
                        for i in range(length))
            rated.append((score, text))
    assert len(rated) == 121
    found = set()
    for penalty, early in itertools.product((0.0, 0.6, 1.0, 2.0, -1.0), (False, "never")):
        best = sorted(((score / len(text)**penalty, text) for score, text in rated), reverse=True)
        out = run([prompt], TINY, num_beams=110, num_return_sequences=5, eos_token_id=end,
                  pad_token_id=0, max_new_tokens=new, length_penalty=penalty, early_stopping=early)
        expected = [text + (0,) * (out.shape[1] - 3 - len(text)) for _, text in best[:5]]
        assert [tuple(row) for row in out[:, 3:].tolist()] == expected, (penalty, early)
        found.add(tuple(expected))
    assert len(found) >= 3  # the penalty matters


def test_one_beam_is_greedy(monkeypatch):
    """The same arguments, handed to the search for one beam."""
    ends = frequent(GPT)
    expected = run(eos_token_id=ends)

    def search(model, params, inputs, rules, rng, *, plan):
        table = np.ones(plan.cache_length, np.float32)
        found = beam_search.beam_search(
            model, params, inputs, rules, beam_search.Search(table, table, np.bool_(True)), rng,
            plan=plan._replace(num_candidates=4))
        return found.tokens[:, 0], found.lengths[:, 0]

    monkeypatch.setattr(api.sample, "write", search)
    np.testing.assert_array_equal(run(eos_token_id=ends), expected)


def test_scores_are_those_of_the_texts(monkeypatch):
    kept = []
    original = beam_search.beam_search
    monkeypatch.setattr(
        api.beam, "beam_search", lambda *a, **k: kept.append(original(*a, **k)) or kept[-1])
    ends = frequent(GPT)
    run(num_beams=BEAMS, num_return_sequences=2, eos_token_id=ends, length_penalty=0.6)
    expected = [score for prompt in PROMPTS
                for score, _ in textbook(GPT, prompt, ends, penalty=0.6)]
    np.testing.assert_allclose(kept[0].scores.ravel(), expected, rtol=1e-5)


def test_first_and_last_token_and_least_length():
    config = FAMILIES["bart"]
    ends = frequent(config)
    call = {"num_beams": BEAMS, "num_return_sequences": 2, "config": config}
    out = run(eos_token_id=ends, min_new_tokens=9, forced_bos_token_id=50, forced_eos_token_id=51,
              pad_token_id=0, **call)
    assert (out[:, 1] == 50).all()
    assert not np.isin(out[:, 2:10], [0, *ends]).any()
    assert all(row[-1] == 51 for row in out if 0 not in row)
    assert (out[:, -1] == 51).any()



def test_draws_without_putting_back_have_their_distribution():
    """Two beams of one new token, with which both finish: all pairs of two out of four."""
    n, prompt = 4000, (1, 2, 0)

    def draw(seed):
        out = run([prompt] * n, TINY, num_beams=2, num_return_sequences=2, max_new_tokens=1,
                  do_sample=True, rng=jax.random.key(seed), temperature=4.0)
        return out[:, 3].reshape(n, 2)

    pairs = draw(0)
    np.testing.assert_array_equal(pairs, draw(0))
    assert (pairs != draw(1)).any()
    p = np.exp(log_softmax(next_logits(TINY, prompt, ()) / 4))
    for a, b in itertools.combinations(range(4), 2):
        expected = n * (p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b]))
        count = (np.sort(pairs, axis=1) == [a, b]).all(1).sum()
        assert abs(count - expected) < 4 * expected**0.5


def test_rows_do_not_look_at_each_other():
    for name in ("gpt", "bart"):
        config = FAMILIES[name]
        options = {"num_beams": BEAMS, "num_return_sequences": 2, "eos_token_id": frequent(config)}
        together = new_tokens(run(config=config, **options), config)
        alone = new_tokens(run([PROMPTS[1]] * 3, config, **options), config)
        width = alone.shape[1]
        np.testing.assert_array_equal(alone, np.tile(together[2:4, :width], (3, 1)))
