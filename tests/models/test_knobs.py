"""Turning a knob changes the output; what is no knob changes nothing."""

import jax
import numpy as np
import pytest
from small_models import BERT, GPT1, GPT2, LENGTH, build, forward, random_tokens

TOKENS = random_tokens(2, 6)
GPT = GPT2.replace(num_layers=1)
ENCODER = BERT.replace(num_layers=1)


def logits(config, **options):
    out = forward(config, TOKENS, **options)
    return np.asarray(out.logits if hasattr(out, "logits") else out.mlm_logits)


def assert_differs(a, b):
    """By far more than rounding, and without anything infinite."""
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.abs(a - b).max() > 1e-3 * np.abs(a).max()


@pytest.mark.parametrize("base", [GPT, ENCODER], ids=["gpt", "bert"])
@pytest.mark.parametrize(
    ("change", "tolerates"),
    [
        ({"norm_first": "flip"}, None),
        ({"activation": "relu"}, None),
        ({"positions": "sinusoidal"}, None),
        ({"norm_epsilon": 0.5}, None),
        ({"dtype": "bfloat16"}, 0.1),
        ({"context_size": 2}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config_knobs(base, change, tolerates):
    if "context_size" in change and base is ENCODER:
        pytest.skip("BERT has no context size")
    if "norm_first" in change:
        change = {"norm_first": not base.norm_first}
    # The same parameters under both configs; a superfluous final_norm or table is not read.
    params = build(base.replace(norm_first=True))[1]
    before, after = logits(base, params=params), logits(base.replace(**change), params=params)
    assert_differs(before, after)
    if tolerates:
        assert np.abs(before - after).max() < tolerates * np.abs(before).max()


@pytest.mark.parametrize("config", [GPT1, GPT2, BERT], ids=["gpt1", "gpt2", "bert"])
def test_sinusoidal_positions_add_no_parameters(config):
    learned = build(config)[1]
    fixed = build(config.replace(positions="sinusoidal"))[1]
    assert set(learned) - set(fixed) == {"position_embed"}
    assert learned["position_embed"]["embedding"].shape == (LENGTH, config.d_model)
    assert jax.tree.map(np.shape, fixed) == jax.tree.map(
        np.shape, {k: v for k, v in learned.items() if k != "position_embed"}
    )


@pytest.mark.parametrize("base", [GPT, ENCODER], ids=["gpt", "bert"])
def test_positions_matter(base):
    """Without positions, attention to a bag of equal tokens would be the same everywhere."""
    for positions in ("learned", "sinusoidal"):
        out = forward(base.replace(positions=positions), np.full((2, 6), 5))
        hidden = np.asarray(out.hidden[0])
        assert_differs(hidden[1], hidden[4])


@pytest.mark.parametrize("rate", ["dropout_rate", "attention_dropout_rate"])
@pytest.mark.parametrize("base", [GPT, ENCODER], ids=["gpt", "bert"])
def test_dropout_needs_an_rng_and_a_rate(base, rate):
    off = base.replace(dropout_rate=0.0, attention_dropout_rate=0.0)
    on = off.replace(**{rate: 0.3})
    params = build(base)[1]
    key = jax.random.key(0)
    plain = logits(off, params=params)
    dropped = logits(on, params=params, rng=key)
    assert_differs(plain, dropped)
    np.testing.assert_array_equal(dropped, logits(on, params=params, rng=key))
    assert_differs(dropped, logits(on, params=params, rng=jax.random.key(1)))
    np.testing.assert_allclose(plain, logits(on, params=params), rtol=1e-6, atol=1e-6)


def test_segments_matter():
    segments = np.array([[0, 0, 0, 1, 1, 1]] * 2)
    first = logits(ENCODER, segment_ids=np.zeros_like(segments))
    assert_differs(first, logits(ENCODER, segment_ids=segments))
    np.testing.assert_allclose(first, logits(ENCODER), rtol=1e-6, atol=1e-6)


def test_padding_of_bert_is_invisible():
    real = np.arange(6) < 4
    padding_mask = np.stack([real, np.ones(6, bool)])
    masked = forward(ENCODER, TOKENS, padding_mask=padding_mask)
    changed = np.where(padding_mask, TOKENS, 60)
    other = forward(ENCODER, changed, padding_mask=padding_mask)
    np.testing.assert_array_equal(masked.mlm_logits[0, :4], other.mlm_logits[0, :4])
    np.testing.assert_array_equal(masked.nsp_logits, other.nsp_logits)
    assert_differs(np.asarray(masked.mlm_logits), logits(ENCODER))


def test_masked_positions_choose_rows_of_the_logits():
    chosen = np.array([[4, 0], [1, 1]])
    some = forward(ENCODER, TOKENS, masked_positions=chosen).mlm_logits
    every = logits(ENCODER)
    np.testing.assert_allclose(some, np.take_along_axis(every, chosen[..., None], 1), rtol=1e-5,
                               atol=1e-5)


def test_positions_of_gpt_can_be_given():
    given = np.array([[3, 4, 5, 6, 7, 8]] * 2)
    assert_differs(logits(GPT), logits(GPT, positions=given))
    order = np.broadcast_to(np.arange(6), (2, 6))
    np.testing.assert_allclose(logits(GPT), logits(GPT, positions=order), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [GPT, ENCODER], ids=["gpt", "bert"])
def test_too_long_a_sequence_is_refused(config):
    with pytest.raises(ValueError, match=r"33 tokens is longer than the model's 32 positions; s"):
        forward(config, np.ones((1, 33)))


def test_packed_documents_are_not_decoded_with_a_cache():
    model, _ = build(GPT)
    with pytest.raises(ValueError, match="document_ids are given with a cache"):
        forward(GPT, TOKENS, document_ids=np.ones_like(TOKENS),
                cache=model.init_cache(GPT, 2, 8))
    with pytest.raises(ValueError, match="33 tokens is longer"):
        model.init_cache(GPT, 2, 33)


# ---- classification heads


def test_gpt_classifies_by_the_last_real_token():
    lengths = np.array([6, 3])
    padding_mask = np.arange(6) < lengths[:, None]
    call = {"method": "classify", "num_classes": 4, "padding_mask": padding_mask}
    scores = np.asarray(forward(GPT, TOKENS, **call))
    assert (scores.shape, scores.dtype) == ((2, 4), np.float32)
    _, params = build(GPT, 4)
    hidden = np.asarray(forward(GPT, TOKENS, params=params, method="decode").hidden)
    last = hidden[[0, 1], lengths - 1]
    np.testing.assert_allclose(
        scores, last @ params["classifier"]["kernel"] + params["classifier"]["bias"], rtol=1e-4,
        atol=1e-5,
    )
    padding = np.where(padding_mask, TOKENS, 60)
    np.testing.assert_array_equal(scores, forward(GPT, padding, **call))


def test_bert_classifies_by_the_pooled_first_token():
    call = {"method": "classify", "num_classes": 3}
    scores = np.asarray(forward(ENCODER, TOKENS, **call))
    _, params = build(ENCODER, 3)
    assert set(params) == {"token_embed", "position_embed", "segment_embed", "embed_norm",
                           "encoder", "pooler", "classifier"}
    out = forward(ENCODER, TOKENS, params=params, method="encode")
    pooled = np.tanh(np.asarray(out.hidden)[:, 0] @ params["pooler"]["kernel"]
                     + params["pooler"]["bias"])
    np.testing.assert_allclose(out.pooled, pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        scores, pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"], rtol=1e-4,
        atol=1e-5,
    )


def test_classifier_dropout():
    key = jax.random.key(0)
    for config in (GPT, ENCODER):
        off = config.replace(attention_dropout_rate=0.0)
        call = {"method": "classify", "num_classes": 3}
        assert_differs(np.asarray(forward(off, TOKENS, **call)),
                       np.asarray(forward(off, TOKENS, rng=key, **call)))
