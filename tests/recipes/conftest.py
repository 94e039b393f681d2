"""Runs of two training steps, shared by the tests of all recipes."""

import functools

import configs
import jax
import pytest
from small_configs import shrink

from transformer_jax.models import build_model, init_params
from transformer_jax.pretrained import load_run
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


@pytest.fixture(scope="session")
def exportable(pretrained):
    """A loaded (model, params, tokenizer) of a family that the Hugging Face format has."""
    run = load_run(pretrained("bert_python_docs"))
    config = run.model.config.replace(norm_first=False, positions="learned", norm_epsilon=1e-12)
    model = build_model(config)
    return model, init_params(model, jax.random.key(0)), run.tokenizer
