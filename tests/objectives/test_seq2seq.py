"""Pairs as rows, the shift between decoder inputs and targets, and the smoothed loss."""

import functools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import TRANSFORMER, VOCAB, build, random_tokens

from transformer_jax.models import build_model
from transformer_jax.objectives import cross_entropy, seq2seq

SPECIAL = {"start_id": 2, "eos_id": 3, "pad_id": 1}
LENGTHS = {"source_length": 5, "target_length": 6}


def test_row_by_hand():
    row = seq2seq.prepare({"source": [7, 8], "target": [10, 11, 12]}, **LENGTHS, **SPECIAL)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [7, 8, 3, 1, 1],
        "padding_mask": [True, True, True, False, False],
        "decoder_tokens": [2, 10, 11, 12, 1, 1],
        "targets": [10, 11, 12, 3, 1, 1],
        "weights": [1, 1, 1, 1, 0, 0],
    }


def test_begin_token_and_cut():
    row = seq2seq.prepare({"source": range(10, 20), "target": range(30, 40)}, bos_id=0, **LENGTHS,
                          **SPECIAL)
    assert row["tokens"].tolist() == [0, 10, 11, 12, 3]
    assert row["targets"].tolist() == [0, 30, 31, 32, 33, 3]
    assert row["decoder_tokens"].tolist() == [2, 0, 30, 31, 32, 33]
    with pytest.raises(ValueError, match=r"target_length 2 leaves no room.*at least 3"):
        seq2seq.prepare({"source": [7], "target": [8]}, source_length=9, target_length=2, bos_id=0,
                        **SPECIAL)


def test_a_model_that_can_only_copy_has_no_advantage():
    """The best copier of its decoder inputs scores by chance; on misaligned rows it would not."""
    rng = np.random.default_rng(0)
    rows = [seq2seq.prepare({"source": [5], "target": rng.integers(4, 50, 20)},
                            source_length=3, target_length=21, **SPECIAL) for _ in range(50)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def copier(variables, tokens, decoder_tokens, **options):
        return SimpleNamespace(logits=20.0 * jax.nn.one_hot(decoder_tokens, 50))

    _, weight, metrics = seq2seq.loss(copier, {}, batch)
    hits, of = metrics["accuracy"]
    assert of == weight == 50 * 21
    assert hits / of < 0.05
    aligned = {**batch, "decoder_tokens": batch["targets"]}
    hits, of = seq2seq.loss(copier, {}, aligned)[2]["accuracy"]
    assert hits == of
    # What a target's own place holds is the token before it, in every row.
    np.testing.assert_array_equal(batch["decoder_tokens"][:, 1:], batch["targets"][:, :-1])


def test_no_logit_depends_on_its_own_target():
    params = build(TRANSFORMER)[1]
    model = build_model(TRANSFORMER.replace(vocab_size=VOCAB + 6))
    tokens, T = random_tokens(1, 4), 6

    def logit(decoder_onehot, t):
        # The embedding, looked up by a product, so that it can be differentiated.
        table = params["token_embed"]["embedding"]
        soft = {**params, "token_embed": {"embedding": jnp.concatenate(
            [table, decoder_onehot @ table])}}
        ids = len(table) + jnp.arange(T)[None]
        return model.apply({"params": soft}, tokens, ids).logits[0, t, : len(table)]

    onehot = jax.nn.one_hot(random_tokens(T), len(params["token_embed"]["embedding"]))
    jacobian = jax.jit(jax.jacobian(logit), static_argnums=1)(onehot, 2)  # [V, T, V]
    reach = np.abs(np.asarray(jacobian)).max((0, 2))
    assert (reach[:3] > 0).all() and not reach[3:].any()


def test_smoothed_cross_entropy_by_hand():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    nll = [-math.log(p) for p in (0.7, 0.2, 0.1)]
    expected = 0.9 * nll[0] + 0.1 * sum(nll) / 3
    smoothed = cross_entropy.smoothed_cross_entropy(logits, jnp.array([0]), 0.1)
    np.testing.assert_allclose(smoothed, [expected], rtol=1e-6)
    np.testing.assert_allclose(cross_entropy.smoothed_cross_entropy(logits, jnp.array([0]), 0.0),
                               cross_entropy.cross_entropy(logits, jnp.array([0])), rtol=1e-6)


def test_smoothing_trains_and_does_not_evaluate():
    model, params = build(TRANSFORMER)
    batch = seq2seq.prepare({"source": [7, 8], "target": [10, 11, 12]}, **LENGTHS, **SPECIAL)
    batch = {name: values[None] for name, values in batch.items()}

    def loss(rng, smoothing):
        fn = functools.partial(seq2seq.loss, model.apply, label_smoothing=smoothing)
        total, weight, metrics = jax.jit(fn)(params, batch, rng)
        return float(total / weight), float(metrics["nll"][0] / metrics["nll"][1])

    plain, nll = loss(None, 0.1)
    assert plain == nll
    trained, nll = loss(jax.random.key(0), 0.1)
    assert trained != nll and np.isfinite(trained)
