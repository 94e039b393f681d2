"""Conversion of a row of a labeled dataset, with any column names, to an example."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from transformer_jax.data.known_datasets import Columns
from transformer_jax.data.labels import (
    DroppableRowError,
    EncodeLabel,
    is_integer,
    label_text,
    to_python,
)
from transformer_jax.data.sources import Example
from transformer_jax.errors import did_you_mean

REQUIRED_FIELDS = {
    "classification": ("text", "label"),
    "regression": ("text", "label"),
    "multiple_choice": ("choices", "label"),
    "token_classification": ("words", "tags"),
    "question_answering": ("question", "context", "answers"),
    "seq2seq": ("source", "target"),
}
"""Task type -> the fields that need a column. For question answering, the fields "answer" and
"start" may be given instead of "answers"."""
OPTIONAL_FIELDS = {
    "classification": ("text_b",),
    "regression": ("text_b",),
    "multiple_choice": ("text",),
    "question_answering": ("answer", "start"),
}
"""Task type -> the fields that may have a column, besides "id"."""
FIELDS = tuple(dict.fromkeys(["id", *(
    name for names in (*REQUIRED_FIELDS.values(), *OPTIONAL_FIELDS.values()) for name in names)]))
"""All fields."""


def to_example(
    task_type: str, row: Example, columns: Columns, encode_label: EncodeLabel
) -> Example:
    """Converts a row to an example (see `datasets` for the fields of each task type).

    Args:
        task_type: a key of `REQUIRED_FIELDS`.
        row: the row.
        columns: column of each field of the task type, and of "id" if the dataset has ids.
        encode_label: function that encodes a label, tag or choice.

    Raises:
        DroppableRowError: the row may be left out: a text is empty, the label is missing, or an
            answer does not occur at its position in the context.
        ValueError: a column is missing, or a value is invalid.

    Example:
        >>> to_example("regression", {"sentence": "good", "score": "4"},
        ...            {"text": "sentence", "label": "score"}, float)
        {'text': 'good', 'label': 4.0}
    """
    example = CONVERTERS[task_type](row, columns, encode_label)
    has_id = columns.get("id") in row  # validation rows may have no id although training rows do
    return {"id": get_value(row, columns["id"]), **example} if has_id else example


# Columns ------------------------------------------------------------------------------------------


def get_value(row: Example, column: str) -> Any:
    """Returns the value of a column; "a.b" is the item "b" of the dict in column "a".

    Raises:
        ValueError: there is no such column; the message lists similar names and all columns.

    Example:
        >>> get_value({"question": {"stem": "Why?"}}, "question.stem")
        'Why?'
    """
    value: Any = row
    for key in [column] if column in row else column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"no column {column!r}; {did_you_mean(column, row, show_all=True)}")
        value = value[key]
    return to_python(value)


def get_text(row: Example, column: str | Sequence[str], *, may_be_empty: bool = False) -> str:
    """Returns the text of a column, or the texts of several columns joined by spaces.

    Raises:
        DroppableRowError: the text is empty, and `may_be_empty` is False.
        ValueError: there is no such column.
    """
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
    example: Example = {"text": get_text(row, columns["text"])}
    if "text_b" in columns:
        example["text_b"] = get_text(row, columns["text_b"])
    return {**example, "label": encode_label(get_value(row, columns["label"]))}


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
        if not answer:
            return []
        return [{"text": answer, "start": _get_start(get_value(row, columns["start"]))}]
    answers = get_value(row, columns["answers"]) or []
    try:
        if isinstance(answers, Mapping):  # a dict of two lists, the texts and their starts
            starts = answers["answer_start" if "answer_start" in answers else "start"]
            pairs = list(zip(to_python(answers["text"]), to_python(starts), strict=True))
        else:
            pairs = [(answer["text"], answer["answer_start" if "answer_start" in answer
                                             else "start"]) for answer in answers]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the answers are {answers}; give a list of {{'text', 'start'}}, or a "
                         "list 'text' and a list 'answer_start' of the same length") from None
    return [{"text": str(text), "start": _get_start(start)} for text, start in pairs]


def _get_start(value: Any) -> int:
    start = label_text(value)
    if not is_integer(start):
        raise ValueError(f"the start of an answer is {start!r}; give the index of its first "
                         "character")
    return int(start)


def _seq2seq(row: Example, columns: Columns, encode_label: EncodeLabel) -> Example:
    del encode_label
    return {side: get_text(row, columns[side]) for side in ("source", "target")}


CONVERTERS = {
    "classification": _classification,
    "regression": _classification,
    "multiple_choice": _multiple_choice,
    "token_classification": _token_classification,
    "question_answering": _question_answering,
    "seq2seq": _seq2seq,
}
"""Task type -> function that converts a row."""
