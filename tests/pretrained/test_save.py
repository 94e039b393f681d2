"""Saving of models that were not loaded from a checkpoint, of unsupported models, and of runs."""

import json

import jax
import numpy as np
import pytest
import small_models
from pretrained.files import read_all, write

from transformer_jax import load_pretrained, save_pretrained
from transformer_jax.data import tokenizers
from transformer_jax.models import BERTConfig, TransformerConfig, build_model, init_params
from transformer_jax.pretrained import load_run, save_run_config
from transformer_jax.train import checkpointing, optimizers, step
from transformer_jax.tree import flatten_paths

MARIAN = TransformerConfig(vocab_size=20, max_length=10, num_layers=1, d_model=8, num_heads=2,
                           mlp_dim=12, positions="sinusoidal_halves", decoder_start_token_id=1,
                           num_decoder_layers=2, activation="swish")
CASES = {
    "gpt2": (small_models.GPT2, "causal_lm", 0),
    "gpt2 untied": (small_models.GPT2.replace(tie_embeddings=False), "causal_lm", 0),
    "openai-gpt": (small_models.GPT1.replace(mlp_dim=96), "causal_lm", 0),
    "bert": (small_models.BERT, "pretraining", 0),
    "roberta": (small_models.BERT.replace(position_offset=2, pad_token_id=1), "classification", 3),
    "distilbert untied": (small_models.BERT.replace(
        num_segments=0, pooler_activation="relu", tie_embeddings=False), "masked_lm", 0),
    "distilbert": (small_models.BERT.replace(num_segments=0, pooler_activation="relu"),
                   "token_classification", 3),
    "bart": (small_models.BART, "seq2seq_lm", 0),
    "mbart": (small_models.BART.replace(norm_first=True), "classification", 2),
    "marian": (MARIAN, "seq2seq_lm", 0),
    "pegasus": (MARIAN.replace(norm_first=True), "base", 0),
}


def built(config, task, num_classes=0):
    model = build_model(config, num_classes, task)
    shapes = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    return model, small_models.random_params(shapes)


@pytest.mark.slow
@pytest.mark.parametrize("family", CASES)
def test_save_and_load_round_trip(family, tmp_path, capsys):
    config, task, num_classes = CASES[family]
    model, params = built(config, task, num_classes)
    save_pretrained(tmp_path, model, params)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == family.partition(" ")[0]
    loaded_model, loaded, _ = load_pretrained(tmp_path)
    assert capsys.readouterr().err == ""  # no new parameters, no unused tensors
    assert (loaded_model.task, loaded_model.num_classes) == (task, num_classes)
    for path, leaf in flatten_paths(params).items():
        np.testing.assert_array_equal(flatten_paths(loaded)[path], leaf)
    # Fields that affect the outputs are restored.
    for name in ("norm_first", "activation", "positions", "position_offset", "max_length",
                 "embedding_scale", "pad_token_id", "norm_epsilon"):
        assert getattr(loaded_model.config, name) == getattr(config, name), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "task", "message"),
    [
        (small_models.GPT2.replace(positions="sinusoidal"), "causal_lm",
         "unsupported positions 'sinusoidal'"),
        (small_models.GPT2.replace(attention_window=4), "causal_lm",
         "unsupported attention_window 4 for gpt2"),
        (small_models.BART.replace(residual=False), "seq2seq_lm",
         "unsupported residual False for bart"),
        (small_models.GPT1, "causal_lm", "unsupported mlp_dim 40 for openai-gpt .*supported: 96"),
        (small_models.TRANSFORMER, "seq2seq_lm", "unsupported positions 'sinusoidal' for marian"),
        (small_models.BART.replace(activation="tanh", tie_embeddings=False), "seq2seq_lm",
         "unsupported tie_embeddings False"),
        (BERTConfig(**small_models._SHAPE, pooler_activation="relu"), "base",
         "unsupported pooler_activation 'relu'"),
        # Transformers would classify the first token with a pooler that was never trained.
        (small_models.BERT.replace(pooling="mean"), "base", "unsupported pooling 'mean'"),
    ],
)
def test_models_that_no_family_supports_are_rejected(config, task, message, tmp_path):
    model, params = built(config, task)
    with pytest.raises(ValueError, match=message) as error:
        save_pretrained(tmp_path / "out", model, params)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_tasks_that_a_family_does_not_support_are_rejected(tmp_path):
    model, params = built(MARIAN, "question_answering", 2)
    with pytest.raises(ValueError, match="unsupported task question_answering for marian"):
        save_pretrained(tmp_path, model, params)


def test_parameters_of_another_model_are_rejected(tmp_path):
    model, params = built(small_models.GPT2, "causal_lm")
    less = {name: leaf for name, leaf in params.items() if name != "position_embed"}
    with pytest.raises(ValueError, match="have no position_embed/embedding, which a GPT"):
        save_pretrained(tmp_path, model, less)
    more = params | {"lora": {"a": np.zeros(3)}}
    with pytest.raises(ValueError, match="have lora/a, which a GPT for causal_lm does not have"):
        save_pretrained(tmp_path, model, more)


def test_a_classifier_bias_is_rejected_for_gpt(tmp_path):
    model, params = built(small_models.GPT2, "classification", 2)
    with pytest.raises(ValueError, match="unsupported parameter classifier/bias: gpt2"):
        save_pretrained(tmp_path, model, params)
    model, params = built(small_models.GPT2.replace(classifier_bias=False), "classification", 2)
    save_pretrained(tmp_path, model, params)
    assert "score.weight" in read_all(tmp_path)


def test_unknown_config_fields_are_kept_and_changed_ones_updated(tmp_path):
    write(tmp_path / "in", "bert", config={"my_note": {"a": [1]}, "hidden_act": "gelu_python"})
    model, params, _ = load_pretrained(tmp_path / "in", dropout_rate=0.4)
    save_pretrained(tmp_path / "out", model, params)
    before, after = (json.loads((tmp_path / name / "config.json").read_text())
                     for name in ("in", "out"))
    assert after == before | {"hidden_dropout_prob": 0.4}


def test_label_names_are_kept_unless_their_number_changes(tmp_path):
    names = {"0": "bad", "1": "good", "2": "so", "3": "la"}
    write(tmp_path / "in", "roberta", config={"id2label": names})
    model, params, _ = load_pretrained(tmp_path / "in")
    save_pretrained(tmp_path / "out", model, params)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["id2label"] == names


# Folders of runs: what a refused command leaves unchanged -----------------------------------------

TOKENIZER = tokenizers.train_chars(["abc"])


@pytest.fixture
def folder(tmp_path):
    params = small_models.build(small_models.GPT2)[1]
    state = step.init_state(params, optimizers.make_optimizer(0.1))
    save_run_config(tmp_path, small_models.GPT2, TOKENIZER)
    checkpointing.save(tmp_path / "checkpoints", 1, state)
    return tmp_path


def test_the_config_of_another_model_is_refused_before_anything_is_written(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = small_models.GPT2.replace(num_layers=small_models.GPT2.num_layers + 1)
    with pytest.raises(ValueError, match=f"num_layers was {small_models.GPT2.num_layers} and is "
                                         f"{other.num_layers}; use the same model settings"):
        save_run_config(folder, other, TOKENIZER)
    assert {path: path.read_bytes() for path in before} == before
    assert load_run(folder).model.config == small_models.GPT2


def test_settings_that_change_no_shape_are_saved(folder):
    other = small_models.GPT2.replace(dropout_rate=0.3)
    save_run_config(folder, other, TOKENIZER)
    assert load_run(folder).model.config == other


def test_an_invalid_config_is_replaced(folder):
    (folder / "config.json").write_text("{")
    save_run_config(folder, small_models.GPT2, TOKENIZER)
    assert load_run(folder).model.config == small_models.GPT2
