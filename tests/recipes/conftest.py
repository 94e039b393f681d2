"""Runs of two training steps, shared by the tests of all recipes."""

import functools

import configs
import pytest
from small_configs import shrink

from transformer_jax.recipes.pretraining import PretrainConfig, pretrain


@pytest.fixture(scope="session")
def sentences(tmp_path_factory) -> str:
    """The path of a text file of 30 documents."""
    path = tmp_path_factory.mktemp("data") / "input.txt"
    lines = [f"Document {d} says in sentence {s} that {d} times {s} is {d * s}."
             for d in range(30) for s in range(6)]
    path.write_text("\n\n".join("\n".join(lines[i : i + 6]) for i in range(0, len(lines), 6)))
    return str(path)


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory, sentences):
    """A function from the name of a config to the folder of its run, which is trained once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def run(name):
        config = configs.load(PretrainConfig)[name][1]
        pretrain(shrink(config, folder / name, data=sentences))
        return folder / name

    return run
