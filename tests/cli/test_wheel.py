"""The installed package, outside the checkout: every command, and a short program."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIZES = ["--model.num-layers", "1", "--model.d-model", "16", "--model.num-heads", "2",
         "--model.mlp-dim", "16", "--model.max-length", "32"]
PROGRAM = """
from pathlib import Path

import transformer_jax
from transformer_jax import finetune, load_pretrained

rows = [{"text": f"the {word} is here", "label": kind}
        for word, kind in (("cat", "animal"), ("sea", "water")) for _ in range(8)]
result = finetune("bert", rows, validation=rows, trainable="lora:2", num_steps=2, max_length=16)
prediction, = result.predict(["the cat"])
assert prediction["label"] in ("animal", "water")
result.export("exported")
model, params, tokenizer = load_pretrained("exported", "classification")
print(model.num_classes, tokenizer.encode("the cat") == result.tokenizer.encode("the cat"))
print(Path(transformer_jax.__file__).parents[1])
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Installs the wheel into a folder; returns the environment variables of its programs.

    The dependencies are those of the running interpreter. A module that cannot be imported takes
    the place of PyTorch, which is not a dependency, but which tensorboardX imports where it is
    installed.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source, site = folder / "source", folder / "site"
    source.mkdir()
    for name in ("transformer_jax", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    run_checked([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index",
                 "--wheel-dir", str(folder), str(source)], folder)
    (wheel,) = folder.glob("transformer_jax-*.whl")
    run_checked([*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)],
                folder)
    (site / "torch.py").write_text("raise ImportError('PyTorch is not a dependency')\n")
    return {**os.environ, "PYTHONPATH": str(site), "JAX_PLATFORMS": "cpu",
            "PATH": f"{site / 'bin'}{os.pathsep}{os.environ['PATH']}"}


def run_checked(command, folder, env=None):
    result = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True,
                            check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_wheel_in_an_empty_folder(environment, tmp_path):
    def run(*arguments):
        return run_checked(["transformer-jax", *arguments], tmp_path, environment)

    (tmp_path / "corpus.txt").write_text("the cat is here\nthe sea is big\n\n" * 40)
    rows = [f"the {word} is {place}\t{kind}" for word, kind in (("cat", "animal"), ("sea", "water"))
            for place in ("big", "small", "here", "there")]
    (tmp_path / "topics.tsv").write_text("\n".join(["sentence\tkind", *rows]) + "\n")
    columns = ["--data", "topics.tsv", "--columns", "text", "sentence", "label", "kind"]

    run("pretrain", "bert_tiny", "--data", "corpus.txt", "--out", "bert", "--num-steps", "2",
        "--model.vocab-size", "120", *SIZES)
    run("pretrain", "gpt2", "--data", "corpus.txt", "--out", "gpt", "--num-steps", "2",
        "--model.vocab-size", "280", *SIZES)
    run("finetune", "--pretrained", "bert", *columns, "--validation", "topics.tsv", "--num-steps",
        "2", "--max-length", "16", "--trainable", "head", "--out", "topics")
    assert "accuracy: " in run("evaluate", "topics", *columns)
    prediction = json.loads(run("predict", "topics", "the cat"))
    assert prediction["label"] in ("animal", "water")
    assert run("generate", "gpt", "the cat", "--max-new-tokens", "4").startswith("the cat")
    assert run("fill", "bert", "the [MASK] is here").startswith("the [MASK] is here\n  ")
    assert "animal" in run("classify", "topics", "the cat")

    (tmp_path / "program.py").write_text(PROGRAM)
    printed = run_checked([sys.executable, "program.py"], tmp_path, environment)
    assert printed.splitlines()[-2:] == ["2 True", environment["PYTHONPATH"]]
