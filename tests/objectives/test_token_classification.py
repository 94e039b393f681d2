"""Token classification: which subword is labeled, and the classes of words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_models import BART, BERT, GPT2, build

from transformer_jax.objectives import classification

EXAMPLE = {"words": [[11, 12], [13], [14, 15, 16]], "tags": [2, 0, 1]}
prepare = functools.partial(
    classification.prepare_token_classification, length=10, num_classes=3, cls_id=1, sep_id=2)


@pytest.mark.parametrize(("options", "tokens", "positions"), [
    ({}, [1, 11, 12, 13, 14, 15, 16, 2, 9, 9], [1, 3, 4]),
    ({"label_last_subword": True}, [1, 11, 12, 13, 14, 15, 16, 2, 9, 9], [2, 3, 6]),
    ({"cls_id": None, "sep_id": None}, [11, 12, 13, 14, 15, 16, 9, 9, 9, 9], [0, 2, 3]),
    ({"cls_id": None, "sep_id": None, "label_last_subword": True},
     [11, 12, 13, 14, 15, 16, 9, 9, 9, 9], [1, 2, 5]),
])
def test_prepare(options, tokens, positions):
    row = prepare(EXAMPLE, pad_id=9, **options)
    assert row["tokens"].tolist() == tokens
    assert np.flatnonzero(row["weights"]).tolist() == positions
    assert row["labels"][positions].tolist() == EXAMPLE["tags"]
    assert row["padding_mask"].sum() == 10 - tokens.count(9)
    assert {name: x.dtype.name for name, x in row.items()} == {
        "tokens": "int32", "labels": "int32", "weights": "float32", "padding_mask": "bool"}


def test_loss_and_word_predictions():
    """Only positions with a weight contribute, and predictions are in the order of the words."""
    row = prepare(EXAMPLE)
    logits = np.random.default_rng(0).normal(size=(1, 10, 3)).astype(np.float32)
    logits[0, [1, 3, 4]] = np.log([[1, 1, 2], [1, 2, 1], [1, 6, 1]])

    def apply(variables, tokens, *, method, **options):
        return jnp.asarray(logits)

    batch = {name: x[None] for name, x in row.items()}
    total, weight, metrics = classification.token_classification_loss(apply, {}, batch)
    assert float(total) == pytest.approx(-np.log(2 / 4 * 1 / 4 * 6 / 8), rel=1e-5)
    assert weight == 3 and metrics["accuracy"] == (2, 3)
    found = classification.token_classification_predict(apply, {}, batch)
    np.testing.assert_allclose(found["probabilities"].sum(-1), 1, rtol=1e-5)
    words = found["probabilities"][0][found["word_mask"][0]]
    assert words.argmax(-1).tolist() == [2, 1, 1]


@pytest.mark.parametrize("config", [GPT2, BERT, BART], ids=lambda c: type(c).__name__)
def test_training_reduces_the_loss(config):
    model, params = build(config.replace(num_layers=1), 3)
    batch = {name: x[None] for name, x in
             prepare(EXAMPLE, label_last_subword=config is GPT2).items()}

    @jax.jit
    def step(params):
        def total(params):
            return classification.token_classification_loss(model.apply, params, batch)[0]

        value, grads = jax.value_and_grad(total)(params)
        return value, jax.tree.map(lambda p, g: p - 0.02 * g, params, grads)

    first, params = step(params)
    for _ in range(5):
        last, params = step(params)
    assert 0 < last < first


class CharacterTokenizer:
    """Each character is a token, and its code is the id."""

    @staticmethod
    def encode_batch(texts):
        return [[ord(c) for c in text] for text in texts]


def test_subword_ids():
    subword_ids = classification.subword_ids
    assert subword_ids(["ab", "c"], CharacterTokenizer) == [[97, 98], [99]]
    assert subword_ids(["ab", "c"], CharacterTokenizer, add_prefix_space=True) == [
        [97, 98], [32, 99]]
    with pytest.raises(ValueError, match="the word '' has no tokens"):
        subword_ids(["ab", ""], CharacterTokenizer)


@pytest.mark.parametrize(("changes", "options", "message"), [
    ({"tags": [0, 1]}, {}, "3 words and 2 tags; give one tag for each word"),
    ({"words": [], "tags": []}, {}, "0 words and 0 tags"),
    ({"words": [[1], [], [2]]}, {}, "word 1 has no tokens"),
    ({"tags": [0, 3, 1]}, {}, "tag 3 is outside the 3 classes 0 to 2"),
    ({"tags": [0, -1, 1]}, {}, "tag -1 is outside"),
    ({}, {"length": 7}, "a text of 3 words has 8 tokens, more than the row's 7; raise the length"),
])
def test_invalid_examples(changes, options, message):
    with pytest.raises(ValueError, match=message):
        prepare({**EXAMPLE, **changes}, **options)


def test_a_text_of_exactly_the_length_of_the_row():
    assert prepare(EXAMPLE, length=8)["padding_mask"].all()
