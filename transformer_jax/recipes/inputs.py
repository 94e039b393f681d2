"""Conversion of inputs of `prediction.predict` (texts, pairs, dicts, tables, files) to examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_jax.data import sources, splits
from transformer_jax.data.columns import USUAL_COLUMNS
from transformer_jax.recipes.task_encoder import TaskInfo

INPUT_FIELDS = {
    "classification": ("text", "text_b"), "regression": ("text", "text_b"),
    "multiple_choice": ("text", "choices"), "token_classification": ("words",),
    "question_answering": ("question", "context"), "seq2seq": ("source",)}
"""Task type -> the fields of an input, in the order of an input tuple."""
OPTIONAL_FIELDS = {"text_b"}
_TEXT_SUFFIX = ".txt"


def to_examples(task: TaskInfo, inputs: Any, columns: Mapping[str, str]) -> list[dict]:
    """Returns the inputs as examples of the task, with placeholders for their labels.

    Args:
        task: the task of the model.
        inputs: see `prediction.predict`.
        columns: field of the example -> column of the inputs. Other fields are read from their
            usual columns (`data.columns`).

    Raises:
        ValueError: there are no inputs, or an input does not fit the task.

    Example:
        >>> to_examples(TaskInfo("classification", ("no", "yes")), [("a", "b"), "c"], {})
        [{'text': 'a', 'text_b': 'b', 'label': 0}, {'text': 'c', 'label': 0}]
    """
    rows = _load_rows(inputs)
    if not rows:
        raise ValueError("there are 0 inputs; give at least 1")
    return [_to_example(task, row, columns, i) for i, row in enumerate(rows)]


def _load_rows(inputs: Any) -> list:
    """Returns a list with one str, tuple, list of words or dict for each input."""
    if isinstance(inputs, Path) or (isinstance(inputs, str) and _is_file(inputs)):
        if str(inputs).removesuffix(".gz").endswith(_TEXT_SUFFIX):
            texts = sources.load_text_files(inputs, document_separator="newline")
            return [example["text"] for example in texts]
        return list(sources.load_table(inputs))
    if isinstance(inputs, (str, tuple, Mapping)):
        return [inputs]
    if isinstance(inputs, list):
        return inputs
    rows = splits.from_table(inputs, "inputs").rows
    return [rows[i] for i in range(len(rows))]


def _is_file(text: str) -> bool:
    suffixes = (*sources.TABLE_SUFFIXES, _TEXT_SUFFIX)
    return text.removesuffix(".gz").endswith(suffixes) and Path(text).is_file()


def _to_example(
    task: TaskInfo, row: Any, columns: Mapping[str, str], i: int
) -> dict[str, Any]:
    fields = INPUT_FIELDS[task.task_type]
    if isinstance(row, Mapping):
        example = _from_dict((*fields, "id"), row, columns, i)
    elif task.task_type == "token_classification":
        example = {"words": row.split() if isinstance(row, str) else list(row)}
    elif isinstance(row, str):
        example = {fields[0]: row}
    elif isinstance(row, Sequence) and len(row) <= len(fields):
        example = dict(zip(fields, row))
    else:
        raise ValueError(f"input {i} is {row!r}; {task.task_type} takes {', '.join(fields)}")
    if missing := [f for f in fields if f not in example and f not in OPTIONAL_FIELDS]:
        raise ValueError(f"input {i} has no {', '.join(missing)}; {task.task_type} takes "
                         f"{', '.join(fields)}")
    placeholder = {"token_classification": {"tags": [0] * len(example.get("words", ()))},
                   "question_answering": {"answers": []}, "seq2seq": {"target": ""}}
    label = 0 if task.label_range is None else task.label_range[0]
    return example | placeholder.get(task.task_type, {"label": label})


def _from_dict(
    fields: Sequence[str], row: Mapping[str, Any], columns: Mapping[str, str], i: int
) -> dict[str, Any]:
    example = {}
    for field in fields:
        column = columns.get(field)
        if column is not None and column not in row:
            raise ValueError(f"input {i} has no column {column!r}; its columns are "
                             f"{', '.join(map(repr, row))}")
        names = (column,) if column else USUAL_COLUMNS.get(field, (field,))
        if (name := next((n for n in names if n in row), None)) is not None:
            example[field] = row[name]
    return example
