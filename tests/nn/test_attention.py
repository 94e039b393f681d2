"""Attention masks, attention and the KV cache, on numbers computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax.nn import backends
from transformer_jax.nn.attention import (
    KVCache,
    Mask,
    causal_mask,
    dot_product_attention,
)
from transformer_jax.nn.backends.cpu import num_query_blocks
from transformer_jax.nn.dropout import keep_mask

ROW = np.arange(4)[None]


def as_text(mask) -> list[str]:
    """One string for each query: x at the keys that it attends to."""
    return ["".join("x" if attends else "." for attends in row) for row in np.asarray(mask)[0, 0]]


@pytest.mark.parametrize(
    ("attention_window", "expected"),
    [
        (None, ["x...", "xx..", "xxx.", "xxxx"]),
        (1, ["x...", ".x..", "..x.", "...x"]),
        (2, ["x...", "xx..", ".xx.", "..xx"]),
        (9, ["x...", "xx..", "xxx.", "xxxx"]),
    ],
)
def test_causal_mask(attention_window, expected):
    assert as_text(causal_mask(ROW, ROW, attention_window)) == expected


def test_causal_mask_of_queries_in_the_middle_of_a_cache():
    # Two queries at positions 1 and 2 of their row, four slots in the cache.
    assert as_text(causal_mask(np.array([[1, 2]]), ROW, 2)) == ["xx..", ".xx."]


def test_causal_mask_differs_by_batch_row():
    mask = causal_mask(np.array([[0], [2]]), ROW)
    assert mask.shape == (2, 1, 1, 4)
    assert np.asarray(mask)[:, 0, 0].tolist() == [[True, False, False, False],
                                                  [True, True, True, False]]


def test_document_mask():
    document_ids = np.array([[1, 1, 2, 0]])
    mask = Mask(query_document_ids=document_ids, key_document_ids=document_ids)
    assert as_text(mask.to_dense(4, 4)) == ["xx..", "xx..", "..x.", "...x"]
    assert as_text(mask.replace(causal=True).to_dense(4, 4)) == ["x...", "xx..", "..x.", "...x"]


def test_every_query_attends_to_prefix_keys():
    mask = Mask(causal=True).with_prefix(2, 3, 3)
    assert as_text(mask.to_dense(3, 5)) == ["xxx..", "xxxx.", "xxxxx"]
    assert Mask().with_prefix(2, 3, 3).to_dense(3, 5) is None


def test_masks_of_prompts():
    """Two prompt vectors before two tokens."""
    causal = Mask(causal=True).with_prompt(2, 2, causal=True)
    assert as_text(causal.to_dense(4, 4)) == ["x...", "xx..", "xxx.", "xxxx"]
    assert Mask().with_prompt(2, 2, causal=False).to_dense(4, 4) is None
    dense = Mask(dense_mask=np.array([[[[False, True], [False, True]]]]))
    assert as_text(dense.with_prompt(1, 2, causal=False).to_dense(3, 3)) == ["x.x"] * 3
    assert as_text(dense.with_prompt(1, 2, causal=True).to_dense(3, 3)) == ["x..", "x.x", "x.x"]


def test_no_query_attends_to_padding():
    padding_mask = np.array([[1, 1, 0]])  # integers, as tokenizers return them
    mask = Mask(padding_mask=padding_mask).to_dense(1, 3)
    assert mask.shape == (1, 1, 1, 3)
    assert mask.dtype == bool
    assert np.asarray(mask).ravel().tolist() == [True, True, False]


def one_head(values) -> jax.Array:
    """[S][H] as [1, S, 1, H]."""
    return jnp.asarray(values, jnp.float32)[None, :, None, :]


def test_attention_by_hand():
    # H = 4, so scores are divided by 2: they are 0 and log 3, the weights 1/4 and 3/4.
    query = one_head([[2, 0, 0, 0]])
    key = one_head([[0, 5, 5, 5], [np.log(3), 7, 7, 7]])
    value = one_head([[4, 0, 0, 0], [8, 0, 0, 4]])
    out, weights = dot_product_attention(query, key, value, Mask(), return_weights=True)
    np.testing.assert_allclose(weights.ravel(), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(out.ravel(), [7, 0, 0, 3], rtol=1e-6)


def test_masked_keys_have_weight_zero():
    query = one_head([[1.0]])
    out, weights = dot_product_attention(
        query, one_head([[0.0], [300.0]]), one_head([[2.0], [1e30]]),
        Mask(dense_mask=jnp.asarray([True, False])), return_weights=True)
    assert weights.ravel().tolist() == [1, 0]
    assert out.ravel().tolist() == [2]


def test_output_and_gradient_are_finite_without_any_allowed_key():
    def total(query):
        value = one_head([[2.0], [4.0]])
        mask = Mask(dense_mask=jnp.asarray([False, False]))
        return dot_product_attention(query, value, value, mask)[0].sum()

    value, gradient = jax.value_and_grad(total)(one_head([[1.0]]))
    assert value == 3
    assert np.isfinite(gradient).all()


def test_attention_weights_of_bfloat16_inputs_are_float32():
    x = jnp.ones((1, 3, 1, 4), jnp.bfloat16)
    assert dot_product_attention(x, x, x, Mask())[1] is None
    out, weights = dot_product_attention(x, x, x, Mask(), return_weights=True)
    assert (out.dtype, weights.dtype) == (jnp.bfloat16, jnp.float32)


def test_attention_dropout_has_the_given_rate_and_keeps_the_mean():
    # All weights are 1 / 500 and all values 1: the output is (kept keys) / 500 / (1 - rate).
    ones = np.ones((1, 500, 4, 1), np.float32)
    call = jax.jit(lambda rng, ones: dot_product_attention(
        ones[:, :50], ones, ones, Mask(), dropout_rate=0.2, dropout_rng=rng)[0])
    out = np.asarray(call(jax.random.key(0), ones))
    kept = np.round(out * 0.8 * 500)
    np.testing.assert_allclose(out * 0.8 * 500, kept, atol=0.05)
    # 200 queries x 500 keys, binomial: four standard deviations of the mean.
    assert abs(kept.mean() / 500 - 0.8) < 4 * (0.8 * 0.2 / 100_000) ** 0.5
    assert len(np.unique(kept)) > 5  # each query and head has its own dropout mask
    assert (np.asarray(call(jax.random.key(1), ones)) != out).any()


def reference_attention(query, key, value, mask, dropout=1.0):
    """Attention as in the paper, without blocks."""
    scores = jnp.einsum("BTNH,BSNH->BNTS", query, key) / query.shape[-1] ** 0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1)
    return jnp.einsum("BNTS,BSNH->BTNH", weights * dropout, value)


@pytest.mark.slow
@pytest.mark.parametrize(("T", "num_blocks", "case"), [
    (128, 1, "causal"), (256, 2, "causal"), (300, 2, "window"), (512, 4, "window"),
    (256, 2, "documents"), (1024, 4, "documents"), (128, 1, "dropout"), (512, 4, "dropout")])
def test_query_blocks_equal_the_reference(T, num_blocks, case):
    document_ids = jnp.asarray(np.sort(np.random.default_rng(0).integers(1, 4, (2, T)), axis=1))
    mask = Mask(causal=True)
    if case == "window":
        mask = mask.replace(attention_window=40)
    if case == "documents":
        mask = mask.replace(query_document_ids=document_ids, key_document_ids=document_ids)
    assert num_query_blocks(mask, T, T) == num_blocks
    options = {"dropout_rate": 0.3, "dropout_rng": jax.random.key(9)} if case == "dropout" else {}
    dropout = keep_mask(jax.random.key(9), (2, 3, T, T), 0.3) / 0.7 if options else 1.0
    *args, cotangent = jax.random.normal(jax.random.key(0), (4, 2, T, 3, 8))

    def by_blocks(*args):
        return (dot_product_attention(*args, mask, **options)[0] * cotangent).sum()

    def reference(*args):
        return (reference_attention(*args, mask.to_dense(T, T), dropout) * cotangent).sum()

    actual, expected = (jax.jit(jax.value_and_grad(fn, (0, 1, 2)))(*args)
                        for fn in (by_blocks, reference))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), actual, expected)


def test_query_blocks_are_for_causal_self_attention():
    causal = Mask(causal=True)
    assert num_query_blocks(Mask(), 512, 512) == 1  # every query attends to every key
    assert num_query_blocks(causal, 1, 512) == 1
    assert num_query_blocks(causal, 257, 257) == 1  # 257 is not divisible by 2


def test_query_blocks_skip_masked_scores():
    """Two blocks skip a quarter of the scores."""
    def flops(mask):
        x = jnp.ones((1, 256, 1, 64))
        fn = jax.jit(lambda x: dot_product_attention(x, x, x, mask)[0])
        return fn.lower(x).compile().cost_analysis()["flops"]

    dense = Mask(dense_mask=causal_mask(jnp.arange(256)[None], jnp.arange(256)[None]))
    with backends.use("auto"):
        assert flops(Mask(causal=True)) < 0.78 * flops(dense)


def test_cache_update_takes_positions_by_row_and_ignores_those_outside():
    cache = KVCache(jnp.zeros((2, 1, 3, 1)), jnp.zeros((2, 1, 3, 1)))
    new = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])[..., None, None]
    updated = cache.update(new, -new, np.array([[0, 1], [2, 3]]))
    assert updated.key[:, 0, :, 0].tolist() == [[1, 2, 0], [0, 0, 3]]
    assert updated.value[:, 0, :, 0].tolist() == [[-1, -2, 0], [0, 0, -3]]
    assert updated.length == 3
    np.testing.assert_array_equal(updated.as_bsnh()[0], updated.key.swapaxes(1, 2))
    assert not cache.key.any()  # the input is unchanged
