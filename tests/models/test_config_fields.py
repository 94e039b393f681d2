"""Every config field and call option changes the output as documented, and nothing else."""

import jax
import numpy as np
import pytest
from small_models import BERT, GPT1, GPT2, LENGTH, build, forward, random_tokens

TOKENS = random_tokens(2, 6)
GPT = GPT2.replace(num_layers=1)
ENCODER = BERT.replace(num_layers=1)
BOTH = pytest.mark.parametrize("base", [GPT, ENCODER], ids=["gpt", "bert"])


def logits(config, **options):
    out = forward(config, TOKENS, **options)
    return np.asarray(out.logits if hasattr(out, "logits") else out.mlm_logits)


def assert_differs(a, b):
    """Both are finite and differ by far more than rounding."""
    assert np.isfinite(a).all() and np.isfinite(b).all()
    assert np.abs(a - b).max() > 1e-3 * np.abs(a).max()


# dtype is tested in test_precision, initialization in test_initial_parameters.
CONFIG_CHANGES = [
    (GPT, {"norm_first": False}),
    (GPT, {"residual": False}),
    (ENCODER, {"residual": False}),
    (GPT, {"activation": "relu"}),
    (GPT, {"positions": "sinusoidal"}),
    (GPT, {"norm_epsilon": 0.5}),
    (GPT, {"attention_window": 2}),
    (ENCODER, {"norm_first": True}),
    (ENCODER, {"activation": "relu"}),
    (ENCODER, {"positions": "sinusoidal"}),
    (ENCODER, {"norm_epsilon": 0.5}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("base", "change"), CONFIG_CHANGES, ids=lambda value:
                         next(iter(value), "") if isinstance(value, dict)
                         else type(value).__name__)
def test_config_fields(base, change):
    changed = base.replace(**change)
    # The same parameters under both configs; those that a config does not have are ignored.
    params = {**build(changed)[1], **build(base)[1]}
    if "norm_first" in change and base is ENCODER:
        params = build(changed)[1]
    assert_differs(logits(base), logits(changed, params=params))


@pytest.mark.parametrize("config", [GPT1, GPT2, BERT], ids=["gpt1", "gpt2", "bert"])
def test_sinusoidal_positions_add_no_parameters(config):
    learned = build(config)[1]
    fixed = build(config.replace(positions="sinusoidal"))[1]
    assert set(learned) - set(fixed) == {"position_embed"}
    assert learned["position_embed"]["embedding"].shape == (LENGTH, config.d_model)
    assert jax.tree.map(np.shape, fixed) == jax.tree.map(
        np.shape, {k: v for k, v in learned.items() if k != "position_embed"}
    )


@BOTH
def test_positions(base):
    """Equal tokens have different hidden states because of their positions."""
    for positions in ("learned", "sinusoidal"):
        hidden = forward(base.replace(positions=positions), np.full((2, 6), 5)).hidden
        assert_differs(np.asarray(hidden[0, 1]), np.asarray(hidden[0, 4]))


@BOTH
def test_dropout_depends_on_its_rng(base):
    key = jax.random.key(0, impl="rbg")  # faster to compile
    dropped = logits(base, rng=key)
    assert_differs(logits(base), dropped)
    np.testing.assert_array_equal(dropped, logits(base, rng=key))
    assert_differs(dropped, logits(base, rng=jax.random.key(1, impl="rbg")))


def random_bits_ops(jaxpr) -> int:
    """Counts the random number operations of a jaxpr, including those inside its sub-jaxprs."""
    inner = [getattr(value, "jaxpr", value) for eqn in jaxpr.eqns for value in eqn.params.values()]
    return (sum(eqn.primitive.name == "random_bits" for eqn in jaxpr.eqns)
            + sum(random_bits_ops(value) for value in inner if hasattr(value, "eqns")))


def count_dropouts(config, num_classes=0, **options) -> int:
    """Counts the dropout masks of a model call."""
    model, params = build(config, num_classes)

    def call(rng):
        out = model.apply({"params": params}, TOKENS, deterministic=False, rngs={"dropout": rng},
                          **options)
        return jax.tree.leaves(out)

    return random_bits_ops(jax.make_jaxpr(call)(jax.random.key(0)).jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("base", [GPT1, GPT2, BERT], ids=["gpt1", "gpt2", "bert"])
@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ((0.0, 0.0), 0),
        ((0.1, 0.0), 1 + 2 * 2),  # embeddings; output of attention and MLP in both layers
        ((0.0, 0.1), 2),  # attention weights in both layers
        ((0.1, 0.1), 7),
    ],
)
def test_number_of_dropout_layers(base, rates, expected):
    config = base.replace(dropout_rate=rates[0], attention_dropout_rate=rates[1])
    assert count_dropouts(config) == expected
    num_dropouts = count_dropouts(config, method="classification_logits", num_classes=3)
    assert num_dropouts == expected + (rates[0] > 0)


def test_segments():
    segment_ids = np.array([[0, 0, 0, 1, 1, 1]] * 2)
    first = logits(ENCODER, segment_ids=np.zeros_like(segment_ids))
    assert_differs(first, logits(ENCODER, segment_ids=segment_ids))
    np.testing.assert_allclose(first, logits(ENCODER), rtol=1e-6, atol=1e-6)


def test_bert_ignores_padding():
    is_token = np.arange(6) < 4
    padding_mask = np.stack([is_token, np.ones(6, bool)])
    masked = forward(ENCODER, TOKENS, padding_mask=padding_mask)
    changed = np.where(padding_mask, TOKENS, 60)
    other = forward(ENCODER, changed, padding_mask=padding_mask)
    np.testing.assert_array_equal(masked.mlm_logits[0, :4], other.mlm_logits[0, :4])
    np.testing.assert_array_equal(masked.nsp_logits, other.nsp_logits)
    assert_differs(np.asarray(masked.mlm_logits), logits(ENCODER))


def test_masked_positions_select_rows_of_the_logits():
    positions = np.array([[4, 0], [1, 1]])
    some = forward(ENCODER, TOKENS, masked_positions=positions).mlm_logits
    every = logits(ENCODER)
    np.testing.assert_allclose(some, np.take_along_axis(every, positions[..., None], 1), rtol=1e-5,
                               atol=1e-5)


def test_gpt_takes_positions():
    given = np.array([[3, 4, 5, 6, 7, 8]] * 2)
    assert_differs(logits(GPT), logits(GPT, positions=given))
    order = np.broadcast_to(np.arange(6), (2, 6))
    np.testing.assert_allclose(logits(GPT), logits(GPT, positions=order), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("config", [GPT, ENCODER], ids=["gpt", "bert"])
def test_too_long_sequence(config):
    with pytest.raises(ValueError, match=r"33 tokens is longer than the model's 32 positions; s"):
        forward(config, np.ones((1, 33)))


def test_packed_documents_and_cache():
    model, _ = build(GPT)
    with pytest.raises(ValueError, match="document_ids and cache are both given"):
        forward(GPT, TOKENS, document_ids=np.ones_like(TOKENS),
                cache=model.init_cache(GPT, 2, 8))
    with pytest.raises(ValueError, match="33 tokens is longer"):
        model.init_cache(GPT, 2, 33)


def test_gpt_classifies_by_the_last_token_before_padding():
    lengths = np.array([6, 3])
    padding_mask = np.arange(6) < lengths[:, None]
    call = {"method": "classification_logits", "num_classes": 4, "padding_mask": padding_mask}
    class_logits = np.asarray(forward(GPT, TOKENS, **call))
    assert (class_logits.shape, class_logits.dtype) == ((2, 4), np.float32)
    _, params = build(GPT, 4)
    hidden = np.asarray(forward(GPT, TOKENS, params=params, method="decode").hidden)
    last = hidden[[0, 1], lengths - 1]
    np.testing.assert_allclose(
        class_logits, last @ params["classifier"]["kernel"] + params["classifier"]["bias"],
        rtol=1e-4, atol=1e-5,
    )
    other_padding = np.where(padding_mask, TOKENS, 60)
    np.testing.assert_array_equal(class_logits, forward(GPT, other_padding, **call))


def test_bert_classifies_by_the_pooled_first_token():
    call = {"method": "classification_logits", "num_classes": 3}
    class_logits = np.asarray(forward(ENCODER, TOKENS, **call))
    _, params = build(ENCODER, 3)
    assert set(params) == {"token_embed", "position_embed", "segment_embed", "embed_norm",
                           "encoder", "pooler", "classifier"}
    out = forward(ENCODER, TOKENS, params=params, method="encode_and_pool")
    pooled = np.tanh(np.asarray(out.hidden)[:, 0] @ params["pooler"]["kernel"]
                     + params["pooler"]["bias"])
    np.testing.assert_allclose(out.pooled, pooled, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        class_logits, pooled @ params["classifier"]["kernel"] + params["classifier"]["bias"],
        rtol=1e-4, atol=1e-5,
    )
