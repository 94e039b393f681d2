"""The raw documentation: docstrings of the standard library, and pydoc's topics.

The library's source files are parsed, never imported: quick, safe, and the same on every platform
that ships them.
"""

import ast
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Folders of tests, tools, and data in the form of code. Folders whose names are no identifiers,
# such as site-packages and lib-dynload, are not of the library either.
SKIPPED = frozenset((
    "__pycache__", "ensurepip", "idle_test", "lib2to3", "pydoc_data", "test", "tests", "turtledemo",
))


class Docstring(NamedTuple):
    """`module` is dotted ("email.message"), `name` what it documents in there ("" the module)."""

    module: str
    name: str
    text: str


def docstrings(root: Path | None = None) -> Iterator[Docstring]:
    """All docstrings under the folder of the standard library, in order of file and line."""
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in _source_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old files have odd escapes
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for name, text in _documented(tree, ""):
            yield Docstring(module, name, text)


def _source_files(folder: Path) -> Iterator[Path]:
    """Python files in order of name; a folder comes after the files beside it."""
    inside = sorted(folder.iterdir())
    for path in inside:
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path
    for path in inside:
        if path.is_dir() and path.name.isidentifier() and path.name not in SKIPPED:
            yield from _source_files(path)


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            inner = getattr(child, "name", None)
            named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            yield from _documented(child, f"{name}.{inner}".strip(".") if named else name)


def topics() -> dict[str, str]:
    """Name and text of pydoc's topics: chapters of the language reference, as `help()` shows."""
    try:
        return dict(sorted(importlib.import_module("pydoc_data.topics").topics.items()))
    except ImportError:
        return {}
