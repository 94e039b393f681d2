"""Batches whose rows use different adapters."""

import functools

import jax
import numpy as np
import pytest
import small_models
from trained_models import BART, BERT, DORA, GPT, trained

from transformer_jax.finetuning import adapter_io, multi_adapter
from transformer_jax.finetuning.frozen import quantize_frozen
from transformer_jax.finetuning.select import trainable_mask
from transformer_jax.models import build_model
from transformer_jax.tree import flatten_paths, unflatten_paths

# Name -> (config, (spec, number of classes) of each adapter).
MIXES = {
    "different": (BERT, [(DORA, 3), ("lora:4:all,dropout=0.1", 3), ("lora:1+layernorm", 5),
                         ("adapter:3", 2), ("ia3", 4), ("last_k:1", 4)]),
    "prefixes": (BERT, [("prefix:2+prompt:2", 3), ("prefix:2+prompt:2+bitfit", 4)]),
    "gpt": (GPT.replace(classifier_bias=False), [(DORA, 2), ("adapter:2", 3)]),
    "bart": (BART, [("lora:2", 2), ("head", 3)]),
}


def jitted_apply(config, num_classes):
    return jax.jit(functools.partial(
        multi_adapter.apply_per_row, build_model(config, num_classes).apply,
        method="classification_logits"))


def class_logits(config, tokens, params, num_classes, **inputs):
    return small_models.forward(config, tokens, method="classification_logits", params=params,
                                num_classes=num_classes, **inputs)


@pytest.mark.slow
@pytest.mark.parametrize("mix", MIXES)
def test_each_row_uses_its_adapter(mix):
    config, adapters = MIXES[mix]
    max_classes = max(num_classes for _, num_classes in adapters)
    base = small_models.build(config, max_classes)[1]
    # The base parameters of all are equal; only their classifiers differ in size.
    models = [trained(config, spec, num_classes, seed)[2]
              for seed, (spec, num_classes) in enumerate(adapters)]
    stacked = multi_adapter.stack_adapters(models, base)
    ids = np.array([*range(len(adapters)), 0, 1])
    tokens = small_models.random_tokens(len(ids), 7)
    mask = np.arange(7) < np.arange(len(ids))[:, None] % 4 + 4
    logits = jitted_apply(config, max_classes)(base, stacked, ids, tokens, padding_mask=mask)
    assert logits.shape == (len(ids), max_classes)
    for row, i in enumerate(ids):
        num_classes = adapters[i][1]
        alone = class_logits(config, tokens[row:row + 1], models[i], num_classes,
                             padding_mask=mask[row:row + 1])
        np.testing.assert_allclose(logits[row, :num_classes], alone[0], atol=1e-6, rtol=1e-6)
        assert (logits[row, num_classes:] == -np.inf).all()


def test_rows_with_an_invalid_id_are_nan_under_jit():
    base = small_models.build(BERT, 3)[1]
    stacked = multi_adapter.stack_adapters(
        [trained(BERT, "ia3", 3)[2], trained(BERT, "head", 2)[2]], base)
    tokens = small_models.random_tokens(4, 5)
    logits = jitted_apply(BERT, 3)(base, stacked, np.array([0, 1, 2, -1]), tokens)
    assert np.isnan(logits[2:]).all() and not np.isnan(logits[:2]).any()


@pytest.mark.slow
def test_the_method_may_be_in_a_partial_or_a_function():
    base = small_models.build(BERT, 3)[1]
    model, tokens = build_model(BERT, 3), small_models.random_tokens(2, 5)
    stacked = multi_adapter.stack_adapters(
        [trained(BERT, "ia3", 3)[2], trained(BERT, "head", 2)[2]], base)
    for apply, named in (
        (functools.partial(model.apply, method="classification_logits"), {}),
        (model.apply, {"method": type(model).classification_logits}),
    ):
        logits = multi_adapter.apply_per_row(apply, base, stacked, [0, 1], tokens, **named)
        assert logits[1, 2] == -np.inf and np.isfinite(logits[0]).all()

    def apply_without_method(*args):
        return model.apply(*args, method="classification_logits")

    with pytest.raises(ValueError, match="such as method='classification_logits'"):
        multi_adapter.apply_per_row(apply_without_method, base, stacked, [0, 1], tokens)


def test_a_trained_kernel_on_an_int8_base():
    base = small_models.build(BERT, 3)[1]
    quantized_base = quantize_frozen(base, trainable_mask(base, "head"), "int8")[0]
    adapters = []
    for spec in ("last_k:1", "lora:2"):
        _, _, params, mask = trained(BERT, spec)
        is_trainable = flatten_paths(mask)
        adapters.append(unflatten_paths({
            path: leaf for path, leaf in flatten_paths(params).items()
            if is_trainable[path] or path.endswith("lora_scale")}))
    tokens = small_models.random_tokens(2, 5)
    stacked = multi_adapter.stack_adapters(adapters, quantized_base)
    logits = jitted_apply(BERT, 3)(quantized_base, stacked, np.arange(2), tokens)
    for i, adapter in enumerate(adapters):
        params = adapter_io.apply_adapter(quantized_base, adapter)
        alone = class_logits(BERT, tokens[i:i + 1], params, 3)
        np.testing.assert_allclose(logits[i], alone[0], atol=2e-6)


def test_the_base_is_not_copied_for_each_row():
    """Few more FLOPs than a batch of the base, and no array with a copy of a kernel per row."""
    model, base = small_models.build(BERT, 3)
    models = [trained(BERT, spec)[2] for spec in (DORA, "adapter:3", "ia3")]
    stacked = multi_adapter.stack_adapters(models, base)
    tokens, ids = small_models.random_tokens(8, 16), np.arange(8) % 3

    def compiled(call, *args):
        return jax.jit(call).lower(*args).compile()

    apply = functools.partial(model.apply, method="classification_logits")
    per_row = compiled(
        functools.partial(multi_adapter.apply_per_row, apply), base, stacked, ids, tokens)
    plain = compiled(lambda base, tokens: apply({"params": base}, tokens), base, tokens)
    ratio = per_row.cost_analysis()["flops"] / plain.cost_analysis()["flops"]
    assert 1 < ratio < 1.4, ratio
    text = per_row.as_text()
    for kernel in ("24,40", "40,24", "24,3,8", "3,8,24"):
        assert f"f32[{kernel}]" in text
        assert f"f32[8,{kernel}]" not in text and f"f32[8,1,{kernel}]" not in text


def test_a_language_model():
    models = [trained(GPT, spec, 0, seed)[2] for seed, spec in enumerate((
        "regex:layer_0/mlp/wo", "lora:2"))]
    model, base = small_models.build(GPT)
    tokens = small_models.random_tokens(3, 6)
    run = jax.jit(functools.partial(multi_adapter.apply_per_row, model.apply))
    out = run(base, multi_adapter.stack_adapters(models, base), np.array([1, 0, 1]), tokens)
    for row, i in enumerate([1, 0, 1]):
        alone = small_models.forward(GPT, tokens[row:row + 1], params=models[i])
        np.testing.assert_allclose(out.logits[row], alone.logits[0], atol=2e-6)


def test_adapters_that_cannot_be_stacked_and_invalid_ids():
    base = small_models.build(BERT, 3)[1]

    def stack(*specs):
        return multi_adapter.stack_adapters([trained(BERT, spec)[2] for spec in specs], base)

    with pytest.raises(ValueError, match="there are 0 adapters"):
        stack()
    with pytest.raises(ValueError, match=r"prefix_key has the shapes .* one shape"):
        stack("prefix:2", "prefix:3")
    with pytest.raises(ValueError, match=r"adapter 1 has no .*prefix_key.*separate batches"):
        stack("prefix:2", "head")
    with pytest.raises(ValueError, match="adapter 0 has no prompt"):
        stack("head", "prompt:2")
    tokens = small_models.random_tokens(2, 4)
    run = functools.partial(
        multi_adapter.apply_per_row,
        functools.partial(build_model(BERT, 3).apply, method="classification_logits"), base,
        stack("head", "bitfit"))
    with pytest.raises(ValueError, match="adapter_ids contains 2; it must be from 0 to 1"):
        run([0, 2], tokens)
    with pytest.raises(ValueError, match="has 2 rows but there are 3 adapter_ids"):
        run([0, 1, 1], tokens)
    base = small_models.build(GPT)[1]
    with pytest.raises(ValueError, match="none of the 2 adapters differs from the base"):
        multi_adapter.stack_adapters([base] * 2, base)
