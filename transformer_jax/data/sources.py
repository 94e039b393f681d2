"""Data sources: sequences of dicts, loaded from files or by name. Text is always str."""

import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformer_jax.data.mapped_dataset import load_hf, load_tfds
from transformer_jax.errors import did_you_mean

Example = dict[str, Any]

# Text files ---------------------------------------------------------------------------------------


def load_text_files(path: str | Path, *, document_separator: str = "blank_line") -> list[Example]:
    r"""Loads a .txt or .txt.gz file, or all such files of a folder, as `{"text"}` examples.

    Args:
        document_separator: how a file is split into documents, each of which becomes one example:

            - "blank_line": at blank lines; each line of a document is a sentence.
            - "newline": at line ends; blank lines are left out.
            - "file": not at all; a file is one document, and its text is unchanged.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no text file.
        ValueError: a file has no text or is not UTF-8, or `document_separator` is unknown.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.txt"
        >>> _ = path.write_text("One.\nTwo.\n\nThree.\n")
        >>> load_text_files(path)
        [{'text': 'One.\nTwo.'}, {'text': 'Three.'}]
    """
    splitters = {"blank_line": _split_at_blank_lines, "newline": _split_lines,
                 "file": lambda text: [text]}
    if document_separator not in splitters:
        raise ValueError(f"unknown document_separator {document_separator!r}; choose one of "
                         f"{', '.join(splitters)}")
    path, split = Path(path), splitters[document_separator]
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a text file or a folder of them")
    files = [path] if path.is_file() else sorted(
        file for pattern in ("*.txt", "*.txt.gz") for file in path.rglob(pattern))
    if not files:
        raise FileNotFoundError(f"{path} has no .txt or .txt.gz file; give a folder with one")
    return [{"text": text} for file in files for text in split(load_text(file))]


def load_text(file: Path) -> str:
    """Loads the text of a UTF-8 file or .gz file, with unchanged line ends; raises ValueError if
    the file is invalid or has no text."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a complete gzip file ({error}); copy it again") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # `error.start` and `error.object` do not count the byte order mark, which is removed.
        offset = error.start + len(data) - len(error.object)
        raise ValueError(f"{file} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}; "
                         "convert the file to UTF-8") from None
    if not text.strip():
        raise ValueError(f"{file} has {len(data)} bytes and no text; remove it or add text")
    return text


def _split_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def _split_at_blank_lines(text: str) -> list[str]:
    lines = itertools.groupby(map(str.strip, text.split("\n")), key=bool)
    return ["\n".join(document) for has_text, document in lines if has_text]


# Tables -------------------------------------------------------------------------------------------

_DELIMITERS = {".tsv": "\t", ".csv": ","}
TABLE_SUFFIXES = (*_DELIMITERS, ".jsonl", ".parquet")


def load_table(path: str | Path, *, header: Sequence[str] | None = None) -> list[Example]:
    r"""Loads the rows of a .tsv, .csv or .jsonl file (or .gz of one) or a .parquet file as dicts.

    The first line of a .tsv or .csv file has the column names, unless they are given as `header`.
    Quotes are ordinary characters in .tsv files and quote fields in .csv files. The values of both
    are str; those of .jsonl files are JSON values, and those of .parquet files have the types of
    their columns. A .txt file is read like a .tsv file.

    PyArrow reads only the Parquet files, because its readers of other formats change values without
    an error. Its CSV reader joins the rows after an unclosed quote and drops a repeated column. Its
    JSON reader converts texts that look like dates to timestamps and large integers to floats, and
    adds keys that a row does not have.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: the file has no rows, or a line is malformed; the message gives the line number.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.csv"
        >>> _ = path.write_text("sentence,label\ngood,1\n")
        >>> load_table(path)
        [{'sentence': 'good', 'label': '1'}]
    """
    return [row for _, row in load_numbered_rows(path, header=header)]


def load_numbered_rows(
    path: str | Path, *, header: Sequence[str] | None = None
) -> list[tuple[int, Example]]:
    """Loads rows as `load_table` does, each with the number of its last line in the file.

    The number of a row of a .parquet file is its position, counted from 1.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a {', '.join(TABLE_SUFFIXES)} file")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    suffix = ".tsv" if suffix == ".txt" else suffix
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} is not a table: its suffix is {suffix!r}; "
                         f"supported: {', '.join(TABLE_SUFFIXES)}")
    if header is not None and (suffix not in _DELIMITERS or isinstance(header, str)):
        raise ValueError(f"header is {header!r} for {path}; give the column names as a sequence, "
                         "and only for .tsv and .csv files")
    if suffix == ".parquet":
        return _load_parquet(path)
    text = load_text(path)
    rows = list(_parse_jsonl(text, path) if suffix == ".jsonl"
                else _parse_delimited(text, path, _DELIMITERS[suffix], header))
    if not rows:
        raise ValueError(f"{path} has 0 rows below its header; add at least 1")
    return rows


def _load_parquet(path: Path) -> list[tuple[int, Example]]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            table = file.read()
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ValueError(f"{path} is not a complete Parquet file ({str(error).splitlines()[0]}); "
                         "copy it again, uncompressed") from None
    if not table.num_rows:
        raise ValueError(f"{path} has 0 rows; add at least 1")
    check_distinct(table.column_names, path)
    return list(enumerate(table.to_pylist(), 1))


def check_distinct(columns: Sequence[str], owner: Any) -> None:
    """Raises ValueError if two columns of a table, `owner`, have the same name."""
    if repeated := {name for name in columns if columns.count(name) > 1}:
        raise ValueError(f"{owner} has two columns {min(repeated)!r}; rename one of them")


def _parse_delimited(
    text: str, path: Path, delimiter: str, header: Sequence[str] | None
) -> Iterator[tuple[int, Example]]:
    rows = _parse_csv(text, path) if delimiter == "," else (
        (number, line.removesuffix("\r").split(delimiter))
        for number, line in enumerate(text.split("\n"), 1))
    names = [name.strip() for name in (next(rows)[1] if header is None else header)]
    check_distinct(names, path)
    for number, row in rows:
        if row in ([], [""]):
            continue
        if len(row) != len(names):
            raise ValueError(f"{path} line {number} has {len(row)} fields, but the header has "
                             f"{len(names)}; fix the line")
        yield number, dict(zip(names, row))


def _parse_csv(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (line number, fields). Only \\n and \\r end a line, not Unicode's other line ends."""
    csv.field_size_limit(2**31 - 1)  # articles are longer than the default limit of 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    begin = 1  # the line at which the next row starts
    try:
        for row in reader:
            yield reader.line_num, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}: the row that starts at line {begin} is not valid CSV "
                         f"({error}); quote fields that contain quotes or line ends, and "
                         'double the quotes in them, ""') from None


def _parse_jsonl(text: str, path: Path) -> Iterator[tuple[int, Example]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} at column "
                             f"{error.colno}; put one JSON object on each line") from None
        except (ValueError, RecursionError) as error:  # number too long, or nesting too deep
            raise ValueError(f"{path} line {number} cannot be read ({str(error)[:100]}); put one "
                             "plain JSON object on each line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is a {type(row).__name__}; "
                             "put one JSON object on each line")
        yield number, row


# By name ------------------------------------------------------------------------------------------

_PYTHON_DOCS = tuple(f"python_docs/{name}" for name in ("documents", "topics", "summaries"))


def is_local(spec: str | Path) -> bool:
    """Returns whether `load_source` loads `spec` as a path: it exists and is not a dataset name."""
    spec = str(spec)
    return (not spec.startswith(("tfds:", "hf:")) and spec not in _PYTHON_DOCS
            and Path(spec).exists())


def load_source(
    spec: str | Path, split: str, *, data_dir: str | Path | None = None, download: bool = False
) -> Sequence[Example]:
    """Loads a split of a dataset by name or path.

    Args:
        spec: "tfds:NAME", "hf:NAME", "python_docs/CONFIG", or a path. If a folder has a file named
            after the split (train.txt, train.tsv, ...), that file is loaded. Any other path is the
            split "train": .tsv, .csv, .jsonl and .parquet files are tables, and all others are text
            files.
        data_dir, download: options of `load_tfds`.

    Raises:
        FileNotFoundError: `spec` is neither a known name nor an existing path.
        ValueError: there is no such split; see also `load_tfds`, `load_hf`, `load_table` and
            `load_text_files`.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> _ = (folder / "train.txt").write_text("One.")
        >>> load_source(folder, "train")
        [{'text': 'One.'}]
    """
    spec = str(spec)
    if spec.startswith("tfds:"):
        return load_tfds(spec.removeprefix("tfds:"), split, data_dir, download)
    if spec.startswith("hf:"):
        return load_hf(spec.removeprefix("hf:"), split)
    if spec in _PYTHON_DOCS:
        from transformer_jax.data import python_docs

        return python_docs.load(spec.removeprefix("python_docs/"), split)
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(f"unknown dataset {spec!r}; {did_you_mean(spec, _PYTHON_DOCS)} "
                                "(also supported: tfds:NAME, hf:NAME, and the path of an existing "
                                ".txt, .tsv, .csv, .jsonl or .parquet file or of a folder of them)")
    if path.is_dir() and (file := find_split_file(path, split)):
        path = file
    elif split != "train":
        raise ValueError(f"{path} has no split {split!r}; give a folder with files such as "
                         f"train.txt and {split}.txt, or use the split 'train'")
    is_table = path.name.removesuffix(".gz").endswith(TABLE_SUFFIXES)
    return load_table(path) if is_table else load_text_files(path)


def find_split_file(folder: Path, split: str) -> Path | None:
    """Returns the file in a folder that is named after a split, such as train.tsv, or None."""
    files = [folder / f"{split}{suffix}{gz}" for suffix in (".txt", *TABLE_SUFFIXES)
             for gz in ("", ".gz")]
    return next((file for file in files if file.is_file()), None)
