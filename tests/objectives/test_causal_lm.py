"""Causal language modelling: what is predicted from what."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import VOCAB, random_tokens

from transformer_jax.data import packing
from transformer_jax.objectives import causal_lm


def test_shift_by_hand():
    # Document 1: 5 6 7, document 2: 8 9, then padding; one row, and the same in a batch.
    tokens = np.array([5, 6, 7, 8, 9, 0, 0])
    documents = np.array([1, 1, 1, 2, 2, 0, 0])
    row = packing.shift(tokens, documents)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [5, 6, 7, 8, 9, 0],
        "targets": [6, 7, 8, 9, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "document_ids": [1, 1, 1, 2, 2, 0],
        "weights": [1, 1, 0, 1, 0, 0],  # not 7 -> 8, not 9 -> padding
    }
    assert {name: values.dtype.name for name, values in row.items()} == {
        "tokens": "int32", "targets": "int32", "positions": "int32", "document_ids": "int32",
        "weights": "float32",
    }
    batch = packing.shift(np.stack([tokens, tokens]), np.stack([documents, documents]))
    for name, values in batch.items():
        assert values.tolist() == [row[name].tolist()] * 2


def test_shift_of_one_document():
    row = packing.shift(np.arange(10, 15), np.ones(5, int))
    assert row["positions"].tolist() == [0, 1, 2, 3]
    assert row["weights"].tolist() == [1, 1, 1, 1]


def test_prepare_pads_short_documents_and_cuts_long_ones_at_a_random_place():
    short = causal_lm.prepare({"tokens": [4, 5, 6]}, length=5)
    assert short["tokens"].tolist() == [4, 5, 6, 0, 0]
    assert short["weights"].tolist() == [1, 1, 0, 0, 0]

    long = {"tokens": np.arange(100, 109)}  # nine tokens: a window of six begins at 0, 1, 2 or 3
    assert causal_lm.prepare(long, length=5)["tokens"].tolist() == [100, 101, 102, 103, 104]
    begins = set()
    for seed in range(40):
        row = causal_lm.prepare(long, np.random.default_rng(seed), length=5)
        assert (row["targets"] == row["tokens"] + 1).all()
        assert row["weights"].all()
        begins.add(int(row["tokens"][0]))
        again = causal_lm.prepare(long, np.random.default_rng(seed), length=5)
        assert again["tokens"].tolist() == row["tokens"].tolist()
    assert begins == {100, 101, 102, 103}


def known(scores):
    """A model with these logits `[B, T, V]`."""
    return lambda variables, tokens, **options: SimpleNamespace(logits=jnp.asarray(scores))


def test_loss_is_the_sum_over_targets_by_hand():
    batch = {"tokens": np.array([[0, 1]]), "targets": np.array([[1, 0]]),
             "weights": np.array([[1.0, 0.0]])}
    scores = np.log([[[1.0, 3.0], [1.0, 1.0]]])
    total, weight, metrics = causal_lm.loss(known(scores), {}, batch)
    np.testing.assert_allclose(total, np.log(4 / 3), rtol=1e-6)
    assert weight == 1
    assert [float(x) for x in metrics["accuracy"]] == [1, 1]


def test_copying_the_input_is_no_advantage():
    """Were targets not shifted, a model that echoes its input would have loss 0."""
    tokens = np.stack([np.random.default_rng(i).permutation(VOCAB)[:17] for i in range(3)])
    batch = packing.shift(tokens, np.ones_like(tokens))
    echo = 20.0 * jax.nn.one_hot(batch["tokens"], VOCAB)
    total, weight, metrics = causal_lm.loss(known(echo), {}, batch)
    assert total / weight > np.log(VOCAB)
    assert metrics["accuracy"][0] == 0
    oracle = 20.0 * jax.nn.one_hot(tokens[:, 1:], VOCAB)
    total, weight, metrics = causal_lm.loss(known(oracle), {}, batch)
    assert total / weight < 1e-3
    assert metrics["accuracy"][0] == weight == 48


def test_the_model_is_told_of_positions_and_documents():
    told = {}

    def apply(variables, tokens, *, positions, document_ids, **options):
        told.update(positions=positions, document_ids=document_ids)
        return known(np.zeros((*tokens.shape, VOCAB)))(variables, tokens)

    batch = packing.shift(random_tokens(2, 9), np.repeat([[1, 2, 2]] * 2, 3, axis=1))
    causal_lm.loss(apply, {}, batch)
    assert told["positions"] is batch["positions"]
    assert told["document_ids"] is batch["document_ids"]


def test_a_continuation_learns_the_target_alone():
    row = causal_lm.prepare_continuation(
        {"source": [5, 6], "target": [7, 8]}, length=8, delimiter_id=1, eos_id=2)
    assert row["tokens"].tolist() == [5, 6, 1, 7, 8, 2, 0, 0]
    assert row["targets"].tolist() == [6, 1, 7, 8, 2, 0, 0, 0]
    assert row["weights"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("source", "target", "tokens", "learnt"), [
    ([5] * 9, [7], [5, 5, 5, 1, 7, 2], [7, 2]),  # the source gives way
    ([5], [7] * 9, [5, 1, 7, 7, 7, 2], [7, 7, 7, 2]),  # unless the target is too long by itself
    ([5] * 9, [7] * 9, [5, 5, 1, 7, 7, 2], [7, 7, 2]),  # half of the room for each
])
def test_a_continuation_that_is_too_long(source, target, tokens, learnt):
    row = causal_lm.prepare_continuation(
        {"source": source, "target": target}, length=6, delimiter_id=1, eos_id=2)
    assert row["tokens"].tolist() == tokens
    assert row["targets"][row["weights"] > 0].tolist() == learnt


def test_a_continuation_without_room():
    with pytest.raises(ValueError, match="length 3 leaves no room for two texts"):
        causal_lm.prepare_continuation({"source": [5], "target": [7]}, length=3, delimiter_id=1,
                                       eos_id=2)
