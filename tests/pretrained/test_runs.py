"""Folders of runs: what a refused command leaves unchanged."""

import pytest
from small_models import GPT2, build

from transformer_jax.data import tokenizers
from transformer_jax.pretrained import runs
from transformer_jax.train import checkpointing, optimizers, step

TOKENIZER = tokenizers.train_chars(["abc"])


@pytest.fixture
def folder(tmp_path):
    state = step.init_state(build(GPT2)[1], optimizers.make_optimizer(0.1))
    runs.save_run_config(tmp_path, GPT2, TOKENIZER)
    checkpointing.save(tmp_path / "checkpoints", 1, state)
    return tmp_path


def test_the_config_of_another_model_is_refused_before_anything_is_written(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = GPT2.replace(num_layers=GPT2.num_layers + 1)
    with pytest.raises(ValueError, match=f"num_layers was {GPT2.num_layers} and is "
                                         f"{other.num_layers}; use the same model settings"):
        runs.save_run_config(folder, other, TOKENIZER)
    assert {path: path.read_bytes() for path in before} == before
    assert runs.load_run(folder).model.config == GPT2


def test_settings_that_change_no_shape_are_saved(folder):
    other = GPT2.replace(dropout_rate=0.3)
    runs.save_run_config(folder, other, TOKENIZER)
    assert runs.load_run(folder).model.config == other


def test_an_invalid_config_is_replaced(folder):
    (folder / "config.json").write_text("{")
    runs.save_run_config(folder, GPT2, TOKENIZER)
    assert runs.load_run(folder).model.config == GPT2
