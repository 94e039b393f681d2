"""Imports go down only: the rooms of the house, and what each may import of ours."""

import ast
from pathlib import Path

import pytest

import transformer_jax

PACKAGE = Path(transformer_jax.__file__).parent
LONGEST = 400  # lines; a file that wants more has two subjects

# From the ground up. A room may always import itself; a new one must be given its place here.
MODELS = {"nn", "models"}
GROUND = {"tree", "sharding"}
USE = GROUND | MODELS | {"objectives", "data", "finetune", "train"}
MAY_IMPORT = {
    "__init__": {"pretrained"},
    "__main__": {"cli"},
    "host": set(),
    "json_files": set(),
    "digests": set(),
    "draw": set(),
    "predictions": set(),
    "tree": set(),
    "sharding": {"tree"},
    "nn": GROUND,
    "models": {"nn"},
    "presets": {"models"},
    "objectives": MODELS | {"sharding"},
    "data": {"objectives", "tree", "digests"},
    "finetune": GROUND | MODELS | {"objectives", "json_files"},
    "train": GROUND | {"objectives", "measure", "digests", "host"},
    "evaluate": USE,
    "generate": USE,
    "pretrained": USE | {"json_files", "digests"},
    "hlo": set(),
    "distributed": set(),
    "measure": set(),
    "chips": {"measure"},
    "plan": USE | {"hlo", "chips"},
    "plan_table": {"plan"},
    "report": USE | {"draw", "generate", "pretrained"},
    "cli_runs": {"chips", "draw", "plan", "plan_table", "presets", "report"},
    "cli": USE | {"evaluate", "generate", "pretrained", "cli_runs", "host", "predictions"},
}
# Host code: NumPy, never jnp, which would compile in the loader.
NO_JAX = {"data", "digests", "draw", "json_files", "predictions"}


def imported(source: str, package: tuple[str, ...]) -> list[str]:
    """Dotted names of all modules that a file imports, wherever in the file; `package` is where
    it lives, for relative imports."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = [*above, *([node.module] if node.module else [])]
            names += [".".join([*base, alias.name]) for alias in node.names]
    return names


def violations(source: str, path: str) -> list[str]:
    """What a file at `path`, relative to the package, may not import."""
    parts = Path(path).with_suffix("").parts
    room = parts[0]
    if room not in MAY_IMPORT:
        return [f"{room} has no floor: give it one in MAY_IMPORT"]
    allowed = MAY_IMPORT[room] | {room}
    found = []
    for name in imported(source, ("transformer_jax", *parts[:-1])):
        top, *rest = name.split(".")
        if top == "experiments" or (room in NO_JAX and top in ("jax", "jaxlib", "flax", "optax")):
            found.append(f"{path} imports {name}")
        # What is no room, such as the version, is the package's own and for all.
        target = rest[0] if top == "transformer_jax" and rest else None
        if target in MAY_IMPORT and target not in allowed:
            found.append(f"{path} imports {name}")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES)
def test_imports_go_down(path):
    assert violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize("path", FILES)
def test_files_have_one_subject(path):
    assert len((PACKAGE / path).read_text().splitlines()) <= LONGEST


def test_floors_have_no_circle():
    """Whatever a room may import may not import the room, at any number of steps."""
    def reach(room, seen):
        for below in MAY_IMPORT[room] - seen:
            seen |= {below}
            reach(below, seen)
        return seen

    for room in MAY_IMPORT:
        assert room not in reach(room, set()), room


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/gpt.py", "from transformer_jax.objectives import losses"),
        ("models/gpt.py", "from transformer_jax import objectives"),
        ("models/gpt.py", "import transformer_jax.train.step"),
        ("models/gpt.py", "def f():\n    from transformer_jax.train import step"),
        ("models/gpt.py", "from ..train import step"),
        ("models/gpt.py", "from .. import train"),
        ("nn/layers.py", "from transformer_jax.models.config import Config"),
        ("objectives/causal_lm.py", "from transformer_jax.data import pipeline"),
        ("presets.py", "from transformer_jax.objectives import losses"),
        ("presets.py", "from . import generate"),
        ("train/step.py", "from transformer_jax.models import GPT"),
        ("data/pipeline.py", "import jax.numpy as jnp"),
        ("data/pipeline.py", "from jax import numpy"),
        ("generate.py", "from experiments import quickstart"),
        ("attic.py", ""),
        ("attic/chest.py", ""),
    ],
)
def test_the_test_sees(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/gpt.py", "from transformer_jax.nn.layers import Linear"),
        ("models/gpt.py", "from .config import GPTConfig"),
        ("models/gpt.py", "from ..nn import layers"),
        ("data/pipeline.py", "from jaxtyping import Int"),
        ("data/pipeline.py", "from transformer_jax.objectives import layout"),
        ("train/loop.py", "from transformer_jax import __version__, sharding"),
    ],
)
def test_the_test_lets_pass(path, source):
    assert violations(source, path) == []
