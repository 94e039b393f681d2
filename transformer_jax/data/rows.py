"""One row of an annotated data set as a canonical example, and labels as numbers."""

import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data.known_datasets import Columns
from transformer_jax.data.sources import Example

# Kind -> the columns that it needs, and those that it may have besides "id". Instead of "answers"
# a question may have "answer" and "start".
NEEDS = {
    "classification": ("text", "label"),
    "regression": ("text", "label"),
    "multiple_choice": ("choices", "label"),
    "token_classification": ("words", "tags"),
    "question_answering": ("question", "context", "answers"),
    "seq2seq": ("source", "target"),
}
MAY_HAVE = {"classification": ("text_b",), "regression": ("text_b",), "multiple_choice": ("text",),
            "question_answering": ("answer", "start")}
CANONICAL = tuple(dict.fromkeys(
    ["id", *(name for names in (*NEEDS.values(), *MAY_HAVE.values()) for name in names)]))


class BadRow(ValueError):
    """A row that is no example but may be left out; `reason` says of what sort it is."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


NO_LABEL = "no label"  # annotators did not agree, or the split keeps its labels secret

# Labels -------------------------------------------------------------------------------------------


class Labels(NamedTuple):
    """Names of the classes, and the class of each value that stands in the data."""

    names: tuple[str, ...]
    number: Mapping[str, int]
    declared: bool

    def __call__(self, value: Any) -> int:
        """Raises ValueError if no class has the value, BadRow if it says that there is none."""
        word = as_word(value)
        if word in self.number:
            return self.number[word]
        if not word:
            raise BadRow("empty label", "the label is empty; write one")
        if self.declared and word in ("-1", "-"):
            raise BadRow(NO_LABEL, f"the label {word!r} stands for none")
        shown = ", ".join(self.number if len(self.number) <= 20 else list(self.number)[:20])
        raise ValueError(f"label {word!r} is not among the training labels {shown}; "
                         "mend the row, or the label names")


def as_word(value: Any) -> str:
    """How a label is written: 1, 1.0 and "1" alike, True as "true", None and NaN as ""."""
    value = plain(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def declare(
    names: Sequence[str] | Mapping[str, str], class_names: Sequence[str] | None = None
) -> Labels:
    """Classes of these names, or of what each value stands for: `{"1": "neutral", ...}`.

    Args:
        class_names: of the source, if its labels are numbers of classes with names. `names` are
            then other names for them, in the same order, or by their names.

    Raises:
        ValueError: fewer than two classes, a name twice, or not as many as the source has.
    """
    if isinstance(names, Mapping):
        words = {as_word(key): str(name) for key, name in names.items()}
        unique = tuple(dict.fromkeys(words.values()))
        number = {word: unique.index(name) for word, name in words.items()}
        if class_names is not None:
            number |= {str(i): number[name] for i, name in enumerate(class_names)
                       if name in number}
        return Labels(unique, number, True)
    unique = tuple(map(str, names))
    if isinstance(names, str) or len(set(unique)) < max(len(unique), 2):
        raise ValueError(f"label_names is {names!r}; give at least 2 names, all different")
    if class_names is not None and len(class_names) != len(unique):
        raise ValueError(f"label_names has {len(unique)} names, but the source {len(class_names)} "
                         f"classes: {', '.join(class_names)}")
    number = {name: i for i, name in enumerate(unique)}
    if class_names is not None or not any(_is_integer(name) for name in unique):
        number |= {str(i): i for i in range(len(unique))}
    return Labels(unique, number, True)


def infer(values: Iterable[Any]) -> Labels:
    """Classes of the values that occur, in order: of numbers if all are, else of words."""
    words = {as_word(value) for value in values} - {""}
    numbers = all(map(_is_integer, words))
    names = tuple(sorted(words, key=int) if numbers else sorted(words))
    return Labels(names, {name: i for i, name in enumerate(names)}, False)


def are_scores(values: Iterable[Any]) -> bool:
    """Whether all labels are numbers and not all of them whole: those of a regression. Empty ones
    say nothing."""
    try:
        numbers = [float(word) for word in map(as_word, values) if word]
    except ValueError:
        return False
    return all(map(math.isfinite, numbers)) and not all(map(float.is_integer, numbers))


def _is_integer(word: str) -> bool:
    return word.removeprefix("-").isdecimal()


# Columns ------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """NumPy's scalars and arrays as Python's."""
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def cell(row: Example, column: str) -> Any:
    """What stands in a column; "a.b" is the item "b" of the dict in column "a".

    Raises:
        ValueError: there is no such column; near ones and all there are are listed.
    """
    found: Any = row
    for part in [column] if column in row else column.split("."):
        if not isinstance(found, Mapping) or part not in found:
            near = difflib.get_close_matches(column, row, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}; " if near else ""
            raise ValueError(f"no column {column!r}; {hint}it has {', '.join(map(repr, row))}")
        found = found[part]
    return plain(found)


def text(row: Example, column: str | Sequence[str], *, may_be_empty: bool = False) -> str:
    """Text of a column, or of several with spaces between."""
    parts = [cell(row, one) for one in ([column] if isinstance(column, str) else column)]
    joined = " ".join(str(part) for part in parts if part is not None and str(part).strip())
    if not joined and not may_be_empty:
        raise BadRow("empty text", f"the text in column {column!r} is empty; write some, "
                                   "or leave such rows out by on_bad='drop'")
    return joined


def _items(row: Example, column: str | Sequence[str]) -> list:
    """A list: of a column that holds one, of the words of a text, or of several columns."""
    if not isinstance(column, str):
        return [cell(row, one) for one in column]
    found = cell(row, column)
    if isinstance(found, Mapping):
        raise ValueError(f"column {column!r} holds a dict; name what is in it, such as "
                         f"{f'{column}.{next(iter(found), None)}'!r}")
    if not isinstance(found, (str, list, tuple)):
        raise ValueError(f"column {column!r} holds {found!r}; give a list")
    return found.split() if isinstance(found, str) else list(found)


# Kinds --------------------------------------------------------------------------------------------

Number = Callable[[Any], float]


def _classification(row: Example, columns: Columns, number: Number) -> Example:
    example: Example = {"text": text(row, columns["text"])}
    if "text_b" in columns:
        example["text_b"] = text(row, columns["text_b"])
    return {**example, "label": number(cell(row, columns["label"]))}


def _choices(row: Example, column: str | Sequence[str]) -> list[str]:
    """The choices in a column that holds a list, as JSON too, or in several columns."""
    found = cell(row, column) if isinstance(column, str) else None
    if isinstance(found, str):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list):
            raise ValueError(f"column {column!r} holds the text {cell(row, column)!r}; give a list "
                             'such as ["yes", "no"], or name a column for each choice')
    else:
        found = _items(row, column)
    return ["" if choice is None else str(choice) for choice in found]


def _multiple_choice(row: Example, columns: Columns, number: Number) -> Example:
    choices = _choices(row, columns["choices"])
    if len(choices) < 2:
        raise ValueError(f"{len(choices)} choices in {columns['choices']!r}; give at least 2")
    if not all(map(str.strip, choices)):
        raise BadRow("empty text", f"one of the choices {choices} is empty; write some")
    label = number(cell(row, columns["label"]))
    if label >= len(choices):
        raise ValueError(f"label {label} of {len(choices)} choices; count from 0")
    context = text(row, columns["text"], may_be_empty=True) if "text" in columns else ""
    return {"text": context, "choices": choices, "label": label}


def choice_number(value: Any) -> int:
    """0 for 0, "0" or "A".

    Raises:
        ValueError: it is neither a number nor a letter.
    """
    word = as_word(value)
    if word in ("", "-1"):
        raise BadRow(NO_LABEL, f"the label {word!r} stands for none")
    if len(word) == 1 and "A" <= word <= "Z":
        return ord(word) - ord("A")
    if not word.isdecimal():
        raise ValueError(f"label {word!r} names no choice; give its number from 0, or its letter")
    return int(word)


def _token_classification(row: Example, columns: Columns, number: Number) -> Example:
    words = [str(word) for word in _items(row, columns["words"])]
    tags = _items(row, columns["tags"])
    if not words or not all(map(str.strip, words)):
        raise BadRow("empty text", f"no word, or an empty one, in {columns['words']!r}")
    if len(words) != len(tags):
        raise ValueError(f"{len(words)} words but {len(tags)} tags; give each word one")
    return {"words": words, "tags": [number(tag) for tag in tags]}


def _question_answering(row: Example, columns: Columns, number: Number) -> Example:
    del number
    context = text(row, columns["context"])
    answers = _answers(row, columns)
    for answer in answers:
        wanted, start = answer["text"], answer["start"]
        found = context[max(start, 0):max(start, 0) + len(wanted)]
        if start < 0 or not wanted or found != wanted:
            raise BadRow("answer not in its context", (
                f"the answer {wanted!r} does not stand at {start} of the context, but {found!r}; "
                "mend its start, or leave such rows out by on_bad='drop'"))
    return {"question": text(row, columns["question"]), "context": context, "answers": answers}


def _answers(row: Example, columns: Columns) -> list[dict]:
    if "answers" not in columns:
        answer = text(row, columns["answer"], may_be_empty=True)
        return [{"text": answer, "start": _start(cell(row, columns["start"]))}] if answer else []
    found = cell(row, columns["answers"]) or []
    try:
        if isinstance(found, Mapping):  # lists side by side
            starts = found["answer_start" if "answer_start" in found else "start"]
            pairs = list(zip(plain(found["text"]), plain(starts), strict=True))
        else:
            pairs = [(one["text"], one["answer_start" if "answer_start" in one else "start"])
                     for one in found]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the answers are {found}; give a list of {{'text', 'start'}}, or a list "
                         "'text' and one as long of 'answer_start'") from None
    return [{"text": str(answer), "start": _start(start)} for answer, start in pairs]


def _start(value: Any) -> int:
    word = as_word(value)
    if not _is_integer(word):
        raise ValueError(f"the answer's start is {word!r}; give the number of its first character")
    return int(word)


def _seq2seq(row: Example, columns: Columns, number: Number) -> Example:
    del number
    return {side: text(row, columns[side]) for side in ("source", "target")}


READERS = {
    "classification": _classification,
    "regression": _classification,
    "multiple_choice": _multiple_choice,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
    "seq2seq": _seq2seq,
}


def canonical(kind: str, row: Example, columns: Columns, number: Number) -> Example:
    """The example of a row.

    Args:
        columns: canonical names of `kind`, and "id" if the set has one, -> columns of the row.
        number: the class, score or choice that a label stands for.

    Raises:
        BadRow: it may be left out: an empty text, no label, an answer that is not in its context.
        ValueError: a column is missing, or a value is not what it should be.
    """
    example = READERS[kind](row, columns, number)
    has_id = columns.get("id") in row  # validation may lack it
    return {"id": cell(row, columns["id"]), **example} if has_id else example


def score(low: float, high: float) -> Number:
    """Reads the label of a regression.

    Raises:
        ValueError: it is no number from `low` to `high`.
    """
    def read(value: Any) -> float:
        word = as_word(value)
        if not word:
            raise BadRow("empty label", "the label is empty; write one")
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {word!r} is not a number; mend the row")
        if not low <= number <= high:
            raise ValueError(f"label {number} is outside the range {low} to {high}; "
                             "mend the row, or the label_range")
        return number

    return read
