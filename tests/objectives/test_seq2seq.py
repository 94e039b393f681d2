"""Sequence to sequence: rows, the shift between decoder inputs and targets, label smoothing."""

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


def test_bos_token_and_truncation():
    row = seq2seq.prepare({"source": range(10, 20), "target": range(30, 40)}, bos_id=0, **LENGTHS,
                          **SPECIAL)
    assert row["tokens"].tolist() == [0, 10, 11, 12, 3]
    assert row["targets"].tolist() == [0, 30, 31, 32, 33, 3]
    assert row["decoder_tokens"].tolist() == [2, 0, 30, 31, 32, 33]
    with pytest.raises(ValueError, match=r"target_length 2 leaves no room.*at least 3"):
        seq2seq.prepare({"source": [7], "target": [8]}, source_length=9, target_length=2, bos_id=0,
                        **SPECIAL)


def test_copying_the_decoder_inputs_gives_chance_accuracy():
    """If decoder inputs were not shifted, a model that copies them would be always correct."""
    rng = np.random.default_rng(0)
    rows = [seq2seq.prepare({"source": [5], "target": rng.integers(4, 50, 20)},
                            source_length=3, target_length=21, **SPECIAL) for _ in range(50)]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    def copier(variables, tokens, decoder_tokens, **options):
        return SimpleNamespace(logits=20.0 * jax.nn.one_hot(decoder_tokens, 50))

    _, weight, metrics = seq2seq.loss(copier, {}, batch)
    correct, total = metrics["accuracy"]
    assert total == weight == 50 * 21
    assert correct / total < 0.05
    unshifted = {**batch, "decoder_tokens": batch["targets"]}
    correct, total = seq2seq.loss(copier, {}, unshifted)[2]["accuracy"]
    assert correct == total
    np.testing.assert_array_equal(batch["decoder_tokens"][:, 1:], batch["targets"][:, :-1])


def test_logits_do_not_depend_on_their_own_target():
    params = build(TRANSFORMER)[1]
    model = build_model(TRANSFORMER.replace(vocab_size=VOCAB + 6))
    tokens, T = random_tokens(1, 4), 6

    def logit(decoder_onehot, t):
        # The embedding as a matrix product, so that it is differentiable in the one-hot inputs.
        table = params["token_embed"]["embedding"]
        soft = {**params, "token_embed": {"embedding": jnp.concatenate(
            [table, decoder_onehot @ table])}}
        ids = len(table) + jnp.arange(T)[None]
        return model.apply({"params": soft}, tokens, ids).logits[0, t, : len(table)]

    onehot = jax.nn.one_hot(random_tokens(T), len(params["token_embed"]["embedding"]))
    jacobian = jax.jit(jax.jacobian(logit), static_argnums=1)(onehot, 2)  # [V, T, V]
    influence = np.abs(np.asarray(jacobian)).max((0, 2))
    assert (influence[:3] > 0).all() and not influence[3:].any()


def test_label_smoothing_by_hand():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1]]))
    nll = [-math.log(p) for p in (0.7, 0.2, 0.1)]
    expected = 0.9 * nll[0] + 0.1 * sum(nll) / 3
    smoothed = cross_entropy.cross_entropy(logits, jnp.array([0]), 0.1)
    np.testing.assert_allclose(smoothed, [expected], rtol=1e-6)


def test_label_smoothing_is_used_only_in_training():
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
