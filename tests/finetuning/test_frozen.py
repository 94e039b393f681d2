"""Frozen parameters: quantized weights give nearly equal outputs, and training on cached features
equals training on the tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_models

from transformer_jax.finetuning import frozen, peft
from transformer_jax.finetuning.frozen import dequantize, quantize_frozen
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.generation import generate
from transformer_jax.objectives import classification
from transformer_jax.train.optimizers import make_optimizer
from transformer_jax.train.step import init_state, make_train_step
from transformer_jax.tree import combine, flatten_paths, partition

FAMILIES = {name: config.replace(num_layers=1) for name, config in (
    ("gpt", small_models.GPT2), ("bert", small_models.BERT), ("bart", small_models.BART))}
# Largest error of a logit relative to the largest logit, with kernels from N(0, 0.2).
TOLERANCE = {"bfloat16": 0.02, "int8": 0.03}
SPEC = "lora:2:all,dora"


@functools.cache
def model_and_mask(family, spec=SPEC):
    model, plain = small_models.build(FAMILIES[family], 3)
    params, mask = peft.add_and_mask(jax.tree.map(jnp.asarray, plain), spec, jax.random.key(0))
    return model, params, mask


def logits(family, params):
    return small_models.forward(FAMILIES[family], small_models.random_tokens(3, 6), params=params,
                                method="classification_logits", num_classes=3)


def nbytes(params):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_nearly_equal_and_memory_is_smaller(family, dtype):
    _, params, mask = model_and_mask(family)
    quantized, quantized_mask = quantize_frozen(params, mask, dtype)
    assert jax.tree.structure(quantized) == jax.tree.structure(quantized_mask)
    before, after, is_trainable = map(flatten_paths, (params, quantized, quantized_mask))
    expected = logits(family, params)
    error = np.abs(logits(family, quantized) - expected).max()
    assert 0 < error <= TOLERANCE[dtype] * np.abs(expected).max()
    # Trainable parameters, biases, norms and PEFT parameters are unchanged.
    for path, train in flatten_paths(mask).items():
        if train or "lora_" in path or path.endswith(("bias", "norm/scale")):
            assert after[path] is before[path] and is_trainable[path] == train, path
    assert sum(is_trainable.values()) == sum(flatten_paths(mask).values())
    kind = {"bfloat16": jnp.bfloat16, "int8": jnp.int8}[dtype]
    frozen = [leaf for path, leaf in after.items() if leaf.dtype == kind]
    matrices = [leaf for path, leaf in before.items() if not flatten_paths(mask)[path]
                and path.endswith(("kernel", "embedding"))]
    assert len(frozen) == len(matrices) > 5
    assert sum(x.nbytes for x in frozen) == sum(x.nbytes for x in matrices) // (
        4 // jnp.dtype(kind).itemsize)
    assert nbytes(quantized) < (0.75 if dtype == "bfloat16" else 0.65) * nbytes(params)


@functools.cache
def three_steps(dtype):
    """(before, mask, state, losses) of LoRA on BERT."""
    model, params, mask = model_and_mask("bert", "lora:2")
    params, mask = quantize_frozen(params, mask, dtype)
    tokens = small_models.random_tokens(4, 6)
    batch = {"tokens": tokens, "segment_ids": tokens * 0, "padding_mask": tokens > 0,
             "labels": np.arange(4, dtype=np.int32) % 3, "weights": np.ones(4, np.float32)}
    optimizer = make_optimizer(0.01)
    step = jax.jit(make_train_step(
        functools.partial(classification.classification_loss, model.apply), optimizer, mask))
    state, losses = init_state(params, optimizer, mask), []
    for _ in range(3):
        state, report = step(state, batch, None)
        losses.append(float(report["loss"]))
    return params, mask, state, losses


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_only_trainable_parameters_change_and_they_are_float32(dtype):
    params, mask, state, losses = three_steps(dtype)
    before, after = flatten_paths(params), flatten_paths(state.params)
    for path, train in flatten_paths(mask).items():
        assert after[path].dtype == before[path].dtype
        assert train == (np.asarray(after[path]).tobytes() != np.asarray(before[path]).tobytes())
        assert not train or after[path].dtype == jnp.float32
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype(jnp.float32)}
    assert len(moments) == 2 * sum(flatten_paths(mask).values())
    assert losses[2] < losses[0]
    np.testing.assert_allclose(losses, three_steps("float32")[3], rtol=0.05)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_dequantize(dtype):
    _, params, mask = model_and_mask("bart")
    quantized, _ = quantize_frozen(params, mask, dtype)
    dequantized = dequantize(quantized)
    before, after = flatten_paths(params), flatten_paths(dequantized)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        assert after[path].dtype == jnp.float32
        step = np.abs(leaf).max() * (2**-8 if dtype == "bfloat16" else 0.5 / 127)
        np.testing.assert_allclose(after[path], leaf, atol=1.001 * step, err_msg=path)
    # The layers compute the same with quantized and with dequantized weights.
    np.testing.assert_allclose(logits("bart", dequantized), logits("bart", quantized),
                               atol=1e-5 if dtype == "int8" else 1e-4)
    # Merging does not change the outputs.
    merged = peft.merge(quantized)
    assert not any("lora_" in path for path in flatten_paths(merged))
    np.testing.assert_allclose(logits("bart", merged), logits("bart", quantized), atol=1e-5)
    plain = small_models.build(FAMILIES["bart"], 3)[1]
    assert flatten_paths(dequantize(merged)).keys() == flatten_paths(plain).keys()


def test_every_output_has_its_own_scale():
    kernel = jnp.asarray([[1.0, -100.0, 0.0], [0.5, 50.0, 0.0]])
    tree = {"layer_0": {"mlp": {"wi": {"kernel": kernel}}},
            "token_embed": {"embedding": kernel}}
    quantized, _ = quantize_frozen(tree, jax.tree.map(lambda _: False, tree), "int8")
    wi, table = quantized["layer_0"]["mlp"]["wi"], quantized["token_embed"]
    np.testing.assert_allclose(wi["kernel_scale"], [1 / 127, 100 / 127, 1])
    np.testing.assert_array_equal(wi["kernel_int8"], [[127, -127, 0], [64, 64, 0]])
    np.testing.assert_allclose(table["embedding_scale"], [100 / 127, 50 / 127])
    query = {"layer_0": {"self_attention": {"query": {"kernel": jnp.ones((4, 3, 2))},
                                            "out": {"kernel": jnp.ones((3, 2, 4))}}}}
    found = flatten_paths(quantize_frozen(query, jax.tree.map(lambda _: False, query), "int8")[0])
    shapes = [leaf.shape for path, leaf in found.items() if path.endswith("scale")]
    assert shapes == [(4,), (3, 2)]  # out, then query


def test_float32_changes_nothing():
    _, params, mask = model_and_mask("bert")
    quantized, same = quantize_frozen(params, mask, "float32")
    before, after = flatten_paths(params), flatten_paths(quantized)
    assert all(after[path] is leaf for path, leaf in before.items())
    assert same == mask
    with pytest.raises(ValueError, match=r"dtype 'int4' .*; supported: float32, bfloat16, int8"):
        quantize_frozen(params, mask, "int4")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_generation_with_quantized_weights(dtype):
    """The tokens equal those of the dequantized parameters."""
    config = FAMILIES["gpt"]
    model, plain = small_models.build(config)
    params, mask = peft.add_and_mask(jax.tree.map(jnp.asarray, plain), "lora:2", jax.random.key(0))
    quantized, _ = quantize_frozen(params, mask, dtype)
    prompt = small_models.random_tokens(2, 4)
    found = generate(model, quantized, prompt, max_new_tokens=4, eos_token_id=())
    np.testing.assert_array_equal(
        found, generate(model, dequantize(quantized), prompt, max_new_tokens=4, eos_token_id=()))


def test_bfloat16_is_quantized_like_the_equal_float32():
    kernel = jax.random.normal(jax.random.key(0), (64, 32)).astype(jnp.bfloat16)
    params = {"mlp": {"wi": {"kernel": kernel}}}
    mask = jax.tree.map(lambda _: False, params)
    quantized = quantize_frozen(params, mask, "int8")[0]["mlp"]["wi"]
    as_floats = quantize_frozen(jax.tree.map(jnp.float32, params), mask, "int8")[0]["mlp"]["wi"]
    for name in ("kernel_int8", "kernel_scale"):
        np.testing.assert_array_equal(quantized[name], as_floats[name])
    assert quantized["kernel_scale"].dtype == jnp.float32 and quantized["kernel_int8"].min() >= -127


# ---- cached features

HEAD_FAMILIES = {name: config.replace(num_layers=1, dropout_rate=0.0, attention_dropout_rate=0.0)
            for name, config in (("gpt", small_models.GPT2), ("bert", small_models.BERT),
                                 ("bart", small_models.BART))}
MEAN = HEAD_FAMILIES["bert"].replace(pooling="mean")


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
@pytest.mark.parametrize("config", [*HEAD_FAMILIES.values(), MEAN], ids=[*HEAD_FAMILIES, "mean"])
def test_loss_and_gradients_equal_those_of_tokens(config):
    model, params = small_models.build(config, 3)
    params = jax.tree.map(jnp.asarray, params)
    mask = trainable_mask(params, "head")
    assert frozen.is_head_only(mask)
    batches = [batch(0, 3, 6), batch(1, 3, 6)]
    rows = frozen.compute_features(model, params, batches)
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
        frozen.make_features_apply(model.apply), feature_batch)
    (expected, expected_aux), expected_grads = loss_and_grads(model.apply, token_batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert jax.tree.map(float, aux) == jax.tree.map(float, expected_aux)
    grads, expected_grads = flatten_paths(grads), flatten_paths(expected_grads)
    assert grads.keys() == expected_grads.keys() >= {"classifier/kernel"}
    for path, leaf in expected_grads.items():
        assert np.abs(leaf).max() > 0
        np.testing.assert_allclose(grads[path], leaf, atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("family", HEAD_FAMILIES)
def test_logits_equal_those_of_tokens(family):
    model, params = small_models.build(HEAD_FAMILIES[family], 3)
    data = batch(1, 4, 6)
    rows = stacked(frozen.compute_features(model, params, [data]))
    features_apply = frozen.make_features_apply(model.apply)
    found = features_apply({"params": params}, rows["tokens"], method="classification_logits")
    expected = small_models.forward(
        HEAD_FAMILIES[family], data["tokens"], method="classification_logits", num_classes=3,
        padding_mask=data["padding_mask"],
        **({"segment_ids": data["segment_ids"]} if family == "bert" else {}))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt", "bert"])
def test_multiple_choice(family):
    model, params = small_models.build(HEAD_FAMILIES[family], 1)
    data = batch(1, 3, 4, 5)  # three questions of four choices, the last of three
    data["choices"] = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 0]], bool)
    rows = stacked(frozen.compute_features(model, params, [data]))
    assert rows["tokens"].shape == (3, 4, 24)
    features_apply = frozen.make_features_apply(model.apply)
    total, weight, _ = classification.classification_loss(features_apply, params, rows)
    call = jax.jit(functools.partial(classification.classification_loss, model.apply))
    expected, expected_weight, _ = call(params, data)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    assert weight == expected_weight == 3


def test_dropout_of_the_classifier_stays_on():
    model, params = small_models.build(HEAD_FAMILIES["bert"].replace(dropout_rate=0.5), 3)
    data = batch(1, 4, 6)
    first, second = (
        stacked(frozen.compute_features(model, params, [data])) for _ in range(2))
    np.testing.assert_array_equal(first["tokens"], second["tokens"])
    loss = functools.partial(classification.classification_loss,
                             frozen.make_features_apply(model.apply), params)
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
    _, params = small_models.build(HEAD_FAMILIES[family], 3)
    _, mask = peft.add_and_mask(params, spec, jax.random.key(0))
    assert frozen.is_head_only(mask) is expected


def test_added_tokens_are_not_part_of_the_head():
    _, params = small_models.build(HEAD_FAMILIES["gpt"], 3)
    params = peft.add_tokens(params, 2, jax.random.key(0))
    assert not frozen.is_head_only(trainable_mask(params, "head"))
    assert not frozen.is_head_only(jax.tree.map(lambda _: False, params))


def test_other_methods_are_refused():
    model, params = small_models.build(HEAD_FAMILIES["bert"], 3)
    features_apply = frozen.make_features_apply(model.apply)
    with pytest.raises(ValueError, match="unsupported method 'token_classification_logits'"):
        features_apply({"params": params}, jnp.ones((2, 24)), method="token_classification_logits")
