"""Speculative decoding equals decoding with the target model alone, in fewer rounds."""

import functools
import itertools

import jax
import numpy as np
import pytest
from generation_models import (
    FAMILIES,
    GPT,
    NUM_NEW,
    new_tokens,
    next_logits,
    run,
    varied_model,
)
from small_models import random_params

from transformer_jax.generation import api, speculative
from transformer_jax.models import build_model

G = 3


@functools.cache
def drafts(config):
    """Draft models: similar to the target, the target itself, random, and random and smaller."""
    model, params = varied_model(config)
    rng = np.random.default_rng(0)
    near = jax.tree.map(lambda x: x * (1 + 0.1 * rng.normal(size=x.shape)).astype(np.float32),
                        params)
    other = build_model(config.replace(d_model=12, mlp_dim=20))
    shapes = jax.eval_shape(lambda: other.init(jax.random.key(0), np.zeros((1, 1), int))["params"])
    return {"near": (model, near), "itself": (model, params),
            "random": (model, random_params(params, 3)), "small": (other, random_params(shapes, 3))}


@pytest.fixture
def rounds(monkeypatch):
    """The number of forward passes of the target model in each call."""
    counts = []
    original = api._run_compiled

    def spy(*args):
        out = original(*args)
        counts.append(int(out.num_steps))
        return out

    monkeypatch.setattr(api, "_run_compiled", spy)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "bart"])
def test_greedy_tokens_are_those_of_the_target_model(family, rounds):
    """These drafts have the architecture of the target, so all share one program."""
    config = FAMILIES[family]
    expected = run(config=config)  # in `NUM_NEW` passes
    for draft in ("near", "random", "itself"):
        out = run(config=config, assistant_model=drafts(config)[draft], num_assistant_tokens=G)
        np.testing.assert_array_equal(out, expected, err_msg=draft)
    near, random, itself = rounds[1:]
    assert rounds[0] == NUM_NEW
    assert itself == 1 + -(-(NUM_NEW - 1) // (G + 1))  # every draft token is accepted
    assert itself < near < random <= NUM_NEW


@pytest.mark.slow
def test_end_tokens_and_logits_processors_apply_to_draft_tokens():
    ends = [int(token) for token in new_tokens(run())[[0, 1, 2], [3, 5, 8]]]
    call = {"assistant_model": drafts(GPT)["near"], "num_assistant_tokens": G}
    for options in (
        {"eos_token_id": ends, "pad_token_id": 0},
        {"eos_token_id": ends, "min_new_tokens": 6, "forced_eos_token_id": 50, "pad_token_id": 0},
        {"max_new_tokens": 9, "repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1, "bad_words_ids": [[ends[0]], ends[:2]]},
    ):
        np.testing.assert_array_equal(run(**call, **options), run(**options), err_msg=str(options))
    for count in (1, 2):
        limit = {"prompts": [[3] * 16, [1], [2]], "max_new_tokens": count}
        np.testing.assert_array_equal(run(**call, **limit), run(**limit))


def test_every_position_can_be_used():
    """Draft tokens beyond the last position have no effect."""
    prompts = [[5, 9, 3], [7] * 8, list(range(1, 21))]
    expected = run(prompts, max_new_tokens=20)
    out = run(prompts, max_new_tokens=20, assistant_model=drafts(GPT)["near"],
              num_assistant_tokens=G)
    assert out.shape == (3, 40)
    np.testing.assert_array_equal(out, expected)


def test_streamed_columns_are_the_result():
    call = {"eos_token_id": int(run()[0, 11]), "pad_token_id": 0,
            "assistant_model": drafts(GPT)["near"], "num_assistant_tokens": G}
    seen = []
    out = run(streamer=seen.append, **call)
    np.testing.assert_array_equal(out, run(**call))
    np.testing.assert_array_equal(np.stack(seen, 1), out[:, 8:])
    assert all(token.dtype == np.int32 for token in seen)


# ---- sampling


def chi_square(counts, expected) -> bool:
    """Whether chi-square of counts is within four standard deviations of its mean."""
    freedom = len(expected) - 1
    return ((counts - expected) ** 2 / expected).sum() < freedom + 4 * (2 * freedom) ** 0.5


@pytest.mark.slow
def test_verify_sampled_by_hand():
    """p and q over three tokens: the first new token has distribution p, and is the draft token
    with probability sum(min(p, q))."""
    n = 20_000
    p, q = np.array([0.6, 0.3, 0.1]), np.array([0.1, 0.4, 0.5])
    rng = np.random.default_rng(0)
    draft_tokens = rng.choice(3, (n, 2), p=q).astype(np.int32)
    scores = np.broadcast_to(np.log(p).astype(np.float32), (n, 3, 3))
    draft_scores = np.broadcast_to(np.log(q).astype(np.float32), (n, 2, 3))
    tokens, accepted = map(np.asarray, speculative.verify_sampled(
        scores, draft_scores, draft_tokens, jax.random.key(0)))
    assert chi_square(np.bincount(tokens[:, 0], minlength=3), n * p)
    rate = np.minimum(p, q).sum()
    probabilities = np.array([1 - rate, rate * (1 - rate), rate**2])
    assert chi_square(np.bincount(accepted, minlength=3), n * probabilities)
    for count in range(3):  # accepted tokens are the draft tokens, and one more follows
        rows = accepted == count
        np.testing.assert_array_equal(tokens[rows, :count], draft_tokens[rows, :count])
    full = tokens[accepted == 2, 2]
    assert chi_square(np.bincount(full, minlength=3), len(full) * p)
    # Equal distributions accept everything.
    _, accepted = speculative.verify_sampled(scores, scores[:, :2], draft_tokens, jax.random.key(1))
    assert (np.asarray(accepted) == 2).all()


def test_verify_greedy_by_hand():
    scores = np.eye(4, dtype=np.float32)[[[0, 1, 2], [3, 1, 0], [1, 1, 1]]]
    tokens, accepted = speculative.verify_greedy(scores, np.array([[0, 1], [3, 0], [0, 1]]))
    assert np.asarray(accepted).tolist() == [2, 1, 0]
    assert np.asarray(tokens).tolist() == [[0, 1, 2], [3, 1, 0], [1, 1, 1]]


@pytest.mark.slow
@pytest.mark.parametrize("limits", [{}, {"top_k": 3, "temperature": 2.0}], ids=str)
def test_samples_have_the_distribution_of_the_target_model(limits):
    """All sequences of three tokens out of four, by chi-square; the draft model is smaller."""
    config = GPT.replace(vocab_size=4)
    n, prompt = 4000, (1, 2, 0)
    out = run([prompt] * n, config, assistant_model=drafts(config)["small"],
              num_assistant_tokens=2, max_new_tokens=3, do_sample=True, rng=jax.random.key(7),
              **limits)[:, 3:]

    def probabilities(sequence):
        logits = next_logits(config, prompt, sequence) / limits.get("temperature", 1.0)
        logits = np.where(logits >= np.sort(logits)[-limits.get("top_k", 4)], logits, -np.inf)
        weights = np.exp(logits - logits.max())
        return weights / weights.sum()

    counts, expected = [], []
    for sequence in itertools.product(range(4), repeat=3):
        probability = np.prod([probabilities(sequence[:i])[sequence[i]] for i in range(3)])
        count = (out == sequence).all(1).sum()
        if probability == 0:
            assert count == 0
        else:
            counts.append(count)
            expected.append(n * probability)
    assert len(expected) == limits.get("top_k", 4) ** 3
    counts, expected = np.array(counts), np.array(expected)
    rare = expected < 5  # too few for chi-square; they are pooled
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    assert len(expected) > 10 and chi_square(counts[expected > 0], expected[expected > 0])
