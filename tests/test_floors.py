"""The import order of the package: a room imports only the rooms below it, directly or through
others; and the size limits of files and functions."""

import ast
import functools
from pathlib import Path

import pytest

import transformer_jax

PACKAGE = Path(transformer_jax.__file__).parent
MAX_LINES = 400  # of a file; a longer one has two subjects

# Room -> the rooms that its files may import. A room may always import itself.
LOOSE = {"errors", "storage", "tree", "sharding", "metrics", "distributed"}
LOW = LOOSE - {"metrics", "distributed"}
MODELS = {"nn", "models"}
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "errors": set(),
    "storage": {"errors"},
    "tree": {"errors"},
    "metrics": {"errors"},
    "distributed": {"errors"},
    "sharding": {"tree", "errors"},
    "data": {"storage", "errors"},
    "nn": {"sharding", "tree"},
    "models": {"nn", "errors"},
    "train": LOW | {"distributed"},
    "objectives": MODELS | {"data", "sharding", "tree", "errors"},
    "finetuning": LOW | MODELS | {"objectives"},
    "generation": LOW | MODELS | {"finetuning"},
    "pretrained": LOW | MODELS | {"data", "finetuning", "generation", "train"},
    "report": LOW | MODELS | {"data", "generation", "pretrained"},
    "planner": LOW | MODELS | {"objectives", "train"},
    "recipes": LOOSE | MODELS | {"data", "objectives", "finetuning", "generation", "pretrained",
                                 "report", "train"},
    "cli": LOOSE | MODELS | {"data", "objectives", "finetuning", "generation", "pretrained",
                             "planner", "recipes", "report", "train"},
}
# Host code in NumPy: these rooms import none of the packages below, directly or through others.
HOST_ONLY = {"data", "storage", "errors", "metrics"}
DEVICE_PACKAGES = {"jax", "jaxlib", "flax", "optax", "orbax"}


def imported(source: str, package: tuple[str, ...]) -> list[str]:
    """Dotted names of all modules that a file imports, wherever in the file; `package` is the
    package of the file, for relative imports."""
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
    """The imports that a file at `path`, relative to the package, may not have."""
    parts = Path(path).with_suffix("").parts
    room = parts[0]
    if room not in MAY_IMPORT:
        return [f"{room} is not in MAY_IMPORT: add it with the rooms that it may import"]
    allowed = MAY_IMPORT[room] | {room}
    found = []
    for name in imported(source, ("transformer_jax", *parts[:-1])):
        top, *rest = name.split(".")
        if top == "experiments" or (room in HOST_ONLY and top in DEVICE_PACKAGES):
            found.append(f"{path} imports {name}")
        target = rest[0] if top == "transformer_jax" and rest else None
        # Lazy names of the package itself hide the room that they come from.
        if target is not None and target != "__version__" and target not in allowed:
            found.append(f"{path} imports {name}")
    return found


FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@functools.cache
def needs(path: str) -> frozenset[str]:
    """All top-level packages and all files of the package that a file imports, through any number
    of files."""
    found, left = set(), [path]
    while left:
        at = left.pop()
        if at in found:
            continue
        found.add(at)
        package = ("transformer_jax", *Path(at).parts[:-1])
        for name in imported((PACKAGE / at).read_text(), package):
            top, *rest = name.split(".")
            if top != "transformer_jax":
                found.add(f"{top}:")
                continue
            for end in range(len(rest), 0, -1):
                inner = "/".join(rest[:end])
                candidates = (f"{inner}.py", f"{inner}/__init__.py")
                file = next((name for name in candidates if name in FILES), None)
                if file:
                    left.append(file)
                    break
    return frozenset(found)


@pytest.mark.parametrize("path", FILES)
def test_imports_go_down(path):
    assert violations((PACKAGE / path).read_text(), path) == []


@pytest.mark.parametrize(
    "path", [path for path in FILES if Path(path).with_suffix("").parts[0] in HOST_ONLY])
def test_host_code_needs_no_device_package_even_through_others(path):
    assert not {f"{name}:" for name in DEVICE_PACKAGES} & needs(path)


@pytest.mark.parametrize("path", FILES)
def test_files_have_one_subject(path):
    assert len((PACKAGE / path).read_text().splitlines()) <= MAX_LINES


def test_the_table_names_only_rooms_that_exist():
    rooms = {Path(path).with_suffix("").parts[0] for path in FILES}
    assert set(MAY_IMPORT) == rooms
    assert set().union(*MAY_IMPORT.values()) <= rooms


def test_the_order_has_no_cycle():
    """A room that another may import, at any number of steps, may not import that one."""
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
        ("models/gpt.py", "from transformer_jax.objectives import cross_entropy"),
        ("models/gpt.py", "from transformer_jax import objectives"),
        ("models/gpt.py", "import transformer_jax.train.step"),
        ("models/gpt.py", "def f():\n    from transformer_jax.train import step"),
        ("models/gpt.py", "from ..train import step"),
        ("models/gpt.py", "from .. import train"),
        ("models/gpt.py", "from transformer_jax import generate"),
        ("nn/layers.py", "from transformer_jax.models.config import Config"),
        ("data/packing.py", "from transformer_jax.objectives import input_format"),
        ("data/packing.py", "import jax.numpy as jnp"),
        ("data/packing.py", "from jax import numpy"),
        ("train/step.py", "from transformer_jax.models import GPT"),
        ("recipes/sweep.py", "from experiments import quickstart"),
        ("recipes/sweep.py", "from transformer_jax.cli import main"),
        ("attic.py", ""),
        ("attic/chest.py", ""),
    ],
)
def test_violations_are_found(path, source):
    assert len(violations(source, path)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/gpt.py", "from transformer_jax.nn.layers import Linear"),
        ("models/gpt.py", "from .config import GPTConfig"),
        ("models/gpt.py", "from ..nn import layers"),
        ("data/packing.py", "from jaxtyping import Int"),
        ("objectives/causal_lm.py", "from transformer_jax.data import packing"),
        ("train/loop.py", "from transformer_jax import __version__, sharding"),
    ],
)
def test_allowed_imports_pass(path, source):
    assert violations(source, path) == []
