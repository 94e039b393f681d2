"""Default options of a checkpoint, in `generate` and in the command line interface."""

import json

import numpy as np
import pytest
from pretrained.files import golden, write
from small_models import BART as CONFIG

from transformer_jax import load_pretrained
from transformer_jax.cli.inference import target_options
from transformer_jax.generation import generate, generation_options
from transformer_jax.models import BART

# generation_config.json of a well-known summarizer, and the options that it sets.
SUMMARIZER = {
    "_from_model_config": True, "bos_token_id": 0, "decoder_start_token_id": 2,
    "early_stopping": True, "eos_token_id": 2, "forced_bos_token_id": 0, "forced_eos_token_id": 2,
    "length_penalty": 2.0, "max_length": 142, "min_length": 56, "no_repeat_ngram_size": 3,
    "num_beams": 4, "pad_token_id": 1, "transformers_version": "4.27.0.dev0",
}
SUMMARIZER_OPTIONS = {
    "early_stopping": True, "length_penalty": 2.0, "max_length": 142, "min_length": 56,
    "no_repeat_ngram_size": 3, "num_beams": 4}


def options_of(values):
    return generation_options(BART(CONFIG, hf_config=json.dumps(values)))


@pytest.mark.parametrize(("values", "expected"), [
    ({"generation_config": SUMMARIZER}, SUMMARIZER_OPTIONS),
    (SUMMARIZER, SUMMARIZER_OPTIONS),  # old checkpoints have them in config.json
    ({"num_beams": 4, "generation_config": {"length_penalty": 2.0}}, {}),  # config.json is ignored
    ({"temperature": 0.7, "top_k": 5, "do_sample": False}, {"do_sample": False}),
    ({"temperature": 0.7, "top_k": 0, "do_sample": True}, {"temperature": 0.7, "do_sample": True}),
    ({"max_new_tokens": 9, "max_length": 20, "num_beams": None}, {"max_new_tokens": 9}),
    ({"bad_words_ids": [[5]], "suppress_tokens": None}, {"bad_words_ids": [[5]]}),
    ({}, {}),
])
def test_options_of_a_checkpoint(values, expected):
    assert options_of(values) == expected


def test_a_model_without_a_checkpoint_has_no_options():
    assert generation_options(BART(CONFIG)) == {}


def test_command_line_options_override_those_of_the_checkpoint():
    model = BART(CONFIG.replace(max_length=100),
                 hf_config=json.dumps({"generation_config": SUMMARIZER}))
    defaults = {"num_beams": 5, "length_penalty": 0.6, "max_length": 129}
    single_text = {"do_sample": False, "num_return_sequences": 1}
    found = target_options(model, {"num_beams": None}, defaults)
    assert found == SUMMARIZER_OPTIONS | single_text | {"max_length": 100}  # number of positions
    given = {"num_beams": 2, "max_new_tokens": 300, "min_new_tokens": 0}
    assert target_options(model, given, defaults) == single_text | {
        "num_beams": 2, "max_new_tokens": 99, "min_new_tokens": 0, "early_stopping": True,
        "length_penalty": 2.0, "no_repeat_ngram_size": 3}
    greedy = target_options(model, {"num_beams": 1}, defaults)
    assert "length_penalty" not in greedy and "early_stopping" not in greedy
    assert target_options(BART(CONFIG), {}, defaults) == defaults | single_text | {"max_length": 32}


@pytest.mark.slow
def test_generate_accepts_the_options(tmp_path):
    write(tmp_path, "bart")
    (tmp_path / "generation_config.json").write_text(json.dumps(
        {"decoder_start_token_id": 2, "num_beams": 2, "max_new_tokens": 5, "min_new_tokens": 5}))
    model, params, _ = load_pretrained(tmp_path, "seq2seq_lm")
    ids = golden("bart")["inputs"]["input_ids"][:1]
    out = generate(model, params, ids, **generation_options(model))
    np.testing.assert_array_equal(
        out, generate(model, params, ids, num_beams=2, max_new_tokens=5, min_new_tokens=5))
    assert out.shape == (1, 6)
