"""Checkpoints of nine families that Transformers saved: the same outputs, and after loading and
saving the same bits."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from pretrained.files import GOLDENS, NAMES, golden, read_all, write

from transformer_jax import forward, load_pretrained, save_pretrained

TOLERANCE = 1e-5


def test_there_are_nine_small_goldens():
    assert len(NAMES) == 9
    assert all((GOLDENS / f"{name}.npz").stat().st_size < 100_000 for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_outputs_equal_those_of_transformers(name, tmp_path):
    groups = golden(name)
    model, params, _ = load_pretrained(write(tmp_path, name))
    run = jax.jit(forward, static_argnums=0, static_argnames="output_hidden_states")
    outputs = run(model, params, output_hidden_states=True, **groups["inputs"])
    masks = {"decoder": groups["inputs"].get("decoder_attention_mask"),
             "encoder": groups["inputs"]["attention_mask"]}
    for key, expected in groups["outputs"].items():
        group, _, i = key.partition("/")
        actual = outputs[group]
        actual = np.asarray(actual[int(i)] if isinstance(actual, tuple) else actual)
        stack = group.partition("_")[0]
        mask = masks.get(stack, masks["encoder"] if masks["decoder"] is None else masks["decoder"])
        is_token = True  # outputs at padding are not compared
        if mask is not None and expected.shape[:2] == mask.shape:
            is_token = mask.reshape(mask.shape + (1,) * (expected.ndim - 2)).astype(bool)
        assert actual.shape == expected.shape, key
        error = np.abs(np.where(is_token, actual - expected, 0)).max()
        assert error <= TOLERANCE * np.abs(np.where(is_token, expected, 0)).max(), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_saving_a_loaded_checkpoint_restores_every_bit(name, tmp_path):
    original = write(tmp_path / "original", name)
    model, params, _ = load_pretrained(original)
    save_pretrained(tmp_path / "saved", model, params)
    before, after = read_all(original), read_all(tmp_path / "saved")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        np.testing.assert_array_equal(after[key], value, strict=True)
    for file, text in golden(name)["files"].items():
        assert json.loads((tmp_path / "saved" / file).read_text()) == json.loads(str(text))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_16_bit_weights_are_saved_as_16_bit_weights(dtype, tmp_path):
    original = write(tmp_path / "original", "gpt2", dtype=dtype,
                     config={"dtype": np.dtype(dtype).name})
    model, params, _ = load_pretrained(original)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    save_pretrained(tmp_path / "saved", model, params)
    before, after = read_all(original), read_all(tmp_path / "saved")
    for key, value in before.items():
        assert after[key].dtype == dtype
        assert after[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("bert", lambda key: key.replace("LayerNorm.weight", "LayerNorm.gamma")
                                .replace("LayerNorm.bias", "LayerNorm.beta")),
        ("gpt2", lambda key: key.removeprefix("transformer.")),
        ("bart", lambda key: key.replace("model.shared.weight", "lm_head.weight")),
        ("marian", lambda key: key.replace("model.shared.", "model.encoder.embed_tokens.")),
        ("bert", lambda key: key.replace("bert.embeddings.word_embeddings.weight",
                                         "cls.predictions.decoder.weight")),
    ],
    ids=["gamma and beta", "no prefix", "only the output layer", "only the encoder's embedding",
         "only the MLM decoder"],
)
def test_alternative_tensor_names(name, rename, tmp_path, capsys):
    original = write(tmp_path / "original", name, rename)
    assert read_all(original).keys() != golden(name)["tensors"].keys()
    model, params, _ = load_pretrained(original)
    assert capsys.readouterr().err == ""  # no new parameters, no unused tensors
    save_pretrained(tmp_path / "saved", model, params)
    after = read_all(tmp_path / "saved")
    for key, value in golden(name)["tensors"].items():
        np.testing.assert_array_equal(after[key], value)
