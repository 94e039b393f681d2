"""Who can see whom, bit for bit: perturb one token and look where the logits move."""

import functools

import numpy as np
import pytest
import small_models
from small_models import BERT, GPT1, GPT2, VOCAB, build, random_tokens

forward = functools.partial(small_models.forward, optimized=True)
T = 12
TOKENS = random_tokens(1, T)
GPTS = {
    "norm_before": GPT2,
    "norm_after": GPT1,
    "attention_window": GPT2.replace(attention_window=3),
    "sinusoidal": GPT1.replace(positions="sinusoidal", dtype="bfloat16"),
}


def perturbed(j: int) -> np.ndarray:
    tokens = TOKENS.copy()
    tokens[0, j] = (tokens[0, j] + 1) % VOCAB
    return tokens


def moved(before, after) -> np.ndarray:
    """bool [T]: whether any logit of a position differs in any bit."""
    return (np.asarray(before)[0] != np.asarray(after)[0]).any(-1)


@pytest.mark.parametrize("name", GPTS)
def test_no_token_sees_later_ones(name):
    config = GPTS[name]
    before = forward(config, TOKENS).logits
    reach = T if config.attention_window is None else config.num_layers * (config.attention_window - 1)
    for j in range(T):
        hit = moved(before, forward(config, perturbed(j)).logits)
        expected = [j <= t <= j + reach for t in range(T)]
        assert hit.tolist() == expected, f"token {j}"


def test_one_layer_sees_no_further_back_than_its_context_size():
    k = 4
    config = GPT2.replace(num_layers=1, attention_window=k)
    before = forward(config, TOKENS).logits
    for j in range(T):
        hit = moved(before, forward(config, perturbed(j)).logits)
        assert hit.tolist() == [j <= t < j + k for t in range(T)], f"token {j}"


def test_bert_sees_both_sides():
    before = forward(BERT, TOKENS)
    for j in range(T):
        after = forward(BERT, perturbed(j))
        assert moved(before.mlm_logits, after.mlm_logits).all(), f"token {j}"
        assert (before.nsp_logits != after.nsp_logits).all(), f"token {j}"


def test_packed_documents_do_not_see_each_other():
    documents = np.repeat([[1, 2, 3]], 4, axis=1).astype(np.int32)
    positions = np.tile(np.arange(4, dtype=np.int32), 3)[None]
    options = {"document_ids": documents, "positions": positions}
    before = forward(GPT2, TOKENS, **options).logits
    for j in range(T):
        hit = moved(before, forward(GPT2, perturbed(j), **options).logits)
        assert hit.tolist() == [j <= t < (j // 4 + 1) * 4 for t in range(T)], f"token {j}"
    # Each document has the logits it has when it is alone in a row.
    alone = forward(GPT2, TOKENS.reshape(3, 4)).logits
    np.testing.assert_allclose(np.asarray(before).reshape(3, 4, -1), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["norm_before", "norm_after", "attention_window"])
def test_cached_decoding_sees_no_later_token(name):
    """A chunk of four fed into a cache whose later slots hold rubbish, as padding leaves them."""
    config = GPTS[name]
    model, _ = build(config)

    def feed(tokens, rubbish):
        cache = model.init_cache(config, 1, T)
        fill = np.random.default_rng(rubbish).normal(size=cache["layer_0"].key.shape)
        cache = {name: type(kv)(*(a + fill.astype(a.dtype) for a in kv))
                 for name, kv in cache.items()}
        logits = []
        for start in range(0, T, 4):
            chunk = slice(start, start + 4)
            out = forward(config, tokens[:, chunk], cache=cache,
                          positions=np.arange(T, dtype=np.int32)[None, chunk])
            cache = out.cache
            logits.append(np.asarray(out.logits))
        return np.concatenate(logits, axis=1)

    before = feed(TOKENS, 0)
    assert not moved(before, feed(TOKENS, 1)).any()
    for j in range(T):
        hit = moved(before, feed(perturbed(j), 0))
        assert not hit[:j].any(), f"token {j}"
        assert hit[j]
