"""Identity of a run, results, and the names of older runs."""

import dataclasses
from pathlib import Path

import numpy as np

from transformer_jax.data.packing import Corpus
from transformer_jax.models import config_from_dict, config_to_dict, presets
from transformer_jax.recipes import run_dir
from transformer_jax.recipes.config import (
    DatasetConfig,
    MeshConfig,
    OptimizerConfig,
    TrainingConfig,
)
from transformer_jax.recipes.finetuning import FinetuneConfig
from transformer_jax.recipes.pretraining import PretrainConfig
from transformer_jax.recipes.sequence_to_sequence import TranslateConfig

RUN = PretrainConfig(presets.gpt2(num_layers=1), "causal_lm", "bpe", 16, 8, 100, Path("a"))
ROWS = [{"tokens": [1, 2, 3], "text": "a"}, {"tokens": [4], "text": "b"}]


def is_same(**changes) -> bool:
    return run_dir.run_metadata(dataclasses.replace(RUN, **changes), ROWS) == (
        run_dir.run_metadata(RUN, ROWS))


def test_identity_has_the_settings_that_the_result_depends_on():
    assert is_same(out=Path("b"), log_every=1, save_every=1, mesh=MeshConfig(fsdp=2),
                   allow_config_mismatch=True)
    assert not is_same(num_steps=101)
    assert not is_same(seed=1)
    assert not is_same(optimizer=OptimizerConfig(peak_lr=2e-3))
    assert not is_same(model=presets.gpt2(num_layers=2))
    settings = run_dir.run_metadata(TrainingConfig(), ROWS)["settings"]
    assert settings["batch_size"] == 16 and "save_every" not in settings
    assert "data" not in run_dir.run_metadata(DatasetConfig(), ROWS)["settings"]


def test_identity_of_fine_tuning_does_not_change_with_the_evaluation():
    """So that runs of versions without these settings can be resumed."""
    assert run_dir.run_metadata(TrainingConfig(), ROWS) == run_dir.run_metadata(
        TrainingConfig(eval_every=5, patience=2, keep_best=True), ROWS)


def test_fingerprint_depends_on_the_rows():
    assert run_dir.fingerprint(ROWS) == run_dir.fingerprint([dict(row) for row in ROWS])
    assert run_dir.fingerprint(ROWS) != run_dir.fingerprint(ROWS[::-1])
    other = [ROWS[0], {"tokens": [4], "text": "c"}]
    assert run_dir.fingerprint(ROWS) != run_dir.fingerprint(other)


def test_fingerprint_of_a_corpus_depends_on_its_blocks():
    tokens, starts = np.arange(2**20, dtype=np.int32), np.array([0, 500])
    found = run_dir.fingerprint(Corpus(tokens, starts, starts))
    assert found == run_dir.fingerprint(Corpus(tokens.copy(), starts, starts))
    for index in (0, 2**19, 2**20 - 1):
        other = tokens.copy()
        other[index] = -1
        assert run_dir.fingerprint(Corpus(other, starts, starts)) != found
    assert run_dir.fingerprint(Corpus(tokens.astype(np.int64), starts, starts)) != found


def test_model_configs_of_older_runs_have_a_field_more():
    """Theirs is not compared when they are resumed."""
    settings = {"model": config_to_dict(RUN.model), "data": {"source": "de"}}
    saved = {"model": settings["model"] | {"source": "{}"}, "data": {"source": "de"}}
    assert run_dir.with_old_names(settings, saved) == saved
    assert config_from_dict(saved["model"]) == RUN.model
    other = settings | {"model": settings["model"] | {"num_layers": 77}}
    assert run_dir.with_old_names(other, saved) != saved


def test_old_names_are_translated_in_both_directions():
    for config in (RUN, FinetuneConfig(pretrained="a"), TranslateConfig(
            presets.transformer_base(), "de", "en", 10, Path("b"), "data")):
        settings = run_dir.to_json(config)
        old = run_dir.with_old_names(settings)
        assert old != settings
        assert run_dir.with_present_names(old) == settings
        assert run_dir.with_old_names(settings, saved=settings) == settings
        assert run_dir.with_old_names(settings, saved=old) == old
