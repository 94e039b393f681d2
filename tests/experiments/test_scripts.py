"""Scripts only parse the command line and call the library."""

import dataclasses
from pathlib import Path

import configs
import pytest
import tyro

from transformer_jax.recipes.finetuning import FinetuneConfig
from transformer_jax.recipes.sweep import SweepConfig

SCRIPTS = sorted(Path(configs.__file__).parents[1].glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_have_at_most_60_lines(path):
    assert len(path.read_text().splitlines()) <= 60


def test_flags_of_nested_configs_have_no_prefix():
    config = tyro.cli(configs.flat(FinetuneConfig, "dataset", "training"), args=[
        "--pretrained", "gpt2", "--data", "reviews.csv", "--columns", "text", "review",
        "--trainable", "lora:8", "--max-length", "128", "--mesh.fsdp", "2"])
    assert isinstance(config, FinetuneConfig)
    assert config.dataset.data == "reviews.csv" and config.dataset.columns == {"text": "review"}
    assert config.training.max_length == 128 and config.mesh.fsdp == 2


def test_flags_change_a_config():
    loaded = configs.load_flat(SweepConfig, "dataset")
    config = tyro.extras.overridable_config_cli(loaded, args=[
        "sst2", "--data", "other", "--training.optimizer.peak-lr", "0.5"])
    default = configs.load(SweepConfig)["sst2"][1]
    assert config.dataset == dataclasses.replace(default.dataset, data="other")
    assert config.training.optimizer.peak_lr == 0.5 and config.trainable == default.trainable
