"""From a docstring to sentences: markup, code and tables go, the words stay."""

import re
from collections.abc import Iterator

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
    """The prose of a docstring or a text file in reStructuredText: paragraphs of sentences."""
    found = ([s for s in sentences(_plain(unit)) if is_prose(s)] for unit in _units(text))
    return [unit for unit in found if unit]


def _units(text: str) -> Iterator[str]:
    """Paragraphs and list items as single lines, without doctests, literal blocks, signatures."""
    literal_under = None  # indentation of the paragraph whose "::" opened a literal block
    for block in re.split(r"\n\s*\n", text.expandtabs()):
        lines = [line.rstrip() for line in block.split("\n") if line.strip()]
        if not lines:
            continue
        indent = _indent(lines[0])
        if literal_under is not None and indent > literal_under:
            continue
        literal_under = indent if lines[-1].endswith("::") else None
        unit: list[str] = []
        for line in lines:
            if line.lstrip().startswith((">>>", "...", "$ ", "% ")):
                break  # its output goes on to the end of the block
            if _RULE.match(line) or _DIRECTIVE.match(line) or _SIGNATURE.match(line):
                starts, line = True, ""
            else:
                starts = bool(_ITEM.match(line) or _FIELD.match(line))
            if starts and unit:
                yield " ".join(unit)
                unit = []
            if line:
                unit.append(_ITEM.sub("", line).strip())
        if unit:
            yield " ".join(unit)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


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


def _plain(unit: str) -> str:
    for pattern, replacement in _MARKUP:
        unit = pattern.sub(replacement, unit)
    return unit.strip()


# Sentences ----------------------------------------------------------------------------------------

# Written with a full stop that does not end a sentence, though a capital may follow.
_ABBREVIATION = re.compile(
    r"e\.g|i\.e|cf|vs|dr|mrs?|ms|prof|st|nos?|figs?|secs?|ch|vol|pp?|eq|approx|esp|resp|incl|viz|al"
    r"|inc|ltd|jr|sr|jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec",
    re.IGNORECASE,
)
# A full stop with its closing quotes or brackets, white space, and what may open a sentence.
_END = re.compile(r"[.!?]+[\"')\]]*\s+(?=[\"'(\[]*[A-Z0-9_]|[\"'(\[]*[a-z_]\w*(?:\.\w+)*\()")


def sentences(paragraph: str) -> list[str]:
    """Splits a paragraph of one line into sentences.

    A sentence ends at a full stop, question or exclamation mark before white space and a capital,
    a digit, or a call such as `f()`; not behind an abbreviation, an initial or a list's number,
    nor inside names such as `os.path`.
    """
    found, begin = [], 0
    for end in _END.finditer(paragraph):
        if not _goes_on(paragraph[begin : end.start()], paragraph[end.start()]):
            found.append(paragraph[begin : end.end()].strip())
            begin = end.end()
    return [s for s in (*found, paragraph[begin:].strip()) if s]


def _goes_on(before: str, mark: str) -> bool:
    if mark != ".":
        return False
    word = before.rsplit(None, 1)[-1] if before.split() else ""
    word = word.lstrip("\"'([{-")
    initial = len(word) == 1 and word.isupper()
    number = word.isdigit() and len(before.split()) == 1
    return bool(_ABBREVIATION.fullmatch(word)) or initial or number


# Words --------------------------------------------------------------------------------------------

_WORD = re.compile(r"^[\"'(\[]*[A-Za-z][A-Za-z]*(?:['/-][A-Za-z]+)*[\"')\]]*[.,;:!?]*[\"')]*$")
MAX_WORDS = 150  # longer "sentences" are lists or tables that escaped


def is_prose(sentence: str) -> bool:
    """At least three words, most of them English rather than code, begun by a letter or quote."""
    tokens = sentence.split()
    words = sum(bool(_WORD.match(token)) for token in tokens)
    return 3 <= len(tokens) <= MAX_WORDS and words >= max(2, 0.65 * len(tokens))


def running_text(prose: list[list[str]]) -> str:
    """Sentences of a paragraph on one line, one paragraph a line."""
    return "\n".join(" ".join(paragraph) for paragraph in prose)


def sentence_lines(prose: list[list[str]]) -> str:
    """One sentence a line, a blank line between paragraphs."""
    return "\n\n".join("\n".join(paragraph) for paragraph in prose)


