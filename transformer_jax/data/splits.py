"""The training and validation rows of a labeled dataset, before conversion to examples."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transformer_jax.data import rows, sources
from transformer_jax.data.known_datasets import HubSource, KnownDataset
from transformer_jax.data.labels import label_text
from transformer_jax.data.sources import Example


class Split(NamedTuple):
    """The rows of one split, as they are in their source.

    Attributes:
        rows: the rows, with random access.
        describe: `describe(i)` returns the origin of row i, for error messages.
        class_names: column -> names of its classes, for columns of integer class ids with names.
    """

    rows: Sequence[Example]
    describe: Callable[[int], str]
    class_names: Mapping[str, tuple[str, ...]]

    def take(self, indices: Sequence[int]) -> "Split":
        """Returns the split with only the rows at these indices."""
        return Split([self.rows[int(i)] for i in indices],
                     lambda i: self.describe(int(indices[i])), self.class_names)


def column_values(split: Split, column: str) -> list:
    """Returns the values of a column in all rows.

    Raises:
        ValueError: a row has no such column.
    """
    values = []
    for i in range(len(split.rows)):
        try:
            values.append(rows.get_value(split.rows[i], column))
        except ValueError as error:
            raise ValueError(f"{split.describe(i)}: {error}") from None
    return values


TRAIN_WORDS = ("train", "training")
VALIDATION_WORDS = ("validation", "valid", "val", "dev", "trial", "test")
"""Words in the names of validation files and splits, in the order in which they are searched."""


def names_with(word: str, names: Sequence[str]) -> list[str]:
    """Returns the names that contain a word, delimited by characters other than letters."""
    return [name for name in names if word in re.split(r"[^a-z]+", name.lower())]


# Files --------------------------------------------------------------------------------------------


def load_files(
    path: Path, validation: str | Path | None, train_only: bool,
    header: Sequence[str] | None, validation_header: Sequence[str] | None,
) -> list[Split]:
    """Loads the training and validation split from a file or folder.

    Args:
        path: a table, or a folder of tables.
        validation: the validation file, whose path may be relative to the folder; None to search
            the folder for a file with one of `VALIDATION_WORDS` in its name.
        train_only: whether to load the training split alone.
        header: column names of files without a header line.
        validation_header: the same for the validation file.

    Raises:
        FileNotFoundError: the folder has no training file.
        ValueError: there is no validation file, or several files match.
    """
    train = path
    if path.is_dir():
        tables = _tables(path)
        train = tables[0] if train_only and len(tables) == 1 else _find_file(path, TRAIN_WORDS)
    if train is None:
        raise FileNotFoundError(f"{path} has no table with the word train in its name; give the "
                                "path of the file itself")
    if train_only:
        return [load_file(train, header)]
    if validation is None:
        validation_file = _find_file(path, VALIDATION_WORDS) if path.is_dir() else None
    else:
        in_folder = path.is_dir() and (path / validation).is_file()
        validation_file = path / validation if in_folder else Path(validation)
    if validation_file is None:
        raise ValueError(f"{path} has no validation split; give a file as validation, the rows to "
                         "use as validation_filter, or their fraction as validation_fraction, "
                         "such as 0.1")
    return [load_file(train, header), load_file(validation_file, validation_header)]


def load_file(path: Path, header: Sequence[str] | None) -> Split:
    """Loads a table as a split."""
    lines, table = zip(*sources.load_numbered_rows(path, header=header))
    return Split(table, lambda i: f"{path} line {lines[i]}", {})


def _tables(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file()
            and file.name.removesuffix(".gz").endswith((*sources.TABLE_SUFFIXES, ".txt"))]


def _find_file(folder: Path, search_words: Sequence[str]) -> Path | None:
    """Returns the table in a folder with one of these words in its name, or None.

    The words are searched in order, and the first one that occurs in a name is used.

    Raises:
        ValueError: several names contain this word.
    """
    for word in search_words:
        names = names_with(word, [file.name for file in _tables(folder)])
        if len(names) > 1:
            raise ValueError(f"{folder} has {len(names)} tables with the word {word} in their "
                             f"names, {', '.join(names)}; give the path of one file")
        if names:
            return folder / names[0]
    return None


# Dataset libraries --------------------------------------------------------------------------------


def load_library_split(
    spec: str, known: KnownDataset | None, config: str | None, data_dir: str | Path | None,
    download: bool, split: str, train_only: bool,
) -> Split:
    """Loads a split of "tfds:NAME", "hf:NAME" or "python_docs/CONFIG".

    Args:
        spec: name of the dataset.
        known: its description, if it has one.
        config: config of an "hf:" dataset.
        data_dir: folder of TFDS's data.
        download: whether TFDS may download and prepare the dataset.
        split: name of the split.
        train_only: whether only the training split is needed. If False, a folder that contains a
            single `datasets.Dataset` without splits is an error.

    Raises:
        ValueError: unknown dataset or split, or a folder without splits.
    """
    prefix, _, name = spec.partition(":")
    if prefix == "tfds":
        source = sources.load_tfds(name, split, data_dir, download)
    elif prefix == "hf":
        if (Path(name) / "state.json").is_file() and not train_only:
            raise ValueError(f"{name} holds a single split; give validation_filter or "
                             "validation_fraction, or save a DatasetDict")
        hub = known.hub if known else HubSource()
        if hub.path and not Path(name).exists():
            source = sources.load_hf(hub.path, split, config or hub.config, **hub.options)
        else:
            source = sources.load_hf(name, split, config)
    else:
        source = sources.load_source(spec, split)
    return Split(source, lambda i: f"{spec} {split} example {i}",
                 getattr(source, "class_names", {}))


# Held-out rows ------------------------------------------------------------------------------------


def hold_out(
    train: Split, validation_filter: Mapping[str, Collection] | None, fraction: float | None,
    seed: int,
) -> list[Split]:
    """Divides the rows of a split into training and validation rows.

    Args:
        train: all rows.
        validation_filter: column -> values: the rows with one of these values in every column
            are the validation rows.
        fraction: fraction of the rows, in (0, 1), that is drawn at random as validation rows. Not
            used if `validation_filter` is given.
        seed: seed of the draw.

    Raises:
        ValueError: a row has no such column, `fraction` is not between 0 and 1, or one of the two
            splits would be empty.

    Example:
        >>> rows = Split([{"fold": i % 2} for i in range(4)], str, {})
        >>> train, validation = hold_out(rows, {"fold": [1]}, fraction=None, seed=0)
        >>> validation.rows
        [{'fold': 1}, {'fold': 1}]
    """
    num_rows = len(train.rows)
    if validation_filter is not None:
        allowed = {column: {values} if isinstance(values, str) else set(map(label_text, values))
                   for column, values in validation_filter.items()}
        is_validation = np.asarray([_matches(train, i, allowed) for i in range(num_rows)])
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


def _matches(split: Split, i: int, allowed: Mapping[str, Collection[str]]) -> bool:
    try:
        return all(label_text(rows.get_value(split.rows[i], column)) in values
                   for column, values in allowed.items())
    except ValueError as error:
        raise ValueError(f"{split.describe(i)}: {error}") from None
