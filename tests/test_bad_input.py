"""Errors of invalid input: one line with the value, the allowed range and the fix, raised before
anything is compiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from transformer_jax import generation
from transformer_jax.data import check_batch_ids, sources
from transformer_jax.finetuning import select
from transformer_jax.models import build_model, init_params, presets
from transformer_jax.objectives import classification, input_format
from transformer_jax.train import checkpointing, optimizers, step

TINY = {"num_layers": 1, "d_model": 8, "num_heads": 2, "mlp_dim": 8, "vocab_size": 30,
        "max_length": 16}


@functools.cache
def tiny_model(name, **changes):
    model = build_model(presets.get(name, **{**TINY, **changes}))
    return model, init_params(model, jax.random.key(0))


def empty_file(tmp):
    (tmp / "empty.txt").write_text("")
    sources.load_text_files(tmp / "empty.txt")


def invalid_utf8_file(tmp):
    (tmp / "latin.txt").write_bytes(b"caf\xe9 au lait")
    sources.load_text_files(tmp / "latin.txt")


def call_with_too_many_tokens(name):
    model, params = tiny_model(name)
    model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32))


def call_classifier_without_classes():
    model, params = tiny_model("gpt2")
    model.apply({"params": params}, jnp.zeros((1, 4), jnp.int32), method="classification_logits")


def load_into_other_shape(tmp):
    _, params = tiny_model("gpt2")
    state = step.init_state(params, optimizers.make_optimizer(1e-3))
    checkpointing.save(tmp / "saved", 1, state)
    checkpointing.load_params(tmp / "saved", tiny_model("gpt2", mlp_dim=24)[1])


def prepare_label(value):
    pack_input = functools.partial(input_format.pack_gpt_input, length=4, extract_id=0)
    classification.prepare_classification(
        {"tokens": [1], "label": value}, pack_input=pack_input, num_classes=3)


CASES = {
    "empty file": (empty_file, ["empty.txt", "0 bytes", "add text"]),
    "missing file": (lambda tmp: sources.load_text_files(tmp / "none.txt"), ["none.txt", "give"]),
    "undecodable bytes": (invalid_utf8_file, ["latin.txt", "0xe9", "offset 3", "UTF-8"]),
    "id outside the vocabulary, generate": (
        lambda _: generation.generate(*tiny_model("gpt2"), [[1, 30]], max_new_tokens=1),
        ["30", "vocabulary of 30", "tokenizer"]),
    "id outside the vocabulary, fill": (
        lambda _: generation.fill_mask(*tiny_model("bert_tiny"), [1, -1, 4], mask_id=4),
        ["-1", "vocabulary of 30", "tokenizer"]),
    "id outside the vocabulary, batch": (
        lambda _: check_batch_ids({"tokens": np.array([[3, 31]])}, 30, 16),
        ["31", "vocabulary of 30", "tokenizer"]),
    "too long, batch": (
        lambda _: check_batch_ids({"tokens": np.zeros((1, 17), int)}, 30, 16),
        ["17 tokens", "16 positions", "truncate the text"]),
    "too long for GPT": (
        lambda _: call_with_too_many_tokens("gpt2"), ["17 tokens", "16 positions", "shorten"]),
    "too long for BERT": (
        lambda _: call_with_too_many_tokens("bert_tiny"), ["17 tokens", "16 positions", "shorten"]),
    "too long to generate": (
        lambda _: generation.generate(*tiny_model("gpt2"), [[1] * 10], max_new_tokens=7),
        ["10", "7", "16", "at most 6"]),
    "label too large": (lambda _: prepare_label(3), ["label 3", "0 to 2", "num_classes"]),
    "label below zero": (lambda _: prepare_label(-1), ["label -1", "0 to 2", "num_classes"]),
    "unknown trainable spec": (
        lambda _: select.trainable_mask(tiny_model("gpt2")[1], "bitfitt"),
        ["bitfitt", "did you mean bitfit"]),
    "trainable spec without a match": (
        lambda _: select.trainable_mask(tiny_model("gpt2")[1], "regex:positon_embed"),
        ["positon_embed", "position_embed/embedding"]),
    "unknown preset": (lambda _: presets.get("bert_bse"), ["bert_bse", "bert_base"]),
    "unknown dataset": (
        lambda _: sources.load_source("python_docs/topic", "train"), ["topic", "topics"]),
    "size of another type": (
        lambda _: presets.get("gpt2", d_model="24"), ["d_model", "'24'", "str", "must be int"]),
    "classification without classes": (
        lambda _: call_classifier_without_classes(),
        ["num_classes is 0", "at least 1", "build the model"]),
    "missing checkpoint": (
        lambda tmp: checkpointing.load_params(tmp / "none"), ["none", "check the path"]),
    "checkpoint of another shape": (
        load_into_other_shape, ["mlp/wi/bias", "(8,)", "(24,)", "the config"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_errors_of_invalid_input(case, tmp_path):
    call, words = CASES[case]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
