"""The command `convert`."""

import json

import pytest

pytestmark = pytest.mark.slow


def test_converted_run_generates_the_same_text(saved, run, tmp_path):
    status, out, _ = run("convert", saved / "gpt", tmp_path / "out")
    assert status == 0 and "model.safetensors" in out and "config.json" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    texts = [run("generate", folder, "the cat", "--max-new-tokens", "8")[1]
             for folder in (saved / "gpt", tmp_path / "out")]
    assert texts[0] == texts[1]


def test_a_run_has_one_head_to_convert(saved, run, tmp_path):
    status, _, error = run("convert", saved / "gpt", tmp_path / "out", "--task", "classification")
    assert status == 2 and "has one head; omit --task" in error
    assert not (tmp_path / "out").exists()
