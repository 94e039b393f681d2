"""The documentation runs: Python blocks of every README from a fresh interpreter, and the examples
of docstrings; and its limits: lines of the README and of the scripts."""

import doctest
import importlib
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import transformer_jax

ROOT = Path(__file__).parents[1]
MARKDOWN = sorted(path for path in [
    *ROOT.glob("*.md"), *ROOT.glob("transformer_jax/**/*.md"), *ROOT.glob("experiments/**/*.md"),
    *ROOT.glob("colab/*.md"), *ROOT.glob("tests/endurance/*.md")])
BLOCKS = [pytest.param(block, id=f"{path.relative_to(ROOT)}-{i}")
          for path in MARKDOWN
          for i, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), re.S))]
MODULES = sorted(module.name for module in pkgutil.walk_packages(
    transformer_jax.__path__, "transformer_jax.") if not module.name.endswith("__main__"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_runs_from_a_fresh_interpreter(block, devices, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices),
                   "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, env=environment,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_readmes_have_blocks():
    assert len(BLOCKS) >= 4
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed


@pytest.mark.parametrize("path", sorted(ROOT.glob("experiments/*.py")), ids=lambda path: path.name)
def test_scripts_only_call_the_library(path):
    assert len(path.read_text().splitlines()) <= 60


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_of_readmes_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), f"{path.name} links to {link}, which is missing"


@pytest.mark.parametrize("room", sorted(path.parent.name for path in
                                        (ROOT / "transformer_jax").glob("*/__init__.py")))
def test_the_map_names_every_file(room):
    text = (ROOT / "transformer_jax" / "README.md").read_text()
    files = {path.stem for path in (ROOT / "transformer_jax" / room).glob("*.py")} - {"__init__"}
    assert f"`{room}/`" in text
    missing = sorted(name for name in files if not re.search(rf"`{name}`", text))
    assert not missing, f"transformer_jax/README.md does not name {room}/: {', '.join(missing)}"
