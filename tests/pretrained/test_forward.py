"""Inputs and outputs under the names of Transformers: supported ones and errors."""

import jax
import numpy as np
import pytest
from pretrained.files import write

from transformer_jax import forward, load_pretrained
from transformer_jax.pretrained.forward import default_decoder_input_ids


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return {name: load_pretrained(write(tmp_path_factory.mktemp(name), name), **options)
            for name, options in (("gpt2", {}), ("bert", {}), ("bart", {}), ("mbart", {}),
                                  ("distilbert", {}), ("roberta", {"task": "multiple_choice"}))}


run = jax.jit(forward, static_argnums=0, static_argnames="output_hidden_states")
IDS = np.array([[3, 4, 5, 6], [7, 8, 9, 3]])


@pytest.mark.parametrize(
    ("name", "inputs", "message"),
    [
        ("gpt2", {"input_ids": IDS, "attention_maks": IDS},
         "unsupported input 'attention_maks' of GPT.*attention_mask"),
        ("gpt2", {"input_ids": IDS, "token_type_ids": IDS * 0},
         "unsupported input 'token_type_ids' of GPT; supported: input_ids"),
        ("bert", {"input_ids": IDS, "decoder_input_ids": IDS},
         "unsupported input 'decoder_input_ids' of BERT"),
        ("bert", {"attention_mask": IDS}, "input_ids are missing"),
        ("bert", {"input_ids": IDS[0]}, r"shape \(4,\); it must have 2 axes"),
        ("bert", {"input_ids": IDS, "attention_mask": IDS[:, :3]},
         r"\(2, 3\); it must have the shape of input_ids"),
        ("bert", {"input_ids": IDS + 27}, "input_ids contain 36; ids must be from 0 to 29"),
        ("bert", {"input_ids": IDS - 4}, "input_ids contain -1"),
        ("bert", {"input_ids": IDS, "token_type_ids": IDS}, "token_type_ids contain 9.*0 to 1"),
        ("bart", {"input_ids": IDS, "decoder_input_ids": IDS[:, :2], "decoder_attention_mask": IDS},
         r"decoder_attention_mask has shape \(2, 4\).* of decoder_input_ids, \(2, 2\)"),
        ("bert", {"input_ids": np.ones((1, 13), int)}, "13 tokens is longer than.*12"),
        ("roberta", {"input_ids": IDS}, "it must have 3 axes"),
        ("gpt2", {"input_ids": IDS, "position_ids": IDS + 3},
         "position_ids contain 12; ids must be from 0 to 11"),
        ("bert", {"input_ids": IDS, "position_ids": IDS - 4}, "position_ids contain -1; ids must"),
        ("distilbert", {"input_ids": IDS, "token_type_ids": IDS * 0},
         "unsupported input 'token_type_ids': the model has no segment embeddings"),
    ],
)
def test_invalid_inputs_are_rejected(loaded, name, inputs, message):
    model, params, _ = loaded[name]
    with pytest.raises(ValueError, match=message) as error:
        forward(model, params, **inputs)
    assert "\n" not in str(error.value)


def test_choices_are_scored_independently(loaded):
    model, params, _ = loaded["roberta"]
    both = np.stack([IDS, IDS[::-1]], axis=1)
    logits = run(model, params, input_ids=both)["logits"]
    assert logits.shape == (2, 2)
    swapped = run(model, params, input_ids=both[:, ::-1])["logits"]
    np.testing.assert_allclose(logits, swapped[:, ::-1], atol=1e-6)


def test_forward_is_differentiable(loaded):
    model, params, _ = loaded["gpt2"]
    gradient = jax.jit(jax.grad(
        lambda params: forward(model, params, input_ids=IDS)["logits"].sum()))(params)
    assert np.abs(gradient["classifier"]["kernel"]).max() > 0
    assert np.abs(gradient["token_embed"]["embedding"][3]).max() > 0


def test_dropout_is_applied_if_a_key_is_given(loaded):
    model, params, _ = loaded["bert"]
    outs = [run(model, params, input_ids=IDS, rng=rng)["prediction_logits"]
            for rng in (None, None, jax.random.key(1), jax.random.key(2))]
    np.testing.assert_array_equal(outs[0], outs[1])
    assert np.abs(outs[0] - outs[2]).max() > 0.01
    assert np.abs(outs[2] - outs[3]).max() > 0.01


def test_inputs_that_are_none_are_ignored(loaded):
    model, params, _ = loaded["bert"]
    ones = np.ones_like(IDS)
    np.testing.assert_allclose(
        run(model, params, input_ids=IDS, attention_mask=None)["pooler_output"],
        run(model, params, input_ids=IDS, attention_mask=ones)["pooler_output"], atol=1e-6)


def test_default_decoder_inputs_are_the_shifted_source(loaded):
    """BART starts with its start token, mBART with the language token at the end of the source."""
    for name, first in (("bart", [2, 2]), ("mbart", [6, 3])):
        model = loaded[name].model
        expected = np.concatenate([np.array(first)[:, None], IDS[:, :-1]], axis=1)
        np.testing.assert_array_equal(default_decoder_input_ids(model.config, IDS), expected)
    without_pad = model.config.replace(pad_token_id=None)
    with pytest.raises(ValueError, match=r"decoder_input_ids are missing.*no pad_token_id"):
        default_decoder_input_ids(without_pad, IDS)


def test_gpt_classifies_the_last_token_before_the_padding(loaded):
    model, params, _ = loaded["gpt2"]
    padded = np.concatenate([IDS, np.full((2, 3), model.config.pad_token_id)], axis=1)
    np.testing.assert_allclose(run(model, params, input_ids=padded)["logits"],
                               run(model, params, input_ids=IDS)["logits"], atol=1e-5)


def test_hidden_states_are_returned_only_on_request(loaded):
    model, params, _ = loaded["bert"]
    assert "hidden_states" not in run(model, params, input_ids=IDS)
    out = run(model, params, input_ids=IDS, output_hidden_states=True)
    assert len(out["hidden_states"]) == 2  # embeddings and one layer
    np.testing.assert_array_equal(out["hidden_states"][-1], out["last_hidden_state"])
