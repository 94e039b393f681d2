"""Greedy and sampled decoding of GPT and encoder-decoders against full passes without a cache."""

import itertools

import jax
import numpy as np
import pytest
import small_models
from generation_models import (
    FAMILIES,
    GPT,
    NUM_NEW,
    PROMPTS,
    greedy_tokens,
    new_tokens,
    run,
    varied_model,
)
from small_models import VOCAB, forward

from transformer_jax.generation import decoding, generate


@pytest.fixture(scope="module")
def greedy():
    return run()


# ---- greedy


@pytest.mark.parametrize(
    "config",
    [GPT, small_models.GPT1.replace(attention_window=5, max_length=40)],
    ids=["norm_first", "two_layers_norm_last_attention_window"],
)
def test_greedy_is_the_argmax_of_full_passes(config):
    out = run(config=config)
    assert (out.shape, out.dtype) == ((3, 8 + NUM_NEW), np.int32)
    for row, prompt in zip(out, PROMPTS):
        assert row[: 8 - len(prompt)].tolist() == [0] * (8 - len(prompt))
        assert row[8 - len(prompt) : 8].tolist() == prompt
        assert row[8:].tolist() == greedy_tokens(config, prompt, NUM_NEW)
    for row in out[:, 8:]:
        assert len(set(row.tolist())) > 4


@pytest.mark.parametrize("family", ["bart", "transformer"])
def test_targets_are_the_argmax_of_full_passes(family):
    """Sources of unequal length, padded to a power of two."""
    config = FAMILIES[family]
    out = run(config=config)
    assert (out.shape, out.dtype) == ((3, 1 + NUM_NEW), np.int32)
    assert (out[:, 0] == config.decoder_start_token_id).all()
    for row, source in zip(out, PROMPTS):
        assert row[1:].tolist() == greedy_tokens(config, source, NUM_NEW)
    assert len({tuple(row) for row in out}) == 3  # the source matters


def test_of_equal_scores_the_first_is_selected():
    scores = np.asarray([[1, 3, 3, 0], [2, 2, 2, 2], [0, 1, 2, 3], [-np.inf] * 3 + [-5.0]])
    token = decoding.select_token(jax.numpy.asarray(scores), None, do_sample=False)
    assert token.tolist() == [1, 0, 3, 3] == scores.argmax(-1).tolist()


def test_every_position_can_be_used():
    """The cache is filled to the last slot; 40 positions are not a power of two."""
    long = list(range(1, 21))
    out = run([[5, 9, 3], [7] * 8, long], max_new_tokens=20)
    assert out.shape == (3, 40)
    assert out[0, 20:].tolist() == greedy_tokens(GPT, (5, 9, 3), 20)
    assert out[2, 20:].tolist() == greedy_tokens(GPT, long, 20)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_arrays_equal_lists(family, side):
    """Except for the width of the result: that of an array is kept."""
    config = FAMILIES[family]
    ids, mask = np.full((3, 10), 33), np.zeros((3, 10), np.int64)
    for row, prompt in enumerate(PROMPTS):
        where = slice(-len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    expected = run(config=config)
    if family == "gpt":
        expected = np.pad(expected, ((0, 0), (2, 0)))
    np.testing.assert_array_equal(run(ids, config, attention_mask=mask), expected)


def test_arrays_without_padding_need_no_mask(greedy):
    out = run(np.array([[7] * 8] * 3))
    np.testing.assert_array_equal(out, np.tile(greedy[1], (3, 1)))


def test_padding_token_does_not_change_new_tokens(greedy):
    out = run(pad_token_id=50)
    np.testing.assert_array_equal(out[:, 8:], greedy[:, 8:])
    assert out[0, :5].tolist() == [50] * 5


def test_fewer_tokens_are_a_prefix(greedy):
    for count in (9, 11):
        np.testing.assert_array_equal(run(max_new_tokens=count), greedy[:, : 8 + count])
    np.testing.assert_array_equal(run(max_new_tokens=None, max_length=18), greedy[:, :18])


def test_a_row_is_the_same_alone_and_in_a_batch():
    for config in FAMILIES.values():
        together = new_tokens(run(config=config), config)
        alone = new_tokens(run([PROMPTS[1]] * 3, config), config)
        np.testing.assert_array_equal(alone, np.tile(together[1], (3, 1)))


def test_decoder_start_token_for_all_rows_or_for_each():
    config = FAMILIES["bart"]
    starts = [2, 17, 23]
    out = run(config=config, decoder_start_token_id=starts)
    assert out[:, 0].tolist() == starts
    np.testing.assert_array_equal(out[0], run(config=config)[0])
    np.testing.assert_array_equal(out[1], run(config=config, decoder_start_token_id=17)[1])
    assert (out[1, 1:] != run(config=config)[1, 1:]).any()


def test_the_source_is_encoded_once(monkeypatch):
    """The loop contains a decoder layer and the output layer, but no encoder and no projections of
    the source to keys and values."""
    config = FAMILIES["bart"]

    class Counted(Exception):
        pass

    def count_matmuls(cond, body, state):
        raise Counted(str(jax.make_jaxpr(body)(state)).count("dot_general["))

    monkeypatch.setattr(jax.lax, "while_loop", count_matmuls)
    with pytest.raises(Counted) as counted:
        run([[5, 9]] * 7, config)  # no other test has seven rows, so this is traced here
    # Self-attention 4 + 2, cross-attention without keys and values 2 + 2, MLP 2, logits 1.
    assert counted.value.args == (13,)


# ---- end tokens


def test_end_token_stops_its_row_and_pads_the_rest(greedy):
    new = greedy[:, 8:]
    first = {int(token): i for i, token in reversed(list(enumerate(new[0])))}
    end, at = next((token, i) for token, i in first.items() if 0 < i < NUM_NEW - 1)
    stops = [np.flatnonzero(row == end) for row in new]
    stops = [hits[0] + 1 if len(hits) else NUM_NEW for hits in stops]
    out = run(eos_token_id=end, pad_token_id=44)[:, 8:]
    assert out.shape == (3, max(stops))  # as wide as the longest sequence
    assert stops[0] == at + 1 < out.shape[1]
    for row, stop in enumerate(stops):
        assert out[row].tolist() == [*new[row, :stop], *[44] * (max(stops) - stop)]


def test_several_end_tokens_as_first_tokens(greedy):
    ends = greedy[:, 8].tolist()  # every row ends with its first new token
    out = run(eos_token_id=ends, pad_token_id=44)
    np.testing.assert_array_equal(out[:, 8:], np.array(ends)[:, None])


@pytest.mark.parametrize("family", FAMILIES)
def test_minimum_length_delays_the_end_token(family):
    config = FAMILIES[family]
    end = new_tokens(run(config=config), config)[:, 0].tolist()
    assert new_tokens(run(config=config, eos_token_id=end), config).shape == (3, 1)
    for least in ({"min_new_tokens": 5}, {"min_length": 13 if family == "gpt" else 6}):
        out = new_tokens(run(config=config, eos_token_id=end, pad_token_id=44, **least), config)
        assert out.shape[1] > 5
        assert not np.isin(out[:, :5], [*end, 44]).any()


@pytest.mark.parametrize("family", ["bart", "transformer"])
def test_first_and_last_token_can_be_forced(family):
    config = FAMILIES[family]
    out = run(config=config, forced_bos_token_id=50, forced_eos_token_id=51)
    assert (out[:, 1] == 50).all() and (out[:, -1] == 51).all()
    assert out.shape == (3, 1 + NUM_NEW) and not (out[:, 2:-1] == 51).all(1).any()


def test_no_ngram_is_generated_twice():
    """n-grams of the source do not count."""
    config = FAMILIES["bart"]

    def repeats(out):
        grams = [list(itertools.pairwise(row)) for row in out.tolist()]
        return [len(row) - len(set(row)) for row in grams]

    assert max(repeats(run(config=config))) > 0
    out = run(config=config, no_repeat_ngram_size=2)
    assert repeats(out) == [0, 0, 0]
    first = tuple(out[0, 1:3])
    again = run([[*first, 9], *PROMPTS[1:]], config, no_repeat_ngram_size=2)
    np.testing.assert_array_equal(again[1:], out[1:])


def test_bad_words_and_suppressed_tokens_are_not_generated(greedy):
    new = greedy[:, 8:]
    word = new[0, :2].tolist()
    single = int(new[1, 3])
    out = run(bad_words_ids=[word, [single]])[:, 8:]
    assert out[0, 0] == word[0] and out[0, 1] != word[1]
    assert not (out == single).any()
    np.testing.assert_array_equal(out[1, :3], new[1, :3])
    out = run(suppress_tokens=[single], begin_suppress_tokens=[word[0]])[:, 8:]
    assert not (out == single).any() and out[0, 0] != word[0]
    assert (run(repetition_penalty=1000.0)[:, 8:] != new).any()


# ---- streaming


def test_streamed_tokens_are_the_result():
    config = FAMILIES["bart"]
    expected = run(config=config)
    for options in ({}, {"eos_token_id": int(new_tokens(expected, config)[0, 3])}):
        seen = []
        out = run(config=config, streamer=seen.append, **options)
        np.testing.assert_array_equal(out, run(config=config, **options))
        assert all(token.shape == (3,) and token.dtype == np.int32 for token in seen)
        np.testing.assert_array_equal(np.stack(seen, 1), new_tokens(out, config))


# ---- sampling


@pytest.mark.parametrize("limit",
    [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}])
def test_sampling_under_tight_limits_is_greedy(greedy, limit):
    out = run(do_sample=True, rng=jax.random.key(3), **limit)
    np.testing.assert_array_equal(out, greedy)


def test_equal_seeds_give_equal_samples(greedy):
    def sample(seed):
        return run(do_sample=True, rng=jax.random.key(seed))

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()
    assert (sample(0) != greedy).any()


@pytest.mark.slow
def test_frequencies_are_the_truncated_probabilities():
    """Chi-square over 2,000 rows of one prompt, then over the steps of a uniform model."""
    n, prompt = 2000, [5, 9, 3]
    model, params = varied_model(GPT)
    call = {"do_sample": True, "rng": jax.random.key(1), "max_new_tokens": 8}
    out = run([prompt] * n, temperature=2.0, top_k=8, top_p=0.8, **call)

    logits = np.asarray(forward(GPT, [prompt], params=params).logits[0, -1], np.float64) / 2
    best = np.argsort(-logits)[:8]
    p = np.exp(logits[best] - logits[best].max())
    p /= p.sum()
    size = np.flatnonzero(np.cumsum(p) >= 0.8)[0] + 1
    assert 3 < size < 8  # both top_k and top_p have an effect
    counts = np.bincount(out[:, 3], minlength=VOCAB)
    assert counts.sum() == counts[best[:size]].sum() == n
    expected = n * p[:size] / p[:size].sum()
    chi_square = ((counts[best[:size]] - expected) ** 2 / expected).sum()
    assert chi_square < size + 4 * (2 * size) ** 0.5

    zeros = jax.tree.map(np.zeros_like, params)
    new = generate(model, zeros, [prompt] * n, **call)[:, 3:]
    counts = np.bincount(new.ravel(), minlength=VOCAB)
    expected = n * 8 / VOCAB
    assert ((counts - expected) ** 2 / expected).sum() < VOCAB + 4 * (2 * VOCAB) ** 0.5
    for step in range(7):  # steps and rows are independent
        same = (new[:, step] == new[:, step + 1]).mean()
        assert abs(same - 1 / VOCAB) < 4 * (1 / VOCAB / n) ** 0.5


def test_several_samples_for_each_prompt(greedy):
    """Samples of a prompt are adjacent rows; with top_k=1 all are the greedy sequence."""
    sample = {"do_sample": True, "rng": jax.random.key(0), "num_return_sequences": 3}
    np.testing.assert_array_equal(run(top_k=1, **sample), np.repeat(greedy, 3, axis=0))
    out = run(temperature=5.0, **sample)
    assert len({tuple(row) for row in out.tolist()}) == 9
    assert (out[0:3, :8] == out[0, :8]).all() and out[8, 7] == 11
