"""Checkpoints of nine families as the reference wrote them: its numbers, and back bit by bit."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from pretrained.files import GOLDENS, NAMES, golden, read_all, write

from transformer_jax import forward, load_pretrained, save_pretrained

TOLERANCE = 1e-5


def test_there_are_nine_and_they_are_small():
    assert len(NAMES) == 9
    assert all((GOLDENS / f"{name}.npz").stat().st_size < 100_000 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_the_reference(name, tmp_path):
    made = golden(name)
    model, params, _ = load_pretrained(write(tmp_path, name))
    run = jax.jit(forward, static_argnums=0, static_argnames="output_hidden_states")
    ours = run(model, params, output_hidden_states=True, **made["inputs"])
    masks = {"decoder": made["inputs"].get("decoder_attention_mask"),
             "encoder": made["inputs"]["attention_mask"]}
    for key, expected in made["outputs"].items():
        group, _, i = key.partition("/")
        actual = ours[group]
        actual = np.asarray(actual[int(i)] if isinstance(actual, tuple) else actual)
        side = group.partition("_")[0]
        mask = masks.get(side, masks["encoder"] if masks["decoder"] is None else masks["decoder"])
        real = True  # padding may see anything
        if mask is not None and expected.shape[:2] == mask.shape:
            real = mask.reshape(mask.shape + (1,) * (expected.ndim - 2)).astype(bool)
        assert actual.shape == expected.shape, key
        error = np.abs(np.where(real, actual - expected, 0)).max()
        assert error <= TOLERANCE * np.abs(np.where(real, expected, 0)).max(), key


@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_loses_nothing(name, tmp_path):
    theirs = write(tmp_path / "theirs", name)
    model, params, _ = load_pretrained(theirs)
    save_pretrained(tmp_path / "ours", model, params)
    before, after = read_all(theirs), read_all(tmp_path / "ours")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert after[key].dtype == value.dtype, key
        np.testing.assert_array_equal(after[key], value, strict=True)
    for file, text in golden(name)["files"].items():
        assert json.loads((tmp_path / "ours" / file).read_text()) == json.loads(str(text))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_halves_come_back_as_halves(dtype, tmp_path):
    theirs = write(tmp_path / "theirs", "gpt2", dtype=dtype,
                   config={"dtype": np.dtype(dtype).name})
    model, params, _ = load_pretrained(theirs)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    save_pretrained(tmp_path / "ours", model, params)
    before, after = read_all(theirs), read_all(tmp_path / "ours")
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
         "only the decoder"],
)
def test_other_names_of_the_same_tensors(name, rename, tmp_path, capsys):
    theirs = write(tmp_path / "theirs", name, rename)
    assert read_all(theirs).keys() != golden(name)["tensors"].keys()
    model, params, _ = load_pretrained(theirs)
    assert capsys.readouterr().err == ""  # nothing is new, nothing is left
    save_pretrained(tmp_path / "ours", model, params)
    after = read_all(tmp_path / "ours")
    for key, value in golden(name)["tensors"].items():
        np.testing.assert_array_equal(after[key], value)
