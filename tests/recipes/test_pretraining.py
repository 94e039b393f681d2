"""Pre-training runs of a few steps: every config, resumption, and errors of the settings."""

import dataclasses
import json
import shutil

import configs
import jax
import numpy as np
import pytest
from small_configs import shrink

from transformer_jax import tree
from transformer_jax.models import presets
from transformer_jax.pretrained import load_run
from transformer_jax.recipes.pretraining import PretrainConfig, pretrain, pretrain_config


def make_config(name: str, out, data: str, **changes) -> PretrainConfig:
    return shrink(configs.load(PretrainConfig)[name][1], out, data=data, **changes)


@pytest.mark.parametrize("name", configs.load(PretrainConfig))
def test_two_steps_of_every_config(name, pretrained):
    out = pretrained(name)
    saved = json.loads((out / "results.json").read_text())
    assert np.isfinite(saved["metrics"]["held_out"]["loss"])
    assert saved["config"]["num_steps"] == 2 and saved["versions"]["jax"] and saved["device"]
    assert (out / "loss.png").stat().st_size > 5000
    assert list((out / "events").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_scanning_the_layers_gives_the_same_run(pretrained, sentences, tmp_path):
    config = make_config("char_shakespeare", tmp_path / "run", sentences, scan_layers=True)
    scanned = pretrain(config)["metrics"]
    unrolled = json.loads((pretrained("char_shakespeare") / "results.json").read_text())["metrics"]
    np.testing.assert_allclose(scanned["held_out"]["loss"], unrolled["held_out"]["loss"], rtol=1e-4)
    paths = [tree.flatten_paths(load_run(folder).params).keys()
             for folder in (tmp_path / "run", pretrained("char_shakespeare"))]
    assert paths[0] == paths[1]


@pytest.mark.slow
def test_the_same_call_resumes(tmp_path, sentences):
    """A run that lost everything after step 5 ends with the same bits."""
    config = make_config("gpt_python_docs", tmp_path / "run", sentences, num_steps=10,
                         save_every=5)
    history = pretrain(config)["metrics"]["history"]
    uninterrupted = jax.tree.leaves(load_run(config.out).params)
    replayed = pretrain(dataclasses.replace(config, replay_step=10))
    assert replayed["loss"] == [row["loss"] for row in history if "loss" in row][-1]
    assert (config.out / "checkpoints" / "replayed_batch_step10.npz").is_file()
    shutil.rmtree(config.out / "checkpoints" / "10")
    pretrain(config)
    for a, b in zip(uninterrupted, jax.tree.leaves(load_run(config.out).params)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_a_run_with_other_settings_is_not_resumed(tmp_path, sentences):
    config = make_config("gpt_python_docs", tmp_path, sentences)
    pretrain(config)
    other = dataclasses.replace(config, num_steps=4, seed=1)
    with pytest.raises(ValueError, match=r"settings/num_steps.*2.*4.*settings/seed.*0.*1"):
        pretrain(other)
    results = pretrain(dataclasses.replace(other, allow_config_mismatch=True))
    assert results["metrics"]["history"][-1]["step"] == 4


def test_unknown_objective_and_missing_run(tmp_path, sentences):
    config = make_config("gpt_python_docs", tmp_path / "run", sentences)
    with pytest.raises(ValueError, match=r"'sorting'.*Choose one of causal_lm, mlm_nsp"):
        pretrain(dataclasses.replace(config, objective="sorting"))
    for step in (0, 3):
        with pytest.raises(ValueError, match=f"replay_step is {step}; it must be from 1 to 2"):
            pretrain(dataclasses.replace(config, replay_step=step))
    with pytest.raises(FileNotFoundError, match=r"--out folder"):
        load_run(tmp_path / "nowhere")


@pytest.mark.parametrize("preset", presets.PRESETS)
def test_every_preset_has_a_config(preset):
    config = pretrain_config(preset, num_steps=50)
    assert config.optimizer.warmup_steps == 5
    assert config.optimizer.make(config.num_steps).init is not None
    family = preset.partition("_")[0].rstrip("12")
    assert config.objective == {"gpt": "causal_lm", "bert": "mlm_nsp"}.get(family, "denoising")


def test_unknown_preset_and_setting():
    with pytest.raises(ValueError, match="bert_base"):
        pretrain_config("bert_bas")
    with pytest.raises(ValueError, match="did you mean max_length"):
        pretrain_config("bert_base", max_lenght=64)
