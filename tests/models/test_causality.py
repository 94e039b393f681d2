"""Causality and masks, bitwise: which logits change when one token changes."""

import functools

import numpy as np
import pytest
import small_models
from small_models import BERT, GPT1, GPT2, VOCAB, build, random_tokens

forward = functools.partial(small_models.forward, optimized=True)
T = 12
TOKENS = random_tokens(1, T)
GPTS = {
    "pre_norm": GPT2,
    "post_norm": GPT1,
    "attention_window": GPT2.replace(attention_window=3),
    "sinusoidal": GPT1.replace(positions="sinusoidal", dtype="bfloat16"),
}


def perturbed(j: int) -> np.ndarray:
    """Returns the tokens with another token at j."""
    tokens = TOKENS.copy()
    tokens[0, j] = (tokens[0, j] + 1) % VOCAB
    return tokens


def changed(before, after) -> np.ndarray:
    """Returns, for each of T positions, whether any logit differs in any bit."""
    return (np.asarray(before)[0] != np.asarray(after)[0]).any(-1)


@pytest.mark.slow
@pytest.mark.parametrize("name", GPTS)
def test_gpt_is_causal(name):
    config = GPTS[name]
    before = forward(config, TOKENS).logits
    window = config.attention_window
    reach = T if window is None else config.num_layers * (window - 1)
    for j in range(T):
        is_changed = changed(before, forward(config, perturbed(j)).logits)
        expected = [j <= t <= j + reach for t in range(T)]
        assert is_changed.tolist() == expected, f"token {j}"


def test_attention_window_of_one_layer():
    window = 4
    config = GPT2.replace(num_layers=1, attention_window=window)
    before = forward(config, TOKENS).logits
    for j in range(T):
        is_changed = changed(before, forward(config, perturbed(j)).logits)
        assert is_changed.tolist() == [j <= t < j + window for t in range(T)], f"token {j}"


def test_bert_is_bidirectional():
    before = forward(BERT, TOKENS)
    for j in range(T):
        after = forward(BERT, perturbed(j))
        assert changed(before.mlm_logits, after.mlm_logits).all(), f"token {j}"
        assert (before.nsp_logits != after.nsp_logits).all(), f"token {j}"


def test_tokens_do_not_attend_to_other_packed_documents():
    document_ids = np.repeat([[1, 2, 3]], 4, axis=1).astype(np.int32)
    positions = np.tile(np.arange(4, dtype=np.int32), 3)[None]
    options = {"document_ids": document_ids, "positions": positions}
    before = forward(GPT2, TOKENS, **options).logits
    for j in range(T):
        is_changed = changed(before, forward(GPT2, perturbed(j), **options).logits)
        assert is_changed.tolist() == [j <= t < (j // 4 + 1) * 4 for t in range(T)], f"token {j}"
    # Each document has the same logits as in a row of its own.
    unpacked = forward(GPT2, TOKENS.reshape(3, 4)).logits
    np.testing.assert_allclose(np.asarray(before).reshape(3, 4, -1), unpacked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["pre_norm", "post_norm", "attention_window"])
def test_cached_decoding_is_causal(name):
    """Decodes in chunks of four; the later slots of the cache hold arbitrary values."""
    config = GPTS[name]
    model, _ = build(config)

    def decode(tokens, fill_seed):
        cache = model.init_cache(config, 1, T)
        fill = np.random.default_rng(fill_seed).normal(size=cache["layer_0"].key.shape)
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

    before = decode(TOKENS, 0)
    assert not changed(before, decode(TOKENS, 1)).any()
    for j in range(T):
        is_changed = changed(before, decode(perturbed(j), 0))
        assert not is_changed[:j].any(), f"token {j}"
        assert is_changed[j]
