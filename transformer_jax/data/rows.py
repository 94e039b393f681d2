"""Conversion of a row of a labeled dataset, with any columns and labels, to an example."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data.known_datasets import Columns
from transformer_jax.errors import did_you_mean

Example = dict[str, Any]
EncodeLabel = Callable[[Any], float]
"""Function that encodes the label of a row as a class id, a score, or the index of a choice."""
NO_LABEL = "no label"
"""`DroppableRowError.reason` of a row without a label, because annotators did not agree or because
the labels are not published."""


class DroppableRowError(ValueError):
    """An invalid row that a caller may drop instead of failing; dropped rows are counted by
    `reason`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


# Labels -------------------------------------------------------------------------------------------


def label_text(value: Any) -> str:
    """Returns the text of a label, by which labels are compared: the same for 1, 1.0 and "1".

    Example:
        >>> label_text(1.0), label_text(" 1 "), label_text(True), label_text(None)
        ('1', '1', 'true', '')
    """
    value = _to_python(value)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _to_python(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _is_integer(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


class LabelEncoder(NamedTuple):
    """Callable that maps the labels in the data to class ids.

    Attributes:
        names: names of the classes, in the order of their ids.
        class_ids: text of a label in the data -> class id.
        is_declared: whether the classes were declared by the user or the dataset. If so, the labels
            -1 and "-" mean that a row has no label. If not, they were inferred from the labels.
    """

    names: tuple[str, ...]
    class_ids: Mapping[str, int]
    is_declared: bool

    def __call__(self, value: Any) -> int:
        label = label_text(value)
        if label in self.class_ids:
            return self.class_ids[label]
        _check_not_empty(label)
        if self.is_declared and label in ("-1", "-"):
            raise DroppableRowError(NO_LABEL, f"the label {label!r} means that there is no label")
        known = ", ".join(list(self.class_ids)[:20])
        raise ValueError(f"label {label!r} is not among the training labels {known}; "
                         "fix the row, or give label_names")


def _check_not_empty(label: str) -> None:
    if not label:
        raise DroppableRowError("empty label", "the label is empty; add one")


def encoder_from_names(
    names: Sequence[str] | Mapping[str, str], class_names: Sequence[str] | None = None
) -> LabelEncoder:
    """Returns the encoder of declared classes.

    Args:
        names: names of the classes, in the order of their ids; or label in the data -> name of its
            class, `{"1": "neutral", ...}`.
        class_names: class names of the dataset, if its labels are integers with class names.
            `names` then renames these classes: a sequence in the same order, or a mapping whose
            keys are the class names.

    Example:
        >>> encode = encoder_from_names({"1": "negative", "2": "positive"})
        >>> encode.names, encode("2")
        (('negative', 'positive'), 1)
    """
    if isinstance(names, Mapping):
        name_of = {label_text(key): str(name) for key, name in names.items()}
        unique = tuple(dict.fromkeys(name_of.values()))
        if len(unique) < 2:
            raise ValueError(f"label_names is {dict(names)!r}; give at least 2 classes")
        class_ids = {label: unique.index(name) for label, name in name_of.items()}
        class_ids |= {str(i): class_ids[name] for i, name in enumerate(class_names or ())
                      if name in class_ids}
        return LabelEncoder(unique, class_ids, True)
    unique = tuple(map(str, names))
    if isinstance(names, str) or len(set(unique)) < max(len(unique), 2):
        raise ValueError(f"label_names is {names!r}; give at least 2 names, all different")
    if class_names is not None and len(class_names) != len(unique):
        raise ValueError(f"label_names has {len(unique)} names, but the dataset has "
                         f"{len(class_names)} classes: {', '.join(class_names)}")
    class_ids = {name: i for i, name in enumerate(unique)}
    if class_names is not None or not any(map(_is_integer, unique)):
        class_ids |= {str(i): i for i in range(len(unique))}
    return LabelEncoder(unique, class_ids, True)


def encoder_from_values(values: Iterable[Any]) -> LabelEncoder:
    """Returns an encoder whose classes are the labels in the data, sorted as numbers or as text.

    Example:
        >>> encoder_from_values(["pos", "neg", "pos"]).names
        ('neg', 'pos')
    """
    labels = {label_text(value) for value in values} - {""}
    names = tuple(sorted(labels, key=int if all(map(_is_integer, labels)) else None))
    return LabelEncoder(names, {name: i for i, name in enumerate(names)}, False)


def are_scores(values: Iterable[Any]) -> bool:
    """Returns whether all labels that are not empty are numbers, and one is not an integer."""
    try:
        numbers = [float(label) for label in map(label_text, values) if label]
    except ValueError:
        return False
    return all(map(math.isfinite, numbers)) and not all(map(float.is_integer, numbers))


def score_encoder(low: float, high: float) -> EncodeLabel:
    """Returns the function that converts a label to a float from `low` to `high`."""
    def encode(value: Any) -> float:
        label = label_text(value)
        _check_not_empty(label)
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise ValueError(f"label {label!r} is not a number; fix the row")
        if not low <= number <= high:
            raise ValueError(f"label {number} is outside the range {low} to {high}; "
                             "fix the row, or change label_range")
        return number

    return encode


def encode_choice(value: Any) -> int:
    """Returns the index of a choice: 0 for the labels 0, "0" and "A"."""
    label = label_text(value)
    if label in ("", "-1"):
        raise DroppableRowError(NO_LABEL, f"the label {label!r} means that there is no label")
    if len(label) == 1 and "A" <= label <= "Z":
        return ord(label) - ord("A")
    if not label.isdecimal():
        raise ValueError(f"label {label!r} is not the index of a choice; give an index counted "
                         "from 0, or a letter from A")
    return int(label)


# Columns ------------------------------------------------------------------------------------------


def get_value(row: Example, column: str) -> Any:
    """Returns the value of a column; "a.b" is the item "b" of the dict in column "a".

    Example:
        >>> get_value({"question": {"stem": "Why?"}}, "question.stem")
        'Why?'
    """
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"no column {column!r}; {did_you_mean(column, row, show_all=True)}")
        value = value[key]
    return _to_python(value)


def get_text(row: Example, column: str | Sequence[str], *, may_be_empty: bool = False) -> str:
    """Returns the text of a column, or the texts of several columns joined by spaces."""
    parts = [get_value(row, name) for name in ([column] if isinstance(column, str) else column)]
    if unsupported := [part for part in parts if isinstance(part, (Mapping, list, tuple, bytes))]:
        raise ValueError(f"column {column!r} holds a {type(unsupported[0]).__name__}, "
                         f"{str(unsupported[0])[:100]}; name a column of texts")
    text = " ".join(str(part) for part in parts if part is not None and str(part).strip())
    if not text and not may_be_empty:
        raise DroppableRowError("empty text", f"the text in column {column!r} is empty; add text, "
                                              "or leave out the row (load_dataset does so with "
                                              "on_bad_rows='drop')")
    return text


def _get_list(row: Example, column: str | Sequence[str]) -> list:
    """Returns the list in a column, the words of its text, or the values of several columns."""
    if not isinstance(column, str):
        return [get_value(row, name) for name in column]
    value = get_value(row, column)
    if isinstance(value, Mapping):
        raise ValueError(f"column {column!r} holds a dict; name one of its items, such as "
                         f"{f'{column}.{next(iter(value), None)}'!r}")
    if not isinstance(value, (str, list, tuple)):
        raise ValueError(f"column {column!r} holds {value!r}; give a list")
    return value.split() if isinstance(value, str) else list(value)


# Task types ---------------------------------------------------------------------------------------


def _classification(row: Example, columns: Columns, encode_label: EncodeLabel) -> Example:
    texts = {field: get_text(row, columns[field]) for field in ("text", "text_b")
             if field == "text" or field in columns}
    return {**texts, "label": encode_label(get_value(row, columns["label"]))}


def _multiple_choice(row: Example, columns: Columns, encode_label: EncodeLabel) -> Example:
    choices = _get_choices(row, columns["choices"])
    if len(choices) < 2:
        raise ValueError(f"there are {len(choices)} choices in {columns['choices']!r}; give at "
                         "least 2")
    if not all(map(str.strip, choices)):
        raise DroppableRowError("empty text", f"one of the choices {choices} is empty; add text")
    label = encode_label(get_value(row, columns["label"]))
    if label >= len(choices):
        raise ValueError(f"label {label} is out of range for {len(choices)} choices, counted "
                         "from 0")
    context = get_text(row, columns["text"], may_be_empty=True) if "text" in columns else ""
    return {"text": context, "choices": choices, "label": label}


def _get_choices(row: Example, column: str | Sequence[str]) -> list[str]:
    """Returns the choices: a list or a JSON list in one column, or the texts of several columns."""
    choices = get_value(row, column) if isinstance(column, str) else None
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except (ValueError, RecursionError):
            choices = None
        if not isinstance(choices, list):
            raise ValueError(f"column {column!r} holds the text {get_value(row, column)!r}; give a "
                             'list such as ["yes", "no"], or name a column for each choice')
    else:
        choices = _get_list(row, column)
    return ["" if choice is None else str(choice) for choice in choices]


def _token_classification(row: Example, columns: Columns, encode_label: EncodeLabel) -> Example:
    words = [str(word) for word in _get_list(row, columns["words"])]
    tags = _get_list(row, columns["tags"])
    if not words or not all(map(str.strip, words)):
        raise DroppableRowError("empty text",
                                f"column {columns['words']!r} has no words or an empty word")
    if len(words) != len(tags):
        raise ValueError(f"there are {len(words)} words but {len(tags)} tags; give one tag for "
                         "each word")
    return {"words": words, "tags": [encode_label(tag) for tag in tags]}


def _question_answering(row: Example, columns: Columns, encode_label: EncodeLabel) -> Example:
    del encode_label
    context = get_text(row, columns["context"])
    answers = _get_answers(row, columns)
    for answer in answers:
        expected, start = answer["text"], answer["start"]
        found = context[max(start, 0):max(start, 0) + len(expected)]
        if start < 0 or not expected or found != expected:
            raise DroppableRowError("answer not in its context", (
                f"the answer {expected!r} is not at character {start} of the context, which has "
                f"{found!r} there; fix its start, or drop such rows with on_bad_rows='drop'"))
    return {"question": get_text(row, columns["question"]), "context": context, "answers": answers}


def _get_answers(row: Example, columns: Columns) -> list[dict]:
    if "answers" not in columns:
        answer = get_text(row, columns["answer"], may_be_empty=True)
        pairs = [(answer, get_value(row, columns["start"]))] if answer else []
    else:
        answers = get_value(row, columns["answers"]) or []
        try:
            if isinstance(answers, Mapping):  # a dict of two lists, the texts and their starts
                starts = answers["answer_start" if "answer_start" in answers else "start"]
                pairs = list(zip(_to_python(answers["text"]), _to_python(starts), strict=True))
            else:
                pairs = [(answer["text"], answer["answer_start" if "answer_start" in answer
                                                 else "start"]) for answer in answers]
        except (KeyError, TypeError, ValueError):
            raise ValueError(
                f"the answers are {answers}; give a list of {{'text', 'start'}}, or a list 'text' "
                "and a list 'answer_start' of the same length") from None
    for _, start in pairs:
        if not _is_integer(label_text(start)):
            raise ValueError(f"the start of an answer is {label_text(start)!r}; give the index of "
                             "its first character")
    return [{"text": str(text), "start": int(label_text(start))} for text, start in pairs]


def _seq2seq(row: Example, columns: Columns, encode_label: EncodeLabel) -> Example:
    del encode_label
    return {side: get_text(row, columns[side]) for side in ("source", "target")}


class TaskFields(NamedTuple):
    """Function that converts a row to an example of a task type, and the fields it reads.

    A required field needs a column; for question answering, "answer" and "start" may be given
    instead of "answers". An optional field may have one, as may "id".
    """

    convert: Callable[[Example, Columns, EncodeLabel], Example]
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()


TASKS = {
    "classification": TaskFields(_classification, ("text", "label"), ("text_b",)),
    "regression": TaskFields(_classification, ("text", "label"), ("text_b",)),
    "multiple_choice": TaskFields(_multiple_choice, ("choices", "label"), ("text",)),
    "token_classification": TaskFields(_token_classification, ("words", "tags")),
    "question_answering": TaskFields(
        _question_answering, ("question", "context", "answers"), ("answer", "start")),
    "seq2seq": TaskFields(_seq2seq, ("source", "target")),
}


def to_example(
    task_type: str, row: Example, columns: Columns, encode_label: EncodeLabel
) -> Example:
    """Converts a row to an example (see `datasets` for the fields of each task type).

    `columns` has the column of each field, and of "id" if the dataset has ids.

    Raises:
        DroppableRowError: the row may be left out: a text is empty, the label is missing, or an
            answer does not occur at its position in the context.
        ValueError: a column is missing, or a value is invalid.

    Example:
        >>> to_example("regression", {"sentence": "good", "score": "4"},
        ...            {"text": "sentence", "label": "score"}, float)
        {'text': 'good', 'label': 4.0}
    """
    example = TASKS[task_type].convert(row, columns, encode_label)
    has_id = columns.get("id") in row  # validation rows may have no id although training rows do
    return {"id": get_value(row, columns["id"]), **example} if has_id else example
