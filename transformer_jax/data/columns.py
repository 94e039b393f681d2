"""Inference of the task type, the columns and the label encoders of a labeled dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from transformer_jax.data import labels, rows
from transformer_jax.data.known_datasets import Columns, DatasetConfig
from transformer_jax.data.labels import EncodeLabel, LabelEncoder
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

    Args:
        train: the training split.
        config: description of the dataset; its columns take precedence over all others.
        known: description of the known dataset that this one is, or is a copy of (see
            `DatasetConfig.like`); None if there is none.

    Raises:
        ValueError: `config.columns` names a field that the task type does not have, a required
            field has no column, or the task type cannot be inferred.

    Example:
        >>> row = {"sentence": "good", "label": "pos"}
        >>> resolve_columns(Split([row], str), DatasetConfig(), None)
        ('classification', {'text': 'sentence', 'label': 'label'})
    """
    row, task_type = train.rows[0], config.task_type
    given = {field: _split_names(c, row) if isinstance(c, str) else tuple(c)
             for field, c in config.columns.items()}
    if known is not None and task_type in (None, known.task_type):
        task_type, column_of = known.task_type, dict(known.columns)
    else:
        usual = {field: next((c for c in USUAL_COLUMNS.get(field, (field,)) if c in row), None)
                 for field in rows.FIELDS}
        column_of = {field: c for field, c in usual.items() if c}
    if "text" in given and "text_b" not in given:
        column_of.pop("text_b", None)  # the caller chose a single text
    column_of |= given
    task_type = task_type or _infer_task_type(train, column_of)
    allowed = {*rows.REQUIRED_FIELDS[task_type], *rows.OPTIONAL_FIELDS.get(task_type, ()), "id"}
    if unknown := sorted(set(given) - allowed):
        raise ValueError(f"columns has the unknown field {unknown[0]!r}; "
                         f"{did_you_mean(unknown[0], sorted(allowed), show_all=True)}")
    required = set(rows.REQUIRED_FIELDS[task_type])
    if {"answer", "start"} <= column_of.keys() and "answers" not in column_of:
        required = required - {"answers"} | {"answer", "start"}
    if missing := sorted(required - column_of.keys()):
        raise ValueError(f"{train.describe(0)}: no column for {', '.join(missing)} of {task_type}; "
                         f"set it in columns; the data has {', '.join(map(repr, row))}")
    return task_type, {field: c for field, c in column_of.items() if field in allowed}


def _split_names(column: str, row: Mapping[str, Any]) -> str | tuple[str, ...]:
    """Returns the names of several columns that are joined by "+"."""
    return tuple(column.split("+")) if "+" in column and column not in row else column


def _infer_task_type(train: Split, column_of: Mapping[str, Any]) -> str:
    if ("question" in column_of and "context" in column_of
            and {"answers", "answer"} & column_of.keys()):
        return "question_answering"
    for task_type in ("multiple_choice", "token_classification", "classification", "seq2seq"):
        if set(rows.REQUIRED_FIELDS[task_type]) <= column_of.keys():
            break
    else:
        raise ValueError(
            f"{train.describe(0)}: the task type cannot be inferred from the columns "
            f"{', '.join(map(repr, train.rows[0]))}; give task_type, and columns such as "
            "{'text': ..., 'label': ...}")
    if (task_type == "classification" and column_of["label"] not in train.class_names
            and labels.are_scores(train.column(column_of["label"]))):
        return "regression"
    return task_type


def make_encoders(
    task_type: str, columns: Columns, splits: Sequence[Split], names: Any, validation_names: Any,
    label_range: tuple[float, float] | None,
) -> list[EncodeLabel]:
    """Returns the functions that encode the labels of the training and the validation split.

    Args:
        task_type: the task type.
        columns: column of each field.
        splits: the training and the validation split.
        names: label names, as in `labels.encoder_from_names`. None uses the class names of the
            data, or else the labels in the training split.
        validation_names: the same for the validation split. Pass the object `names` itself if both
            splits have the same labels.
        label_range: lowest and highest label of a regression; None allows any.

    Raises:
        ValueError: the training split has a single class, the validation split has a class that is
            missing in the training split, or `names` or `label_range` is invalid.
    """
    if task_type == "regression":
        low, high = label_range or (-np.inf, np.inf)
        if not low < high:
            raise ValueError(f"label_range is {label_range}; give the lowest label before the "
                             "highest")
        return [labels.score_encoder(low, high)] * 2
    if task_type in ("question_answering", "seq2seq"):
        return [labels.encode_choice] * 2  # not called: these task types have no labels
    if task_type == "multiple_choice" and names is None:
        return [labels.encode_choice] * 2
    column = columns["tags" if task_type == "token_classification" else "label"]
    class_names = [split.class_names.get(column) for split in splits]
    if names is None and class_names[0] is None:
        values = splits[0].column(column)
        if task_type == "token_classification":
            values = [tag for tags in values
                      for tag in (tags.split() if isinstance(tags, str) else tags)]
        train = labels.encoder_from_values(values)
        if len(train.names) < 2:
            raise ValueError(f"{splits[0].describe(0)}: all labels in column {column!r} are "
                             f"{train.names[0] if train.names else ''!r}; give at least 2 classes")
    else:
        train = labels.encoder_from_names(names or class_names[0], class_names[0])
    if validation_names is names:
        if class_names[0] == class_names[1]:
            return [train] * 2
        validation_names = train.names
    validation = labels.encoder_from_names(validation_names, class_names[1])
    if unknown := sorted(set(validation.names) - set(train.names)):
        raise ValueError(f"the validation split has a class {unknown[0]!r} that is missing in the "
                         f"training split, which has {', '.join(train.names)}")
    class_ids = {label: train.names.index(validation.names[i])
                 for label, i in validation.class_ids.items()}
    return [train, LabelEncoder(train.names, class_ids, True)]
