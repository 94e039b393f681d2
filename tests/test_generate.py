"""Text from GPT and filled masks from BERT, against plain forward passes."""

import functools

import jax
import numpy as np
import pytest
import small_models
from small_models import VOCAB, build, forward

from transformer_jax import generate as generation
from transformer_jax.generate import Sampling, bucket, fill_mask, generate, restrict

CONFIG = small_models.GPT2.replace(num_layers=1, max_length=40)
PROMPTS = [[5, 9, 3], [7] * 8, [11]]
NEW = 12


@functools.cache
def lively(config):
    """A model whose text does not repeat itself: places and contexts weigh more than the last
    token, which a tied output layer favours."""
    model, params = build(config)
    table = 10 * params["position_embed"]["embedding"]
    decoder = jax.tree_util.tree_map_with_path(
        lambda path, x: 3 * x if path[1].key == "self_attention" else x, params["decoder"]
    )
    return model, {**params, "position_embed": {"embedding": table}, "decoder": decoder}


def run(prompts=PROMPTS, config=CONFIG, **options):
    model, params = lively(config)
    return generate(model, params, prompts, **{"max_new_tokens": NEW, **options})


@functools.cache
def greedy_continuation(config, prompt: tuple, count: int) -> list[int]:
    """The best next token again and again, each by a forward pass over everything so far."""
    ids = list(prompt)
    for _ in range(count):
        row = np.zeros((1, config.max_length), np.int32)
        row[0, : len(ids)] = ids
        logits = forward(config, row, params=lively(config)[1]).logits
        ids.append(int(logits[0, len(ids) - 1].argmax()))
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def greedy():
    return run()


# ---- greedy


@pytest.mark.parametrize(
    "config",
    [CONFIG, small_models.GPT1.replace(context_size=5, max_length=40)],
    ids=["norm_before", "two_layers_norm_after_context_size"],
)
def test_greedy_is_the_argmax_of_full_passes(config):
    out = run(config=config)
    assert (out.shape, out.dtype) == ((3, 8 + NEW), np.int32)
    for row, prompt in zip(out, PROMPTS):
        assert row[: 8 - len(prompt)].tolist() == [0] * (8 - len(prompt))
        assert row[8 - len(prompt) : 8].tolist() == prompt
        assert row[8:].tolist() == greedy_continuation(config, tuple(prompt), NEW)
    for row in out[:, 8:]:
        assert len(set(row.tolist())) > 4


def test_every_position_can_be_used(greedy):
    """The cache is full to the last slot; 40 positions are no power of two."""
    out = run([[5, 9, 3], [7] * 8, list(range(1, 21))], max_new_tokens=20)
    assert out.shape == (3, 40)
    assert out[0, 20:].tolist() == greedy_continuation(CONFIG, (5, 9, 3), 20)
    assert out[2, 20:].tolist() == greedy_continuation(CONFIG, tuple(range(1, 21)), 20)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_arrays_are_lists(greedy, side):
    ids, mask = np.full((3, 10), 33), np.zeros((3, 10), np.int64)
    for row, prompt in enumerate(PROMPTS):
        where = slice(-len(prompt), None) if side == "left" else slice(len(prompt))
        ids[row, where], mask[row, where] = prompt, 1
    np.testing.assert_array_equal(run(ids, attention_mask=mask), greedy)


def test_arrays_without_padding_need_no_mask(greedy):
    out = run(np.array([[5, 9, 3]] * 3))
    np.testing.assert_array_equal(out[:, 3:], np.tile(greedy[0, 8:], (3, 1)))


def test_padding_token_is_for_the_eye_only(greedy):
    out = run(pad_token_id=50)
    np.testing.assert_array_equal(out[:, 8:], greedy[:, 8:])
    assert out[0, :5].tolist() == [50] * 5


def test_fewer_tokens_are_a_prefix(greedy):
    for count in (1, 5):
        np.testing.assert_array_equal(run(max_new_tokens=count), greedy[:, : 8 + count])


# ---- end tokens


def test_end_token_stops_its_row_and_pads_the_rest(greedy):
    new = greedy[:, 8:]
    first = {int(token): i for i, token in reversed(list(enumerate(new[0])))}
    end, at = next((token, i) for token, i in first.items() if 0 < i < NEW - 1)
    out = run(eos_token_id=end, pad_token_id=44)[:, 8:]
    assert out[0].tolist() == [*new[0, : at + 1], *[44] * (NEW - at - 1)]
    for row in (1, 2):
        hits = np.flatnonzero(new[row] == end)
        stop = hits[0] + 1 if len(hits) else NEW
        assert out[row].tolist() == [*new[row, :stop], *[44] * (NEW - stop)]


def test_several_end_tokens_and_an_end_at_once(greedy):
    ends = greedy[:, 8].tolist()  # every row ends with its first new token
    out = run(eos_token_id=ends, pad_token_id=44)[:, 8:]
    np.testing.assert_array_equal(out[:, 0], ends)
    assert (out[:, 1:] == 44).all()


# ---- sampling


def options(temperature=1.0, top_k=4, top_p=1.0) -> Sampling:
    return Sampling(np.float32(temperature), np.int32(top_k), np.float32(top_p))


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (options(), [0.1, 0.4, 0.2, 0.3]),
        (options(top_k=2), [0, 0.4, 0, 0.3]),
        (options(top_k=1), [0, 0.4, 0, 0]),
        (options(top_k=99), [0.1, 0.4, 0.2, 0.3]),
        (options(top_p=0.65), [0, 0.4, 0, 0.3]),  # 0.4 is not enough, 0.7 is
        (options(top_p=0.75), [0, 0.4, 0.2, 0.3]),
        (options(top_p=0.0), [0, 0.4, 0, 0]),  # the best always stays
        # After the cut to two, 0.4 of 0.7 is 57 %: alone it reaches one half.
        (options(top_k=2, top_p=0.5), [0, 0.4, 0, 0]),
        (options(top_k=3, top_p=0.5), [0, 0.4, 0, 0.3]),  # 0.4 of 0.9 is 44 %
        # At temperature 1/2 probabilities go with squares: 16 of 30 parts are 53 %.
        (options(temperature=0.5, top_p=0.5), [0, 0.4, 0, 0]),
        (options(temperature=0.5), [0.1, 0.4, 0.2, 0.3]),
    ],
)
def test_restrict_by_hand(sampling, kept):
    logits = np.log(np.array([[0.1, 0.4, 0.2, 0.3]], np.float32))
    with np.errstate(divide="ignore"):
        expected = np.log(np.array(kept)) / sampling.temperature
    np.testing.assert_allclose(restrict(logits, sampling)[0], expected, rtol=1e-5)


def test_no_limit_keeps_a_tail_that_rounding_would_lose():
    logits = np.array([[40.0, 0.0, -40.0]], np.float32)
    np.testing.assert_array_equal(restrict(logits, options(top_k=3)), logits)


@pytest.mark.parametrize("limit", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
def test_sampling_under_tight_limits_is_greedy(greedy, limit):
    out = run(do_sample=True, rng=jax.random.key(3), **limit)
    np.testing.assert_array_equal(out, greedy)


def test_same_seed_same_text(greedy):
    def sample(seed):
        return run(do_sample=True, rng=jax.random.key(seed))

    np.testing.assert_array_equal(sample(0), sample(0))
    assert (sample(0) != sample(1)).any()
    assert (sample(0) != greedy).any()


def test_frequencies_are_the_restricted_probabilities():
    """Chi-square over 2,000 rows of one prompt, then over the steps of a uniform model."""
    n, prompt = 2000, [5, 9, 3]
    model, params = lively(CONFIG)
    call = {"do_sample": True, "rng": jax.random.key(1), "max_new_tokens": 8}
    out = run([prompt] * n, temperature=2.0, top_k=8, top_p=0.8, **call)

    logits = np.asarray(forward(CONFIG, [prompt], params=params).logits[0, -1], np.float64) / 2
    best = np.argsort(-logits)[:8]
    p = np.exp(logits[best] - logits[best].max())
    p /= p.sum()
    size = np.flatnonzero(np.cumsum(p) >= 0.8)[0] + 1
    assert 3 < size < 8  # both limits cut
    counts = np.bincount(out[:, 3], minlength=VOCAB)
    assert counts.sum() == counts[best[:size]].sum() == n
    expected = n * p[:size] / p[:size].sum()
    chi_square = ((counts[best[:size]] - expected) ** 2 / expected).sum()
    assert chi_square < size + 4 * (2 * size) ** 0.5

    nothing = jax.tree.map(np.zeros_like, params)
    new = generate(model, nothing, [prompt] * n, **call)[:, 3:]
    counts = np.bincount(new.ravel(), minlength=VOCAB)
    expected = n * 8 / VOCAB
    assert ((counts - expected) ** 2 / expected).sum() < VOCAB + 4 * (2 * VOCAB) ** 0.5
    for step in range(7):  # steps and rows draw independently
        same = (new[:, step] == new[:, step + 1]).mean()
        assert abs(same - 1 / VOCAB) < 4 * (1 / VOCAB / n) ** 0.5


# ---- compiling


def test_bucket():
    assert [bucket(n, 100) for n in (1, 16, 17, 32, 33, 64, 65, 100)] == [
        16, 16, 32, 32, 64, 64, 100, 100]
    assert bucket(3, 8) == 8


def test_one_program_for_each_bucket(greedy):
    run(do_sample=True, rng=jax.random.key(0))  # compiled by now, if not before
    size = generation._generate._cache_size()
    # Other lengths in the bucket (at most 16, and 17 to 32 in all), counts, and all options.
    run([[1], [2], [3, 4]], max_new_tokens=15)
    run([[1] * 16, [2], [3, 4]], max_new_tokens=1, eos_token_id=3, pad_token_id=9)
    run(PROMPTS, eos_token_id=[1, 2])
    for seed, limits in enumerate(({"temperature": 0.3}, {"top_k": 5}, {"top_p": 0.5}, {})):
        run(do_sample=True, rng=jax.random.key(seed), **limits)
    # An equal model, made anew, with other parameters.
    model, params = lively(CONFIG)
    again = type(model)(CONFIG.replace())
    generate(again, jax.tree.map(np.copy, params), PROMPTS, max_new_tokens=NEW)
    assert generation._generate._cache_size() == size
    # A longer text does need another program; the fixture's is kept.
    run([[1] * 17, [2], [3]], max_new_tokens=16)
    run([[1] * 20, [2], [3]], max_new_tokens=20)
    run()
    assert generation._generate._cache_size() <= size + 1


# ---- bad input


@pytest.mark.parametrize(
    ("prompts", "change", "message"),
    [
        ([[1], []], {}, r"prompts \[1\] of 2 are empty; begin them"),
        ([], {}, r"prompts \[\] of 0 are empty"),
        ([1, 2], {}, r"prompts have shapes \[\(\), \(\)\]; give a batch"),
        ([[1], [2, VOCAB]], {}, "row 1 has token id 61, outside the vocabulary of 61; use"),
        ([[-1]], {}, "row 0 has token id -1, outside"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens is 0; ask for at least 1"),
        ([[1] * 30], {"max_new_tokens": 11},
         "prompt of 30 and 11 new tokens exceed the model's 40 positions; ask for at most 10 new"),
        ([[1]], {"eos_token_id": 61}, "eos_token_id has token id 61, outside the vocabulary"),
        ([[1]], {"eos_token_id": [3, -1]}, "eos_token_id has token id -1, outside"),
        ([[1]], {"pad_token_id": 61}, "pad_token_id has token id 61, outside the vocabulary"),
        ([[1, 2], [3, 4]], {"attention_mask": [[1, 1]]}, "attention_mask has rows of shapes"),
        ([[1, 2]], {"attention_mask": [[1]]}, "attention_mask has rows of shapes"),
        ([[1, 2]], {"attention_mask": [[0, 0]]}, r"prompts \[0\] of 1 are empty"),
        ([[1]], {"temperature": 0.0}, r"temperature is 0.0; it must be above 0 \(do_sample=False"),
        ([[1]], {"temperature": float("nan")}, "temperature is nan"),
        ([[1]], {"top_k": 0}, "top_k is 0; keep at least 1 token, or None for all"),
        ([[1]], {"top_p": 0.0}, "top_p is 0.0; it must be above 0 and at most 1"),
        ([[1]], {"top_p": 1.1}, "top_p is 1.1; it must be"),
        ([[1]], {"rng": None}, r"do_sample needs rng; pass jax.random.key\(seed\)"),
    ],
)
def test_bad_input_compiles_nothing(prompts, change, message):
    size = generation._generate._cache_size()
    call = {"do_sample": True, "rng": jax.random.key(0), **change}
    with pytest.raises(ValueError, match=message) as error:
        run(prompts, **call)
    assert "\n" not in str(error.value)
    assert generation._generate._cache_size() == size


# ---- masks filled

ENCODER = small_models.BERT.replace(num_layers=1)
MASK = 4
TEXT = [2, 30, MASK, 12, 9, MASK, 3]


def test_fill_mask_is_the_softmax_of_the_model():
    """And the bucket changes nothing: the model itself is called without padding."""
    model, params = build(ENCODER)
    fills = fill_mask(model, params, TEXT, mask_id=MASK, top_k=VOCAB)
    assert [fill.position for fill in fills] == [2, 5]
    logits = np.asarray(forward(ENCODER, [TEXT]).mlm_logits[0], np.float64)
    for fill in fills:
        p = np.exp(logits[fill.position])
        p /= p.sum()
        assert sorted(fill.token_ids.tolist()) == list(range(VOCAB))
        np.testing.assert_allclose(fill.probabilities, p[fill.token_ids], rtol=1e-4)
        assert (np.diff(fill.probabilities) <= 0).all()
        assert fill.token_ids[0] == p.argmax()


@pytest.mark.parametrize(
    ("tokens", "change", "message"),
    [
        ([1, 2, 3], {}, r"no token of 3 is the mask 4; put \[MASK\] into the text"),
        ([], {}, "no token of 0 is the mask"),
        ([1, MASK, 61], {}, "row 0 has token id 61, outside the vocabulary of 61"),
        ([MASK] * 33, {}, "text of 33 tokens is longer than the model's 32 positions; shorten it"),
        ([MASK], {"top_k": 0}, "top_k is 0; ask for at least 1 candidate"),
    ],
)
def test_fill_mask_refuses(tokens, change, message):
    with pytest.raises(ValueError, match=message):
        fill_mask(*build(ENCODER), tokens, mask_id=MASK, **change)
