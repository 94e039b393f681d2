"""Causal language modeling: rows, shifted targets, and the loss."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import VOCAB, random_tokens

from transformer_jax.data import packing
from transformer_jax.objectives import causal_lm


def test_shift_tokens_of_packed_documents():
    # Document 1: 5 6 7, document 2: 8 9, then padding; as one row and as a batch.
    tokens = np.array([5, 6, 7, 8, 9, 0, 0])
    documents = np.array([1, 1, 1, 2, 2, 0, 0])
    row = packing.shift_tokens(tokens, documents)
    assert {name: values.tolist() for name, values in row.items()} == {
        "tokens": [5, 6, 7, 8, 9, 0],
        "targets": [6, 7, 8, 9, 0, 0],
        "positions": [0, 1, 2, 0, 1, 0],
        "document_ids": [1, 1, 1, 2, 2, 0],
        "weights": [1, 1, 0, 1, 0, 0],  # 7 -> 8 crosses documents, 9 -> padding
    }
    assert {name: values.dtype.name for name, values in row.items()} == {
        "tokens": "int32", "targets": "int32", "positions": "int32", "document_ids": "int32",
        "weights": "float32",
    }
    batch = packing.shift_tokens(np.stack([tokens, tokens]), np.stack([documents, documents]))
    for name, values in batch.items():
        assert values.tolist() == [row[name].tolist()] * 2


def test_shift_tokens_of_one_document():
    row = packing.shift_tokens(np.arange(10, 15), np.ones(5, int))
    assert row["positions"].tolist() == [0, 1, 2, 3]
    assert row["weights"].tolist() == [1, 1, 1, 1]


def test_prepare_pads_short_documents_and_crops_long_ones_at_random():
    short = causal_lm.prepare({"tokens": [4, 5, 6]}, length=5)
    assert short["tokens"].tolist() == [4, 5, 6, 0, 0]
    assert short["weights"].tolist() == [1, 1, 0, 0, 0]

    long = {"tokens": np.arange(100, 109)}  # nine tokens: a crop of six starts at 0, 1, 2 or 3
    assert causal_lm.prepare(long, length=5)["tokens"].tolist() == [100, 101, 102, 103, 104]
    starts = set()
    for seed in range(40):
        row = causal_lm.prepare(long, np.random.default_rng(seed), length=5)
        assert (row["targets"] == row["tokens"] + 1).all()
        assert row["weights"].all()
        starts.add(int(row["tokens"][0]))
        again = causal_lm.prepare(long, np.random.default_rng(seed), length=5)
        assert again["tokens"].tolist() == row["tokens"].tolist()
    assert starts == {100, 101, 102, 103}


def fixed_logits_apply(logits):
    """A model's `apply` that returns these logits `[B, T, V]` for any input."""
    return lambda variables, tokens, **options: SimpleNamespace(logits=jnp.asarray(logits))


def test_loss_of_known_logits():
    batch = {"tokens": np.array([[0, 1]]), "targets": np.array([[1, 0]]),
             "weights": np.array([[1.0, 0.0]])}
    logits = np.log([[[1.0, 3.0], [1.0, 1.0]]])
    total, weight, metrics = causal_lm.loss(fixed_logits_apply(logits), {}, batch)
    np.testing.assert_allclose(total, np.log(4 / 3), rtol=1e-6)
    assert weight == 1
    assert [float(x) for x in metrics["accuracy"]] == [1, 1]


def test_copying_the_input_gives_no_accuracy():
    """If targets were not shifted, a model that copies its input would have loss 0."""
    tokens = np.stack([np.random.default_rng(i).permutation(VOCAB)[:17] for i in range(3)])
    batch = packing.shift_tokens(tokens, np.ones_like(tokens))
    copier = 20.0 * jax.nn.one_hot(batch["tokens"], VOCAB)
    total, weight, metrics = causal_lm.loss(fixed_logits_apply(copier), {}, batch)
    assert total / weight > np.log(VOCAB)
    assert metrics["accuracy"][0] == 0
    oracle = 20.0 * jax.nn.one_hot(tokens[:, 1:], VOCAB)
    total, weight, metrics = causal_lm.loss(fixed_logits_apply(oracle), {}, batch)
    assert total / weight < 1e-3
    assert metrics["accuracy"][0] == weight == 48


def test_positions_and_document_ids_are_passed_to_the_model():
    received = {}

    def apply(variables, tokens, *, positions, document_ids, **options):
        received.update(positions=positions, document_ids=document_ids)
        return fixed_logits_apply(np.zeros((*tokens.shape, VOCAB)))(variables, tokens)

    batch = packing.shift_tokens(random_tokens(2, 9), np.repeat([[1, 2, 2]] * 2, 3, axis=1))
    causal_lm.loss(apply, {}, batch)
    assert received["positions"] is batch["positions"]
    assert received["document_ids"] is batch["document_ids"]


def test_continuation_weights_only_the_target():
    row = causal_lm.prepare_continuation(
        {"source": [5, 6], "target": [7, 8]}, length=8, delimiter_id=1, eos_id=2)
    assert row["tokens"].tolist() == [5, 6, 1, 7, 8, 2, 0, 0]
    assert row["targets"].tolist() == [6, 1, 7, 8, 2, 0, 0, 0]
    assert row["weights"].tolist() == [0, 0, 1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize(("source", "target", "tokens", "predicted"), [
    ([5] * 9, [7], [5, 5, 5, 1, 7, 2], [7, 2]),  # the source is truncated first
    ([5], [7] * 9, [5, 1, 7, 7, 7, 2], [7, 7, 7, 2]),  # the target is longer than half of the row
    ([5] * 9, [7] * 9, [5, 5, 1, 7, 7, 2], [7, 7, 2]),  # half of the row for each
])
def test_continuation_of_long_texts(source, target, tokens, predicted):
    row = causal_lm.prepare_continuation(
        {"source": source, "target": target}, length=6, delimiter_id=1, eos_id=2)
    assert row["tokens"].tolist() == tokens
    assert row["targets"][row["weights"] > 0].tolist() == predicted


def test_continuation_row_too_short():
    with pytest.raises(ValueError, match="length 3 leaves no room for two texts"):
        causal_lm.prepare_continuation({"source": [5], "target": [7]}, length=3, delimiter_id=1,
                                       eos_id=2)
