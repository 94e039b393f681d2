"""English sentences of the standard library's docstrings, without markup, code and tables.

Source files are parsed and never imported, which is fast and safe, and gives the same result on
every platform with these files.
"""

import ast
import importlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

# Source files -------------------------------------------------------------------------------------

# Folders of tests, tools, and data stored as code. Folders whose names are not Python identifiers,
# such as site-packages and lib-dynload, do not belong to the library and are skipped as well.
_SKIPPED = frozenset((
    "__pycache__", "ensurepip", "idle_test", "lib2to3", "pydoc_data", "test", "tests", "turtledemo",
))
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def docstrings(root: Path | None = None) -> Iterator[tuple[str, str]]:
    r"""Yields (module, docstring) of a folder, by default the standard library, ordered by file.

    Example:
        >>> import tempfile
        >>> root = Path(tempfile.mkdtemp())
        >>> _ = (root / "m.py").write_text("class A:\n    'Text of A.'")
        >>> list(docstrings(root))
        [('m', 'Text of A.')]
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
        for text in _walk_docstrings(tree):
            yield module, text


def _source_files(folder: Path) -> Iterator[Path]:
    """Yields Python files sorted by name, those of a folder before those of its subfolders."""
    entries = sorted(folder.iterdir())
    for path in entries:
        if path.suffix == ".py" and not path.name.startswith("_sysconfigdata"):
            yield path
    for path in entries:
        if path.is_dir() and path.name.isidentifier() and path.name not in _SKIPPED:
            yield from _source_files(path)


def _walk_docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, _DOCUMENTED) and (text := ast.get_docstring(node)):
        yield text
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            yield from _walk_docstrings(child)


def topics() -> dict[str, str]:
    """Returns the texts of pydoc's topics, the language-reference chapters of `help()`, if any."""
    try:
        return dict(sorted(importlib.import_module("pydoc_data.topics").topics.items()))
    except ImportError:
        return {}


# Blocks and lines ---------------------------------------------------------------------------------

_RULE = re.compile(r"^\s*([^\w\s])(\1|[\s+|])*$")  # ====, ----, +---+
_DIRECTIVE = re.compile(r"^\s*\.\. +[\w-]+::.*$|^\s*\.\. *$|^\s*:\w+:\s*$")
_SIGNATURE = re.compile(
    r"^\s*(async |class |def |exception )?[\w.]+\(.*\)\s*(->\s*.+?)?:?\s*$"  # f(x, y) -> z
    r"|^\s*[\w.]+\s*=\s*\S+$"  # name=value
    r"|^\s*[\w.]*__\w+__\s*$"
)
_ITEM = re.compile(
    r"^\s*(?:[*+•-]|\(?\d+[.)]|\(?[a-z]\)|:(?:param|type|return|returns|raises?|rtype)[^:]*:)\s+"
)
_FIELD = re.compile(r"^\s*[\w*.]+(?:\s*\([^)]*\))?\s*(?::|--|–)\s+\S")  # name: text, name -- text


def paragraphs(text: str) -> list[list[str]]:
    r"""Returns the prose of a docstring or of a text in reStructuredText: paragraphs of sentences.

    List items count as paragraphs. Doctests, literal blocks, tables and signatures are left out.

    Example:
        >>> paragraphs("Join ``a`` and *b*. It is fast.\n\n>>> join(1, 2)\n3\n")
        [['Join a and b.', 'It is fast.']]
    """
    blocks = ([s for s in sentences(_strip_markup(block)) if is_prose(s)]
              for block in _blocks(text))
    return [block for block in blocks if block]


def _blocks(text: str) -> Iterator[str]:
    """Yields paragraphs and list items, each on one line, without code and signatures."""
    # Indent of the last paragraph if it ends with "::". Its literal block has a larger indent.
    literal_indent = None
    for chunk in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.rstrip() for line in chunk.split("\n") if line.strip()]
        if not lines:
            continue
        indent = len(lines[0]) - len(lines[0].lstrip())
        if literal_indent is not None and indent > literal_indent:
            continue
        literal_indent = indent if lines[-1].endswith("::") else None
        block: list[str] = []
        for line in lines:
            if line.lstrip().startswith((">>>", "...", "$ ", "% ")):
                break  # the rest of the chunk is code and its output
            if _RULE.match(line) or _DIRECTIVE.match(line) or _SIGNATURE.match(line):
                starts_block, line = True, ""
            else:
                starts_block = bool(_ITEM.match(line) or _FIELD.match(line))
            if starts_block and block:
                yield " ".join(block)
                block = []
            if line:
                block.append(_ITEM.sub("", line).strip())
        if block:
            yield " ".join(block)


# Markup -------------------------------------------------------------------------------------------

_MARKUP = (
    (re.compile(r":[\w:+-]+:`~?([^`<]+?)(?:\s*<[^`>]*>)?`"), r"\1"),  # :class:`name`
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`_*"), r"\1"),  # `text <link>`_
    (re.compile(r"`([^`']+)[`']_*"), r"\1"),
    (re.compile(r"(?<![\w*])(\*{1,2})(\w(?:[^*]*\w)?)\1(?![\w*])"), r"\2"),  # *emphasis*
    (re.compile(r"\s*\[\d+\]_?(?=[\s.,;:)]|$)"), ""),  # footnotes
    (re.compile(r"::(?=\s|$)"), ":"),
    (re.compile(r"\s+"), " "),
)


def _strip_markup(block: str) -> str:
    for pattern, replacement in _MARKUP:
        block = pattern.sub(replacement, block)
    return block.strip()


# Sentences ----------------------------------------------------------------------------------------

# Abbreviations whose period does not end a sentence even before a capital letter.
_ABBREVIATION = re.compile(
    r"e\.g|i\.e|cf|vs|dr|mrs?|ms|prof|st|nos?|figs?|secs?|ch|vol|pp?|eq|approx|esp|resp|incl|viz|al"
    r"|inc|ltd|jr|sr|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
# A sentence-final mark with closing quotes or brackets, white space, and a possible start of the
# next sentence.
_END = re.compile(r"[.!?]+[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9_]|[\"'(\[]*[a-z_]\w*(?:\.\w+)*\()")


def sentences(paragraph: str) -> list[str]:
    """Splits a paragraph on one line into sentences.

    A sentence ends at a period, question mark or exclamation mark that is followed by white space
    and a capital letter, a digit, or a call such as `f()`. It does not end after an abbreviation,
    an initial or the number of a list item, nor inside names such as `os.path`.

    Example:
        >>> sentences("Return x, e.g. Foo. See os.path. f() is called.")
        ['Return x, e.g. Foo.', 'See os.path.', 'f() is called.']
    """
    found, begin = [], 0
    for end in _END.finditer(paragraph):
        if not _is_abbreviation(paragraph[begin : end.start()], paragraph[end.start()]):
            found.append(paragraph[begin : end.end()].strip())
            begin = end.end()
    return [s for s in (*found, paragraph[begin:].strip()) if s]


def _is_abbreviation(before: str, mark: str) -> bool:
    """Returns whether a mark, after the sentence `before`, belongs to an abbreviation, an initial
    or the number of a list item."""
    if mark != ".":
        return False
    word = before.rsplit(None, 1)[-1] if before.split() else ""
    word = word.lstrip("\"'([{-")
    is_initial = len(word) == 1 and word.isupper()
    is_item_number = word.isdigit() and len(before.split()) == 1
    return bool(_ABBREVIATION.fullmatch(word)) or is_initial or is_item_number


# Words --------------------------------------------------------------------------------------------

_WORD = re.compile(r"^[\"'(\[]*[A-Za-z][A-Za-z]*(?:['/-][A-Za-z]+)*[\"')\]]*[.,;:!?]*[\"')]*$")
MAX_WORDS = 150  # longer "sentences" are lists or tables that were not recognized


def is_prose(sentence: str) -> bool:
    """Returns whether a sentence has at least three words, most of them English and not code.

    Example:
        >>> is_prose("Return the number of items."), is_prose("x = f(y) + 1")
        (True, False)
    """
    tokens = sentence.split()
    num_words = sum(bool(_WORD.match(token)) for token in tokens)
    return 3 <= len(tokens) <= MAX_WORDS and num_words >= max(2, 0.65 * len(tokens))


def running_text(prose: list[list[str]]) -> str:
    """Joins paragraphs of sentences into text with one paragraph per line."""
    return "\n".join(" ".join(paragraph) for paragraph in prose)


def sentence_lines(prose: list[list[str]]) -> str:
    """Joins paragraphs of sentences into text with one sentence per line and a blank line between
    paragraphs."""
    return "\n\n".join("\n".join(paragraph) for paragraph in prose)
