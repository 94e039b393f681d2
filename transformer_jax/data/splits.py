"""The train and validation rows of an annotated set, as they stand in their source."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from transformer_jax.data import rows as rows
from transformer_jax.data import sources
from transformer_jax.data.known_datasets import KnownDataset
from transformer_jax.data.sources import Example


class Split(NamedTuple):
    """Rows as they stand in the source, and how to name one in a message."""

    rows: Sequence[Example]
    where: Callable[[int], str]
    class_names: Mapping[str, tuple[str, ...]]

    def take(self, indices: Sequence[int]) -> "Split":
        return Split([self.rows[int(i)] for i in indices],
                     lambda i: self.where(int(indices[i])), self.class_names)


def values(split: Split, column: str) -> list:
    """What stands in a column, row by row.

    Raises:
        ValueError: a row does not have it; the row is named.
    """
    found = []
    for i in range(len(split.rows)):
        try:
            found.append(rows.cell(split.rows[i], column))
        except ValueError as error:
            raise ValueError(f"{split.where(i)}: {error}") from None
    return found


# Files --------------------------------------------------------------------------------------------

# Words in the names of files, the first that is found counts.
TRAIN = ("train", "training")
VALIDATION = ("validation", "valid", "val", "dev", "trial", "test")


def files(
    path: Path, validation: str | Path | None, own_split: bool,
    header: Sequence[str] | None, validation_header: Sequence[str] | None,
) -> list[Split]:
    """Train and validation of a file or folder; train alone if it is to be divided.

    Raises:
        FileNotFoundError: the folder has no file to train on.
        ValueError: there is nothing to evaluate on, or several files of the folder would do.
    """
    train = path
    if path.is_dir():
        tables = _tables(path)
        train = tables[0] if own_split and len(tables) == 1 else _file_of(path, TRAIN)
    if train is None:
        raise FileNotFoundError(f"{path} has no table with the word train in its name; give the "
                                "file itself")
    if own_split:
        return [_file(train, header)]
    test = (path / validation if path.is_dir() and (path / validation).is_file()
            else Path(validation)) if validation else (
        _file_of(path, VALIDATION) if path.is_dir() else None)
    if test is None:
        raise ValueError(f"{path} has no validation split; name a file by validation, columns and "
                         "values by held_out, or a validation_share such as 0.1")
    return [_file(train, header), _file(test, validation_header)]


def _tables(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.iterdir()) if file.is_file()
            and file.name.removesuffix(".gz").endswith((*sources.TABLE_SUFFIXES, ".txt"))]


def _file_of(folder: Path, words: Sequence[str]) -> Path | None:
    for word in words:
        found = [file for file in _tables(folder)
                 if word in re.split(r"[^a-z]+", file.name.lower())]
        if len(found) > 1:
            raise ValueError(f"{folder} has {len(found)} tables with the word {word} in their "
                             f"names, {', '.join(file.name for file in found)}; give one file")
        if found:
            return found[0]
    return None


def _file(path: Path, header: Sequence[str] | None) -> Split:
    lines, found = zip(*sources.numbered_rows(path, header=header))
    return Split(found, lambda i: f"{path} line {lines[i]}", {})


# Libraries ----------------------------------------------------------------------------------------


def library(
    spec: str, named: KnownDataset | None, config: str | None, data_dir: str | Path | None,
    download: bool, split: str, may_be_single: bool,
) -> Split:
    """A split of TFDS, Hugging Face or ours.

    Args:
        may_be_single: a folder that knows no splits will do.

    Raises:
        ValueError: no such set or split.
    """
    prefix, _, name = spec.partition(":")
    if prefix == "tfds":
        source = sources.tfds_source(name, split, data_dir, download)
    elif prefix == "hf":
        if (Path(name) / "state.json").is_file() and not may_be_single:
            raise ValueError(f"{name} holds a single split; give held_out or validation_share, or "
                             "save a DatasetDict")
        path, its_config, options = named.hub if named else ("", None, {})
        at_hub = path and not Path(name).exists()
        source = sources.hf_source(*(
            (path, split, config or its_config) if at_hub else (name, split, config)),
            **(options if at_hub else {}))
    else:
        source = sources.load_source(spec, split)
    return Split(source, lambda i: f"{spec} {split} example {i}",
                  getattr(source, "class_names", {}))


# By rows ------------------------------------------------------------------------------------------


def divide(
    train: Split, held_out: Mapping[str, Collection] | None, share: float | None, seed: int
) -> list[Split]:
    """The rows to train on, and those to evaluate on.

    Raises:
        ValueError: a row lacks a column of `held_out`, or one side has no rows.
    """
    count = len(train.rows)
    if held_out is not None:
        wanted = {column: {values} if isinstance(values, str) else set(map(rows.as_word, values))
                  for column, values in held_out.items()}
        out = np.asarray([_holds(train, i, wanted) for i in range(count)])
        what = f"held_out {dict(held_out)}"
    else:
        if not 0 < share < 1:
            raise ValueError(f"validation_share is {share}; give a share between 0 and 1")
        out = np.random.default_rng(seed).permutation(count) < round(share * count)
        what = f"validation_share {share}"
    if out.all() or not out.any():
        raise ValueError(f"{what} takes {out.sum()} of {count} rows; leave some for training and "
                         "some for validation")
    return [train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))]


def _holds(split: Split, i: int, wanted: Mapping[str, Collection[str]]) -> bool:
    try:
        return all(rows.as_word(rows.cell(split.rows[i], column)) in values
                   for column, values in wanted.items())
    except ValueError as error:
        raise ValueError(f"{split.where(i)}: {error}") from None
