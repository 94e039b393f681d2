"""Reads the documentation of this Python installation: `pydoc_data.topics` and docstrings.

Source files are parsed, never imported: importing runs code, and some modules open windows.
"""

import ast
import functools
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Tests and what an installation adds later are not documentation of the standard library.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__",
                   "lib2to3", "ensurepip", "turtledemo", "config"}
MIN_PARAGRAPH_WORDS = 3

# Sentences end at . ! ? before a capital, unless the period belongs to one of these.
_ABBREVIATION = re.compile(r"(?:\b(?:e\.g|i\.e|etc|vs|cf|approx|resp|no|Dr|Mr|St)|\b[A-Z])\.$", re.I)
_SENTENCE_END = re.compile(r"""(?<=[.!?])["')\]]*\s+(?=["'(\[*`]?[A-Z])""")
_DOCTEST = re.compile(r"^\s*(>>>|\.\.\.)(\s|$)")
_RULER = re.compile(r"^\s*[-=~^*+|_.#]{3,}[\s\-=~^*+|_.#]*$")
_DIRECTIVE = re.compile(r"^\s*\.\. [\w-]+::.*$")
_ROLE = re.compile(r":[\w:+-]+:`~?([^`]*)`")
_MARKUP = re.compile(r"``|\*\*")


class Docstring(NamedTuple):
    module: str  # dotted name, "json.decoder"
    text: str  # as `inspect.cleandoc` leaves it


def sentences(paragraph: str) -> list[str]:
    """A paragraph's sentences. Periods inside names and after abbreviations end nothing."""
    found, begin = [], 0
    for match in _SENTENCE_END.finditer(paragraph):
        if not _ABBREVIATION.search(paragraph[begin : match.start()]):
            found.append(paragraph[begin : match.end()].strip())
            begin = match.end()
    return [s for s in [*found, paragraph[begin:].strip()] if s]


def paragraphs(text: str) -> list[str]:
    """Paragraphs of prose on one line each: no interactive sessions, rulers or markup signs."""
    kept, block, in_session = [], [], False
    for line in [*text.splitlines(), ""]:
        in_session = bool(_DOCTEST.match(line)) or (in_session and line.strip() != "")
        if line.strip() and not in_session and not _RULER.match(line):
            block.append(_DIRECTIVE.sub("", line))
        elif block:
            joined = _MARKUP.sub("", _ROLE.sub(r"\1", " ".join(" ".join(block).split())))
            # Tables and listings have few words among their signs.
            words = re.findall(r"[A-Za-z]{2,}", joined)
            letters = sum(map(str.isalpha, joined))
            if len(words) >= MIN_PARAGRAPH_WORDS and letters >= 0.6 * len(joined.replace(" ", "")):
                kept.append(joined)
            block = []
    return kept


def prose(text: str) -> str:
    """One sentence a line, a blank line between paragraphs: the form BERT's pairs are read from."""
    return "\n\n".join("\n".join(sentences(p)) for p in paragraphs(text))


@functools.cache
def docstrings() -> tuple[Docstring, ...]:
    """Every docstring of the standard library, by module and then in the order of the source.

    Raises:
        FileNotFoundError: this installation has no library sources, or no docstrings in them.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    found = [Docstring(module, text) for module, text in _walk(library)]
    if not found:
        raise FileNotFoundError(f"{library} holds no documented .py files; use a Python installed "
                                "with its library sources")
    return tuple(found)


def _walk(library: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).with_suffix("").parts
        if any(p in SKIPPED_FOLDERS or p.startswith(("config-", "test_")) for p in parts):
            continue
        try:
            module = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):  # deliberately broken samples
            continue
        name = ".".join(p for p in parts if p != "__init__")
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        nodes = [n for n in ast.walk(module) if isinstance(n, kinds)]
        for node in sorted(nodes, key=lambda n: getattr(n, "lineno", 0)):
            text = ast.get_docstring(node, clean=False)
            if text and text.strip():
                yield name, inspect.cleandoc(text)


@functools.cache
def topics() -> dict[str, str]:
    """The language reference as `pydoc` shows it: topic -> text."""
    from pydoc_data.topics import topics as table

    return dict(sorted(table.items()))


def share(key: str) -> float:
    """A stable number in [0, 1) for a text or a name: which split it belongs to."""
    return int.from_bytes(hashlib.sha1(key.encode("utf-8", "replace")).digest()[:6]) / 2**48
