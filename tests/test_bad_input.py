"""Bad input: one line that names the value, the limit and the mend, before anything compiles."""

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
def tiny(name, **changes):
    model = build_model(presets.get(name, **{**TINY, **changes}))
    return model, init_params(model, jax.random.key(0))


def empty_file(tmp):
    (tmp / "empty.txt").write_text("")
    sources.text_files(tmp / "empty.txt")


def undecodable(tmp):
    (tmp / "latin.txt").write_bytes(b"caf\xe9 au lait")
    sources.text_files(tmp / "latin.txt")


def too_long(name):
    model, params = tiny(name)
    model.apply({"params": params}, jnp.zeros((1, 17), jnp.int32))


def other_shape(tmp):
    _, params = tiny("gpt2")
    state = step.init_state(params, optimizers.make_optimizer(1e-3))
    checkpointing.save(tmp / "saved", 1, state)
    checkpointing.load_params(tmp / "saved", tiny("gpt2", mlp_dim=24)[1])


def label(value):
    row = functools.partial(input_format.pack_gpt_input, length=4, extract_id=0)
    classification.prepare_classification({"tokens": [1], "label": value}, row=row, num_classes=3)


CASES = {
    "empty file": (empty_file, ["empty.txt", "0 bytes", "write some"]),
    "missing file": (lambda tmp: sources.text_files(tmp / "none.txt"), ["none.txt", "give"]),
    "undecodable bytes": (undecodable, ["latin.txt", "0xe9", "offset 3", "UTF-8"]),
    "id outside the vocabulary, generate": (
        lambda _: generation.generate(*tiny("gpt2"), [[1, 30]], max_new_tokens=1),
        ["30", "vocabulary of 30", "tokenizer"]),
    "id outside the vocabulary, fill": (
        lambda _: generation.fill_mask(*tiny("bert_tiny"), [1, -1, 4], mask_id=4),
        ["-1", "vocabulary of 30", "tokenizer"]),
    "id outside the vocabulary, batch": (
        lambda _: check_batch_ids({"tokens": np.array([[3, 31]])}, 30, 16),
        ["31", "vocabulary of 30", "tokenizer"]),
    "too long, batch": (
        lambda _: check_batch_ids({"tokens": np.zeros((1, 17), int)}, 30, 16),
        ["17 tokens", "16 positions", "cut the text"]),
    "too long for GPT": (lambda _: too_long("gpt2"), ["17 tokens", "16 positions", "shorten"]),
    "too long for BERT": (
        lambda _: too_long("bert_tiny"), ["17 tokens", "16 positions", "shorten"]),
    "too long to generate": (
        lambda _: generation.generate(*tiny("gpt2"), [[1] * 10], max_new_tokens=7),
        ["10", "7", "16", "at most 6"]),
    "label too large": (lambda _: label(3), ["label 3", "0 to 2", "num_classes"]),
    "label below zero": (lambda _: label(-1), ["label -1", "0 to 2", "num_classes"]),
    "unknown recipe": (
        lambda _: select.trainable_mask(tiny("gpt2")[1], "bitfitt"), ["bitfitt", "'bitfit'"]),
    "recipe without a match": (
        lambda _: select.trainable_mask(tiny("gpt2")[1], "regex:positon_embed"),
        ["positon_embed", "position_embed/embedding"]),
    "unknown preset": (lambda _: presets.get("bert_bse"), ["bert_bse", "bert_base"]),
    "unknown data set": (
        lambda _: sources.load_source("python_docs/topic", "train"), ["topic", "topics"]),
    "size of another type": (
        lambda _: presets.get("gpt2", d_model="24"), ["d_model", "'24'", "str", "must be int"]),
    "classify without classes": (
        lambda _: tiny("gpt2")[0].apply({"params": tiny("gpt2")[1]}, jnp.zeros((1, 4), jnp.int32),
                                        method="classification_logits"),
        ["num_classes is 0", "at least 1", "build the model"]),
    "missing checkpoint": (
        lambda tmp: checkpointing.load_params(tmp / "none"), ["none", "check the path"]),
    "checkpoint of another shape": (other_shape, ["mlp/wi/bias", "(8,)", "(24,)", "configuration"]),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, tmp_path):
    act, words = CASES[case]
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        act(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
