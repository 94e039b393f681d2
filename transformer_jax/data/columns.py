"""Inference of the task type, the columns and the label encoders of a labeled dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.data import rows
from transformer_jax.data.known_datasets import Columns, DatasetConfig
from transformer_jax.data.rows import EncodeLabel, LabelEncoder
from transformer_jax.data.splits import Split
from transformer_jax.errors import did_you_mean

USUAL_COLUMNS = {
    "text": ("text", "sentence", "sentence1", "question1", "premise"),
    "text_b": ("text_b", "sentence2", "question2", "hypothesis"),
    "words": ("words", "tokens"),
    "tags": ("tags", "ner_tags"),
    "source": ("source", "document", "dialogue", "article"),
    "target": ("target", "summary", "highlights"),
}
"""Field of an example -> the usual names of its column; the first one that the data has is used.
For all other fields, the name of the column is the name of the field."""


def resolve_columns(
    train: Split, config: DatasetConfig, known: DatasetConfig | None
) -> tuple[str, dict[str, str | tuple[str, ...]]]:
    """Returns the task type, and the column of each field for which the data has a column.

    The columns of `config` take precedence over those of the `known` dataset that this one is, or
    is a copy of (see `DatasetConfig.like`), and these over the usual names.

    Example:
        >>> row = {"sentence": "good", "label": "pos"}
        >>> resolve_columns(Split([row], str), DatasetConfig(), None)
        ('classification', {'text': 'sentence', 'label': 'label'})
    """
    row, task_type = train.rows[0], config.task_type
    given = {field: tuple(c.split("+") if isinstance(c, str) else c)  # names of several columns
             if not isinstance(c, str) or ("+" in c and c not in row) else c
             for field, c in config.columns.items()}
    if known is not None and task_type in (None, known.task_type):
        task_type, column_of = known.task_type, dict(known.columns)
    else:
        usual = {field: next((c for c in USUAL_COLUMNS.get(field, (field,)) if c in row), None)
                 for task in rows.TASKS.values()
                 for field in ("id", *task.required, *task.optional)}
        column_of = {field: c for field, c in usual.items() if c}
    if "text" in given and "text_b" not in given:
        column_of.pop("text_b", None)  # the caller chose a single text
    column_of |= given
    task_type = task_type or _infer_task_type(train, column_of)
    task = rows.TASKS[task_type]
    allowed = {*task.required, *task.optional, "id"}
    if unknown := sorted(set(given) - allowed):
        raise ValueError(f"columns has the unknown field {unknown[0]!r}; "
                         f"{did_you_mean(unknown[0], sorted(allowed), show_all=True)}")
    required = set(task.required)
    if {"answer", "start"} <= column_of.keys() and "answers" not in column_of:
        required = required - {"answers"} | {"answer", "start"}
    if missing := sorted(required - column_of.keys()):
        raise ValueError(f"{train.describe(0)}: no column for {', '.join(missing)} of {task_type}; "
                         f"set it in columns; the data has {', '.join(map(repr, row))}")
    return task_type, {field: c for field, c in column_of.items() if field in allowed}


def _infer_task_type(train: Split, column_of: Mapping[str, Any]) -> str:
    if ("question" in column_of and "context" in column_of
            and {"answers", "answer"} & column_of.keys()):
        return "question_answering"
    for task_type in ("multiple_choice", "token_classification", "classification", "seq2seq"):
        if set(rows.TASKS[task_type].required) <= column_of.keys():
            break
    else:
        raise ValueError(
            f"{train.describe(0)}: the task type cannot be inferred from the columns "
            f"{', '.join(map(repr, train.rows[0]))}; give task_type, and columns such as "
            "{'text': ..., 'label': ...}")
    if (task_type == "classification" and column_of["label"] not in train.class_names
            and rows.are_scores(train.column(column_of["label"]))):
        return "regression"
    return task_type


def make_encoders(
    task_type: str, columns: Columns, splits: Sequence[Split], names: Any, validation_names: Any,
    label_range: tuple[float, float] | None,
) -> list[EncodeLabel]:
    """Returns the functions that encode the labels of the training and the validation split.

    `names` are label names, as in `rows.encoder_from_names`. None uses the class names of the data,
    or else the labels in the training split. `validation_names` are the same for the validation
    split; pass the object `names` itself if both splits have the same rows.
    """
    if task_type == "regression":
        low, high = label_range or (-np.inf, np.inf)
        if not low < high:
            raise ValueError(f"label_range is {label_range}; give the lowest label before the "
                             "highest")
        return [rows.score_encoder(low, high)] * 2
    if task_type in ("question_answering", "seq2seq"):
        return [rows.encode_choice] * 2  # not called: these task types have no labels
    if task_type == "multiple_choice" and names is None:
        return [rows.encode_choice] * 2
    column = columns["tags" if task_type == "token_classification" else "label"]
    class_names = [split.class_names.get(column) for split in splits]
    if names is None and class_names[0] is None:
        values = splits[0].column(column)
        if task_type == "token_classification":
            values = [tag for tags in values
                      for tag in (tags.split() if isinstance(tags, str) else tags)]
        train = rows.encoder_from_values(values)
        if len(train.names) < 2:
            raise ValueError(f"{splits[0].describe(0)}: all labels in column {column!r} are "
                             f"{train.names[0] if train.names else ''!r}; give at least 2 classes")
    else:
        train = rows.encoder_from_names(names or class_names[0], class_names[0])
    if validation_names is names:
        if class_names[0] == class_names[1]:
            return [train] * 2
        validation_names = train.names
    validation = rows.encoder_from_names(validation_names, class_names[1])
    if unknown := sorted(set(validation.names) - set(train.names)):
        raise ValueError(f"the validation split has a class {unknown[0]!r} that is missing in the "
                         f"training split, which has {', '.join(train.names)}")
    class_ids = {label: train.names.index(validation.names[i])
                 for label, i in validation.class_ids.items()}
    return [train, LabelEncoder(train.names, class_ids, True)]
