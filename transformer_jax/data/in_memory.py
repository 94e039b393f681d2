"""Labeled data in memory: lists of dicts, pandas DataFrames and Hugging Face datasets.

DataFrames and datasets are recognized by their attributes, so pandas and `datasets` are not
imported.
"""

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any

from transformer_jax.data.mapped_dataset import MappedDataset, from_hf_dataset
from transformer_jax.data.splits import VALIDATION_WORDS, Split, names_with

SUPPORTED = (
    "a list of dicts, a pandas DataFrame, a datasets.Dataset or DatasetDict, a dict of such splits "
    "with the key 'train', tfds:NAME, hf:NAME, python_docs/topics, or the path of a .tsv, .csv, "
    ".jsonl or .txt file or of a folder of them")
"""Description, for error messages, of the data that `datasets.load_dataset` accepts."""


def is_in_memory(data: Any) -> bool:
    """Returns whether `data` is an object in memory, and not the name or path of a data set."""
    return not isinstance(data, (str, PathLike))


def load_splits(data: Any, validation: str | None, train_only: bool) -> list[Split]:
    """Returns the training split, and the validation split if `data` contains one.

    Args:
        data: a table (see `load_split`), or a dict from split names to tables.
        validation: name of the validation split in the dict. If None, the split whose name is one
            of validation, valid, val, dev, trial and test, or contains one of these words.
        train_only: whether to load only the training split.

    Raises:
        ValueError: `data` is not supported or has no rows, there is no split "train" or
            `validation`, or several splits may be the validation split.

    Example:
        >>> splits = {"train": [{"text": "a"}], "test": [{"text": "b"}]}
        >>> train, test = load_splits(splits, validation=None, train_only=False)
        >>> test.rows[0], test.describe(0)
        ({'text': 'b'}, "row 0 of data['test']")
    """
    if not isinstance(data, Mapping):
        if validation is not None:
            raise ValueError(f"validation is {validation!r}, which is neither a file nor a split "
                             f"of data (data is a single table); supported: {SUPPORTED}")
        return [load_split(data, "data")]
    if "train" not in data:
        raise ValueError(f"data is a dict with the keys {', '.join(map(repr, data))} and without "
                         f"'train', which is not supported; supported: {SUPPORTED}")
    if validation is not None and validation not in data:
        raise ValueError(f"data has no split {validation!r}; it has "
                         f"{', '.join(map(repr, data))}")
    name = None if train_only else validation or _find_validation(data, "data")
    return [load_split(data[split], f"data[{split!r}]") for split in ("train", name) if split]


def load_validation(data: Any) -> Split:
    """Returns a validation split.

    Args:
        data: a table (see `load_split`), or a dict from split names to tables with one table or a
            validation split.

    Raises:
        ValueError: `data` is not supported or has no rows, or the dict has no validation split.
    """
    if not isinstance(data, Mapping):
        return load_split(data, "validation")
    name = _find_validation(data, "validation") or (next(iter(data)) if len(data) == 1 else None)
    if name is None:
        raise ValueError("validation is a dict without a validation split; it has the keys "
                         f"{', '.join(map(repr, data))}: give one of these splits as validation")
    return load_split(data[name], f"validation[{name!r}]")


def load_split(table: Any, name: str) -> Split:
    """Converts a table to a split.

    Args:
        table: a sequence of dicts, a pandas DataFrame, or a `datasets.Dataset`.
        name: name of the table in error messages, which number its rows from 0.

    Raises:
        ValueError: the table is not supported or has no rows, a row is not a dict, or a DataFrame
            has two columns of the same name.

    Example:
        >>> load_split([{"text": "a"}], "data").rows
        [{'text': 'a'}]
    """
    class_names: Mapping[str, tuple[str, ...]] = {}
    if _is_data_frame(table):
        rows = _data_frame_rows(table, name)
    elif isinstance(table, MappedDataset):
        rows, class_names = table, table.class_names
    elif _is_hf_dataset(table):
        rows = from_hf_dataset(table)
        class_names = rows.class_names
    elif isinstance(table, Iterable) and not isinstance(table, (str, bytes, Mapping)):
        rows = list(table)
    else:
        raise ValueError(f"{name} is of type {type(table).__name__}, which is not supported; "
                         f"supported: {SUPPORTED}")
    if not len(rows):
        raise ValueError(f"{name} has 0 rows; give at least 1")
    if isinstance(rows, list):
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                raise ValueError(f"row {i} of {name} is of type {type(row).__name__}; give a dict "
                                 'such as {"text": ..., "label": ...}')
    return Split(rows, lambda i: f"row {i} of {name}", class_names)


def _find_validation(data: Mapping[str, Any], name: str) -> str | None:
    for word in VALIDATION_WORDS:
        if word in data:
            return word
    for word in VALIDATION_WORDS:
        names = names_with(word, [key for key in data if isinstance(key, str)])
        if len(names) > 1:
            raise ValueError(f"{name} has several splits with the word {word} in their names, "
                             f"{', '.join(map(repr, names))}; give one of them as validation")
        if names:
            return names[0]
    return None


def _is_data_frame(table: Any) -> bool:
    return all(hasattr(table, name) for name in ("columns", "iloc", "isna", "to_dict"))


def _data_frame_rows(frame: Any, name: str) -> list[dict]:
    """Returns the rows of a pandas DataFrame as dicts, with None for missing values and
    with column names converted to str."""
    columns = list(map(str, frame.columns))
    if repeated := [column for column in columns if columns.count(column) > 1]:
        raise ValueError(f"{name} has two columns {repeated[0]!r}; rename one of them")
    is_missing = frame.isna().to_numpy()
    return [{column: None if missing else value
             for column, value, missing in zip(columns, row.values(), is_missing[i])}
            for i, row in enumerate(frame.to_dict("records"))]


def _is_hf_dataset(table: Any) -> bool:
    return (isinstance(getattr(table, "features", None), Mapping)
            and hasattr(table, "__getitem__") and hasattr(table, "__len__"))
