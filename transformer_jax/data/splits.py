"""The training and validation rows of a labeled dataset, before conversion to examples.

They are in memory, in files, in a dataset library, or held out from the training rows. DataFrames
and Hugging Face datasets are recognized by their attributes, so pandas and `datasets` are not
imported.
"""

import functools
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.data import known_datasets, mapped_dataset, rows, sources
from transformer_jax.data.known_datasets import DatasetConfig
from transformer_jax.data.mapped_dataset import MappedDataset
from transformer_jax.data.rows import Example, label_text

SUPPORTED = (
    "a list of dicts, a pandas DataFrame, a datasets.Dataset or DatasetDict, a dict of such splits "
    "with the key 'train', tfds:NAME, hf:NAME, python_docs/topics, or the path of a .tsv, .csv, "
    ".jsonl, .parquet or .txt file or of a folder of them")
"""Description, for error messages, of the data that `datasets.load_dataset` accepts."""
TRAIN_WORDS = ("train", "training")
VALIDATION_WORDS = ("validation", "valid", "val", "dev", "trial", "test")
"""Words in the names of validation files and splits, in the order in which they are searched."""


class Split(NamedTuple):
    """The rows of one split, as they are in their source.

    Attributes:
        rows: the rows, with random access.
        describe: `describe(i)` returns the origin of row i, for error messages.
        class_names: column -> names of its classes, for columns of integer class ids with names.
    """

    rows: Sequence[Example]
    describe: Callable[[int], str]
    class_names: Mapping[str, tuple[str, ...]] = MappingProxyType({})

    def take(self, indices: Sequence[int]) -> "Split":
        """Returns the split with only the rows at these indices."""
        return Split([self.rows[int(i)] for i in indices],
                     lambda i: self.describe(int(indices[i])), self.class_names)

    def map(self, fn: Callable[[Example], Any]) -> list:
        """Returns the value of a function for every row; its errors name the row."""
        values = []
        for i in range(len(self.rows)):
            try:
                values.append(fn(self.rows[i]))
            except ValueError as error:
                raise ValueError(f"{self.describe(i)}: {error}") from None
        return values

    def column(self, name: str) -> list:
        """Returns the values of a column in all rows."""
        return self.map(lambda row: rows.get_value(row, name))


def load_splits(
    config: DatasetConfig, data: Any, validation: Any, train_only: bool, **options: Any
) -> list[Split]:
    """Returns the training split and, unless `train_only`, the validation split if there is one.

    `data` and `validation` are as in `datasets.load_dataset`; a `validation` of None is searched
    for, except in a dataset library. `options` are those of `mapped_dataset.load_tfds`.
    """
    in_memory = is_in_memory(data)
    if config.header and (in_memory or not sources.is_local(data)):
        raise ValueError(f"header is {list(config.header)}, but data is not a file; leave header "
                         "out")
    extra = None  # loads a validation split that does not come from `data`
    if validation is not None and is_in_memory(validation):
        extra = functools.partial(_validation_table, validation)
    elif in_memory and validation is not None and Path(validation).is_file() and not (
            isinstance(data, Mapping) and validation in data):
        extra = functools.partial(load_file, Path(validation), config.validation_header)
    if train_only or extra:
        train_only, validation = True, None
    if in_memory:
        splits = _from_memory(data, validation and str(validation), train_only)
    elif sources.is_local(data):
        splits = _from_files(Path(data), config, validation, train_only)
    else:
        splits = [from_library(str(data), split, train_only, **options)
                  for split in ("train", *(() if train_only else (str(validation),)))]
    return [*splits, *([extra()] if extra else [])]


# Data in memory -----------------------------------------------------------------------------------


def is_in_memory(data: Any) -> bool:
    """Returns whether `data` is an object in memory, and not the name or path of a data set."""
    return not isinstance(data, (str, PathLike))


def _from_memory(data: Any, validation: str | None, train_only: bool) -> list[Split]:
    """Returns the splits of a table (see `from_table`), or of a dict from split names to tables."""
    if not isinstance(data, Mapping):
        if validation is not None:
            raise ValueError(f"validation is {validation!r}, which is neither a file nor a split "
                             f"of data (data is a single table); supported: {SUPPORTED}")
        return [from_table(data, "data")]
    if "train" not in data:
        raise ValueError(f"data is a dict with the keys {', '.join(map(repr, data))} and without "
                         f"'train', which is not supported; supported: {SUPPORTED}")
    if validation is not None and validation not in data:
        raise ValueError(f"data has no split {validation!r}; it has "
                         f"{', '.join(map(repr, data))}")
    name = None if train_only else validation or _find_validation(data, "data")
    return [from_table(data[split], f"data[{split!r}]") for split in ("train", name) if split]


def _validation_table(data: Any) -> Split:
    if not isinstance(data, Mapping):
        return from_table(data, "validation")
    name = _find_validation(data, "validation") or (next(iter(data)) if len(data) == 1 else None)
    if name is None:
        raise ValueError("validation is a dict without a validation split; it has the keys "
                         f"{', '.join(map(repr, data))}: give one of these splits as validation")
    return from_table(data[name], f"validation[{name!r}]")


def _find_validation(data: Mapping[str, Any], name: str) -> str | None:
    exact = next((word for word in VALIDATION_WORDS if word in data), None)
    return exact or _find_name([key for key in data if isinstance(key, str)], VALIDATION_WORDS,
                               name, "splits", "give one of them as validation")


def from_table(table: Any, name: str) -> Split:
    """Converts a sequence of dicts, a pandas DataFrame, or a `datasets.Dataset` to a split.

    The table is called `name` in error messages, which number its rows from 0.

    Example:
        >>> from_table([{"text": "a"}], "data").rows
        [{'text': 'a'}]
    """
    if all(hasattr(table, name) for name in ("columns", "iloc", "isna", "to_dict")):
        found = _data_frame_rows(table, name)
    elif isinstance(table, MappedDataset):
        found = table
    elif isinstance(getattr(table, "features", None), Mapping):
        found = mapped_dataset.from_hf_dataset(table)
    elif isinstance(table, Iterable) and not isinstance(table, (str, bytes, Mapping)):
        found = list(table)
    else:
        raise ValueError(f"{name} is of type {type(table).__name__}, which is not supported; "
                         f"supported: {SUPPORTED}")
    if not len(found):
        raise ValueError(f"{name} has 0 rows; give at least 1")
    for i, row in enumerate(found if isinstance(found, list) else ()):
        if not isinstance(row, Mapping):
            raise ValueError(f"row {i} of {name} is of type {type(row).__name__}; give a dict "
                             'such as {"text": ..., "label": ...}')
    return Split(found, lambda i: f"row {i} of {name}", getattr(found, "class_names", {}))


def _data_frame_rows(frame: Any, name: str) -> list[dict]:
    """Returns the rows as dicts, with None for missing values and with str column names."""
    columns = list(map(str, frame.columns))
    sources.check_distinct(columns, name)
    is_missing = frame.isna().to_numpy()
    return [{column: None if missing else value
             for column, value, missing in zip(columns, row.values(), is_missing[i])}
            for i, row in enumerate(frame.to_dict("records"))]


# Files --------------------------------------------------------------------------------------------


def load_file(path: Path, header: Sequence[str] | None = None) -> Split:
    """Loads a table as a split."""
    numbers, table = zip(*sources.load_numbered_rows(path, header=header or None))
    return Split(table, lambda i: f"{path} line {numbers[i]}")


def find_aligned_files(folder: Path, split: str, sides: Sequence[str]) -> list[Path] | None:
    """Returns the files of a split whose lines belong together, as train.de and train.en (or .gz),
    or None."""
    for gz in ("", ".gz"):
        files = [folder / f"{split}.{side}{gz}" for side in sides]
        if all(file.is_file() for file in files):
            return files
    return None


def load_aligned_files(files: Sequence[Path]) -> Split:
    """Loads line-aligned text files as a split; the suffix of each file names its column."""
    columns = {}
    for file in files:
        lines = sources.load_text(file).rstrip("\n").split("\n")
        columns[Path(file.name.removesuffix(".gz")).suffix[1:]] = list(map(str.strip, lines))
    counts = [len(lines) for lines in columns.values()]
    if len(set(counts)) > 1:
        raise ValueError(f"{files[0]} has {counts[0]} lines and {files[1]} has {counts[1]}; "
                         "line n of one file must belong to line n of the other")
    table = [dict(zip(columns, texts)) for texts in zip(*columns.values())]
    return Split(table, lambda i: f"{files[0]} and {files[1].name} line {i + 1}")


def _from_files(
    path: Path, config: DatasetConfig, validation: str | Path | None, train_only: bool
) -> list[Split]:
    """Loads the splits from a file or folder; the validation file may be relative to it."""
    sides = [config.columns.get(side) for side in ("source", "target")]
    if path.is_dir() and all(sides) and (train := find_aligned_files(path, "train", sides)):
        words = [] if train_only else [validation] if validation else VALIDATION_WORDS
        found = [files for word in words if (files := find_aligned_files(path, word, sides))]
        if not train_only and not found:
            raise ValueError(f"{path} has no validation split; add files such as dev.{sides[0]} "
                             f"and dev.{sides[1]}, or give validation_fraction")
        return [load_aligned_files(files) for files in (train, *found[:1])]
    train = path
    if path.is_dir():
        tables = _tables(path)
        train = tables[0] if train_only and len(tables) == 1 else _find_file(path, TRAIN_WORDS)
    if train is None:
        raise FileNotFoundError(f"{path} has no table with the word train in its name; give the "
                                "path of the file itself")
    if train_only:
        return [load_file(train, config.header)]
    if validation is None:
        file = _find_file(path, VALIDATION_WORDS) if path.is_dir() else None
    else:
        file = path / validation if (path / validation).is_file() else Path(validation)
    if file is None:
        raise ValueError(f"{path} has no validation split; give a file as validation, the rows to "
                         "use as validation_filter, or their fraction as validation_fraction, "
                         "such as 0.1")
    return [load_file(train, config.header),
            load_file(file, config.validation_header or config.header)]


def _tables(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file()
            and file.name.removesuffix(".gz").endswith((*sources.TABLE_SUFFIXES, ".txt"))]


def _find_file(folder: Path, words: Sequence[str]) -> Path | None:
    """Returns the table in a folder with one of these words in its name, or None."""
    name = _find_name([file.name for file in _tables(folder)], words, str(folder), "tables",
                      "give the path of one file")
    return None if name is None else folder / name


def _find_name(
    names: Sequence[str], words: Sequence[str], owner: str, kind: str, fix: str
) -> str | None:
    """Returns the only name that contains the first of these words that occurs in any, or None.

    Words in a name are delimited by characters other than letters.
    """
    for word in words:
        found = [name for name in names if word in re.split(r"[^a-z]+", name.lower())]
        if len(found) > 1:
            raise ValueError(f"{owner} has {len(found)} {kind} with the word {word} in their "
                             f"names, {', '.join(found)}; {fix}")
        if found:
            return found[0]
    return None


# Dataset libraries --------------------------------------------------------------------------------


def from_library(name: str, split: str, train_only: bool = True, **options: Any) -> Split:
    """Loads a split by name; `options` are those of `sources.load_source`."""
    spec = name
    if name.startswith("hf:"):
        folder = Path(name.removeprefix("hf:"))
        if (folder / "state.json").is_file() and not train_only:
            raise ValueError(f"{folder} holds a single split; give validation_filter or "
                             "validation_fraction, or save a DatasetDict")
        known = None if folder.exists() else known_datasets.find(name)
        spec = known.data if known else name
    source = sources.load_source(spec, split, **options)
    return Split(source, lambda i: f"{name} {split} example {i}",
                 getattr(source, "class_names", {}))


# Held-out rows ------------------------------------------------------------------------------------


def hold_out(
    train: Split, validation_filter: Mapping[str, Collection] | None, fraction: float | None,
    seed: int,
) -> list[Split]:
    """Divides the rows of a split into training and validation rows.

    The validation rows have, in every column of `validation_filter`, one of its values; or are
    drawn at random, if it is None.

    Example:
        >>> rows = Split([{"fold": i % 2} for i in range(4)], str)
        >>> train, validation = hold_out(rows, {"fold": [1]}, fraction=None, seed=0)
        >>> validation.rows
        [{'fold': 1}, {'fold': 1}]
    """
    num_rows = len(train.rows)
    if validation_filter is not None:
        allowed = {column: {values} if isinstance(values, str) else set(map(label_text, values))
                   for column, values in validation_filter.items()}
        is_validation = np.asarray(train.map(lambda row: all(
            label_text(rows.get_value(row, column)) in values
            for column, values in allowed.items())))
        option = f"validation_filter {dict(validation_filter)}"
    else:
        if not 0 < fraction < 1:
            raise ValueError(f"validation_fraction is {fraction}; it must be between 0 and 1")
        is_validation = (np.random.default_rng(seed).permutation(num_rows)
                         < round(fraction * num_rows))
        option = f"validation_fraction {fraction}"
    if is_validation.all() or not is_validation.any():
        raise ValueError(f"{option} selects {is_validation.sum()} of {num_rows} rows; both the "
                         "training and the validation split need at least one row")
    return [train.take(np.flatnonzero(~is_validation)), train.take(np.flatnonzero(is_validation))]
