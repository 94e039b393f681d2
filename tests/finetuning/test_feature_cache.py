"""Cached features: training the head on them equals training it on the tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from transformer_jax.finetuning import feature_cache, peft
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.objectives import classification
from transformer_jax.tree import combine, flatten_paths, partition

FAMILIES = {name: config.replace(num_layers=1, dropout_rate=0.0, attention_dropout_rate=0.0)
            for name, config in (("gpt", small_models.GPT2), ("bert", small_models.BERT),
                                 ("bart", small_models.BART))}
MEAN = FAMILIES["bert"].replace(pooling="mean")


def batch(seed, *shape):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(3, small_models.VOCAB, shape).astype(np.int32)
    lengths = rng.integers(2, shape[-1] + 1, shape[:-1])
    return {"tokens": tokens, "segment_ids": (tokens % 2).astype(np.int32),
            "padding_mask": np.arange(shape[-1]) < lengths[..., None],
            "labels": rng.integers(0, 2, shape[0]).astype(np.int32),
            "weights": np.array([1] * (shape[0] - 1) + [seed % 2], np.float32)}


def stacked(rows):
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.slow
@pytest.mark.parametrize("config", [*FAMILIES.values(), MEAN], ids=[*FAMILIES, "mean"])
def test_loss_and_gradients_equal_those_of_tokens(config):
    model, params = small_models.build(config, 3)
    params = jax.tree.map(jnp.asarray, params)
    mask = trainable_mask(params, "head")
    assert feature_cache.is_head_only(mask)
    batches = [batch(0, 3, 6), batch(1, 3, 6)]
    rows = feature_cache.compute_features(model, params, batches)
    assert len(rows) == 5  # the last row of the first batch is padding
    assert set(rows[0]) == {"tokens", "labels", "weights"}
    assert rows[0]["tokens"].shape == (24,) and rows[0]["tokens"].dtype == np.float32
    token_batch = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    not_padding = np.array([0, 1, 3, 4, 5])
    token_batch = {name: value[not_padding] for name, value in token_batch.items()}
    feature_batch = stacked(rows)
    np.testing.assert_array_equal(feature_batch["labels"], token_batch["labels"])

    def loss_and_grads(apply, data):
        trainable, frozen = partition(params, mask)

        def loss(trainable):
            total, weight, metrics = classification.classification_loss(
                apply, combine(trainable, frozen), data)
            return total / weight, (weight, metrics)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(trainable)

    (value, aux), grads = loss_and_grads(
        feature_cache.make_features_apply(model.apply), feature_batch)
    (expected, expected_aux), expected_grads = loss_and_grads(model.apply, token_batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.map(float, aux) == jax.tree.map(float, expected_aux)
    grads, expected_grads = flatten_paths(grads), flatten_paths(expected_grads)
    assert grads.keys() == expected_grads.keys() >= {"classifier/kernel"}
    for path, leaf in expected_grads.items():
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(grads[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_tokens(family):
    model, params = small_models.build(FAMILIES[family], 3)
    data = batch(1, 4, 6)
    rows = stacked(feature_cache.compute_features(model, params, [data]))
    features_apply = feature_cache.make_features_apply(model.apply)
    found = features_apply({"params": params}, rows["tokens"], method="classification_logits")
    expected = small_models.forward(
        FAMILIES[family], data["tokens"], method="classification_logits", num_classes=3,
        padding_mask=data["padding_mask"],
        **({"segment_ids": data["segment_ids"]} if family == "bert" else {}))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_multiple_choice(family):
    model, params = small_models.build(FAMILIES[family], 1)
    data = batch(1, 3, 4, 5)  # three questions of four choices, the last of three
    data["choices"] = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    rows = stacked(feature_cache.compute_features(model, params, [data]))
    assert rows["tokens"].shape == (3, 4, 24)
    features_apply = feature_cache.make_features_apply(model.apply)
    total, weight, _ = classification.classification_loss(features_apply, params, rows)
    call = jax.jit(functools.partial(classification.classification_loss, model.apply))
    expected, expected_weight, _ = call(params, data)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == expected_weight == 3


def test_dropout_of_the_classifier_stays_on():
    model, params = small_models.build(FAMILIES["bert"].replace(dropout_rate=0.5), 3)
    data = batch(1, 4, 6)
    first, second = (
        stacked(feature_cache.compute_features(model, params, [data])) for _ in range(2))
    np.testing.assert_array_equal(first["tokens"], second["tokens"])
    loss = functools.partial(classification.classification_loss,
                             feature_cache.make_features_apply(model.apply), params)
    found = [float(loss(first, rng)[0]) for rng in (jax.random.key(0), jax.random.key(0),
                                                    jax.random.key(1), None)]
    assert found[0] == found[1] and len(set(found)) == 3


@pytest.mark.parametrize(
    ("family", "spec", "expected"),
    [
        ("bert", "head", True), ("gpt", "head", True), ("bart", "head", True),
        ("bert", "regex:classifier/kernel", True), ("bart", "regex:^pooler", True),
        ("bert", "head+regex:pooler", False), ("bert", "bitfit", False), ("gpt", "lora:2", False),
        ("bert", "full", False), ("gpt", "regex:final_norm", False),
    ],
)
def test_is_head_only(family, spec, expected):
    _, params = small_models.build(FAMILIES[family], 3)
    _, mask = peft.add_and_mask(params, spec, jax.random.key(0))
    assert feature_cache.is_head_only(mask) is expected


def test_added_tokens_are_not_part_of_the_head():
    _, params = small_models.build(FAMILIES["gpt"], 3)
    params = peft.add_tokens(params, 2, jax.random.key(0))
    assert not feature_cache.is_head_only(trainable_mask(params, "head"))
    assert not feature_cache.is_head_only(jax.tree.map(lambda _: False, params))


def test_other_methods_are_refused():
    model, params = small_models.build(FAMILIES["bert"], 3)
    features_apply = feature_cache.make_features_apply(model.apply)
    with pytest.raises(ValueError, match="unsupported method 'token_classification_logits'"):
        features_apply({"params": params}, jnp.ones((2, 24)), method="token_classification_logits")
