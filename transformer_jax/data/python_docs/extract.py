"""Extraction of the docstrings of the standard library and of pydoc's topics.

Source files are parsed and never imported, which is fast and safe, and gives the same result on
every platform with these files.
"""

import ast
import importlib
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Folders of tests, tools, and data stored as code. Folders whose names are not Python identifiers,
# such as site-packages and lib-dynload, do not belong to the library and are skipped as well.
SKIPPED = frozenset((
    "__pycache__", "ensurepip", "idle_test", "lib2to3", "pydoc_data", "test", "tests", "turtledemo",
))


class Docstring(NamedTuple):
    """A docstring and the module, class or function that it documents.

    Attributes:
        module: dotted name of the module, as "email.message".
        name: dotted name of the class or function inside the module; "" for the module itself.
        text: the docstring.
    """

    module: str
    name: str
    text: str


def docstrings(root: Path | None = None) -> Iterator[Docstring]:
    r"""Yields all docstrings of a folder, ordered by file and line.

    Args:
        root: the folder; the standard library if None.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> _ = (root / "m.py").write_text("class A:\n    'Text of A.'")
        >>> list(docstrings(root))
        [Docstring(module='m', name='A', text='Text of A.')]
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    for path in _source_files(root):
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old files contain invalid escape sequences
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue
        for name, text in _walk_docstrings(tree, ""):
            yield Docstring(module, name, text)


def _source_files(folder: Path) -> Iterator[Path]:
    """Yields Python files sorted by name, those of a folder before those of its subfolders."""
    entries = sorted(folder.iterdir())
    for path in entries:
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path
    for path in entries:
        if path.is_dir() and path.name.isidentifier() and path.name not in SKIPPED:
            yield from _source_files(path)


def _walk_docstrings(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        text = ast.get_docstring(node)
        if text:
            yield name, text
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            child_name = getattr(child, "name", None)
            is_named = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            yield from _walk_docstrings(
                child, f"{name}.{child_name}".strip(".") if is_named else name)


def topics() -> dict[str, str]:
    """Returns the names and texts of pydoc's topics: the language-reference chapters of `help()`.

    Empty if this Python installation has none.
    """
    try:
        return dict(sorted(importlib.import_module("pydoc_data.topics").topics.items()))
    except ImportError:
        return {}
