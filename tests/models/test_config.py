"""Validation of configs, and their conversion to and from JSON."""

import dataclasses
import json

import numpy as np
import pytest
import small_models

from transformer_jax.models import (
    BERT,
    GPT,
    GPTConfig,
    build_model,
    config_from_dict,
    config_to_dict,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 0}, "vocab_size is 0; it must be at least 1"),
        ({"num_layers": -1}, "num_layers is -1; it must be at least 1"),
        ({"d_model": 25}, "d_model is 25; it must be a multiple of num_heads 3"),
        ({"d_model": 27, "positions": "sinusoidal"}, "27; it must be even for sinusoidal"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0; it must be at least 0 and less than 1"),
        ({"attention_dropout_rate": -0.1}, "attention_dropout_rate is -0.1; it must be at least 0"),
        ({"positions": "rotary"}, "positions is 'rotary'; it must be one of learned, sinusoidal"),
        ({"activation": "sine"}, "activation is 'sine'; it must be one of gelu, gelu_tanh"),
        ({"initializer": "zeros"}, "initializer is 'zeros'; it must be one of normal, truncated"),
        ({"dtype": "float16"}, "dtype is 'float16'; it must be one of float32, bfloat16"),
        ({"norm_epsilon": 0.0}, "norm_epsilon is 0.0; it must be a finite number above 0"),
        ({"init_std": float("nan")}, "init_std is nan; it must be a finite number above 0"),
        ({"attention_window": 0}, "attention_window is 0; it must be at least 1, or None"),
    ],
)
def test_values_out_of_range(change, message):
    with pytest.raises(ValueError, match=message) as error:
        small_models.GPT2.replace(**change)
    assert "\n" not in str(error.value)


def test_segments_out_of_range():
    with pytest.raises(ValueError, match="num_segments is -1; it must be at least 0"):
        small_models.BERT.replace(num_segments=-1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": "24"}, "d_model is '24', of type str; it must be int"),
        ({"d_model": 24.0}, "d_model is 24.0, of type float; it must be int"),
        ({"num_layers": True}, "num_layers is True, of type bool; it must be int"),
        ({"norm_epsilon": "1e-5"}, "norm_epsilon is '1e-5', of type str; it must be float"),
        ({"norm_first": 1}, "norm_first is 1, of type int; it must be bool"),
        ({"dtype": np.float32}, "dtype is .*, of type type; it must be str"),
        ({"attention_window": "8"}, "attention_window is '8', of type str; it must be int or None"),
    ],
)
def test_values_of_another_type(change, message):
    with pytest.raises(ValueError, match=message) as error:
        small_models.GPT2.replace(**change)
    assert "\n" not in str(error.value)


def test_numpy_numbers_and_integer_rates_are_accepted():
    config = small_models.GPT2.replace(d_model=np.int64(48), dropout_rate=0, attention_window=None)
    assert (config.d_model, config.dropout_rate, config.attention_window) == (48, 0, None)


@pytest.mark.parametrize("config", [small_models.GPT2, small_models.BERT])
def test_class_logits_require_num_classes(config):
    model, params = small_models.build(config)
    with pytest.raises(ValueError, match="num_classes is 0; it must be at least 1") as error:
        model.apply({"params": params}, np.ones((1, 4), np.int32), method="classification_logits")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "kind"), [(small_models.GPT2, GPT), (small_models.BERT, BERT)]
)
def test_json_round_trip(config, kind):
    config = config.replace(positions="sinusoidal", dtype="bfloat16", dropout_rate=0.25)
    restored = config_from_dict(json.loads(json.dumps(config_to_dict(config))))
    assert restored == config
    assert isinstance(build_model(restored), kind)


def test_former_field_names_are_accepted():
    config = small_models.GPT2.replace(attention_impl="xla", attention_window=8)
    values = config_to_dict(config)
    former = values | {"kernel": values["attention_impl"], "context_size": 8}
    del former["attention_impl"], former["attention_window"]
    assert config_from_dict(json.loads(json.dumps(former))) == config
    with pytest.raises(ValueError, match="unknown fields of a gpt config: kernel; remove them"):
        config_from_dict(values | {"kernel": "xla"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": "t5"}, "model family is 't5'; it must be one of gpt, bert"),
        ({"attention_window": 4}, "unknown fields of a bert config: attention_window"),
        ({"d_model": 7}, "d_model is 7; it must be a multiple"),
    ],
)
def test_invalid_dicts(change, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(config_to_dict(small_models.BERT) | change)


def test_missing_field():
    values = config_to_dict(small_models.GPT1)
    del values["d_model"]
    with pytest.raises(ValueError, match="missing fields of a gpt config: d_model"):
        config_from_dict(values)


def test_a_config_of_no_family():
    class MyConfig(GPTConfig):
        pass

    with pytest.raises(ValueError, match="config is a MyConfig; give one of GPTConfig"):
        build_model(MyConfig(**dataclasses.asdict(small_models.GPT2)))
