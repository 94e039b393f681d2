"""Presets have the parameter counts and options of the papers; no weights are allocated."""

import functools

import jax
import numpy as np
import pytest

from transformer_jax.models import (
    BARTConfig,
    BERTConfig,
    GPTConfig,
    TransformerConfig,
    build_model,
    init_params,
    presets,
)

# GPT and GPT-2: counts of the released weights (the counts in the GPT-2 paper, 117, 345, 762 and
# 1,542 M, are wrong). BERT: counts with both heads, as in the table of google-research/bert.
COUNTS = {
    "gpt1": 116_534_784,
    "gpt2": 124_439_808,
    "gpt2_medium": 354_823_168,
    "gpt2_large": 774_030_080,
    "gpt2_xl": 1_557_611_200,
    "bert_tiny": 4_433_468,
    "bert_mini": 11_267_900,
    "bert_small": 29_058_876,
    "bert_medium": 41_668_412,
    "bert_base": 110_106_428,
    "bert_large": 336_226_108,
    # The paper has a vocabulary of "about" 37,000 tokens, and 65 M and 213 M parameters.
    "transformer_base": 37_000 * 512 + 6 * (3_152_384 + 4_204_032),
    "transformer_big": 37_000 * 1024 + 6 * (12_596_224 + 16_796_672),
    "bart_base": 139_420_416,
    "bart_large": 406_291_456,
}
HEADLESS = {"bert_tiny": 4_385_920, "bert_mini": 11_170_560, "bert_small": 28_763_648,
            "bert_medium": 41_373_184, "bert_base": 109_482_240, "bert_large": 335_141_888}
HEADS = {"mlm_head", "nsp_head"}


@functools.cache
def shapes(config):
    model = build_model(config)
    return jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def count_of(config, without=()) -> int:
    def total(num_layers):
        params = shapes(config.replace(num_layers=num_layers))
        return count({key: value for key, value in params.items() if key not in without})

    if config.num_layers <= 4:
        return total(config.num_layers)
    one, two = total(1), total(2)  # blocks have equal sizes; tracing 48 of them is slow
    return one + (config.num_layers - 1) * (two - one)


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_counts_are_as_published(name):
    config = presets.get(name)
    assert count_of(config) == COUNTS[name]
    if name in HEADLESS:
        assert count_of(config, without=HEADS) == HEADLESS[name]


def test_parameter_count_of_all_layers():
    params = shapes(presets.gpt2())
    assert count(params) == COUNTS["gpt2"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}


def test_options_of_the_papers():
    gpt1, gpt2, bert = presets.gpt1(), presets.gpt2(), presets.bert_base()
    assert (gpt1.norm_first, gpt2.norm_first, bert.norm_first) == (False, True, False)
    assert (gpt1.norm_epsilon, gpt2.norm_epsilon, bert.norm_epsilon) == (1e-5, 1e-5, 1e-12)
    assert (gpt1.activation, gpt2.activation, bert.activation) == ("gelu_tanh", "gelu_tanh", "gelu")
    assert (gpt1.initializer, bert.initializer) == ("normal", "truncated_normal")
    assert (gpt1.scale_residual_init, gpt2.scale_residual_init) == (False, True)
    for config in (gpt1, gpt2, bert):
        assert config.dropout_rate == config.attention_dropout_rate == 0.1
        assert config.init_std == 0.02
        assert config.positions == "learned"
    assert (gpt1.max_length, gpt2.max_length, bert.max_length) == (512, 1024, 512)


def test_every_preset_has_head_dim_64_and_mlp_dim_four_times_d_model():
    for name in presets.PRESETS:
        config = presets.get(name)
        assert config.stack.head_dim == 64
        assert config.mlp_dim == 4 * config.d_model
        kinds = {"gpt1": GPTConfig, "gpt2": GPTConfig, "bert": BERTConfig, "bart": BARTConfig,
                 "transformer": TransformerConfig}
        assert type(config) is kinds[name.partition("_")[0]]


def test_changes_are_validated():
    assert presets.get("bert_tiny", dropout_rate=0.0, vocab_size=99).vocab_size == 99
    assert presets.gpt2(attention_window=8).attention_window == 8
    with pytest.raises(ValueError, match="d_model is 100; it must be a multiple of num_heads 12"):
        presets.gpt2(d_model=100)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gpt2_meduim", "unknown preset 'gpt2_meduim'; did you mean gpt2_medium"),
        ("xyz", "choose one of gpt1, gpt2, gpt2_medium, .*bert_large"),
    ],
)
def test_unknown_preset(name, message):
    with pytest.raises(ValueError, match=message):
        presets.get(name)


def test_docstrings_cite_the_papers():
    for function in presets.PRESETS.values():
        assert "et al. 20" in function.__doc__
