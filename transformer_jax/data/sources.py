"""Where examples come from: any sequence of dicts, `len(source)` and `source[i]`.

`load_source` takes a short name; the other functions say more. Text is always str, labels of
data sets with class names are numbers, and `source.label_names` are their names. Nothing here
imports TensorFlow: TFDS reads array_record by itself.
"""

import csv
import difflib
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformer_jax.data import python_docs
from transformer_jax.data.mapped_dataset import MappedDataset, from_builder

Example = dict[str, Any]


class Source(Protocol):
    """Random access to examples."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Example: ...


def in_memory(examples: Sequence[Example]) -> list[Example]:
    """A list of dicts, checked.

    Raises:
        ValueError: it is empty or holds something else than dicts.
    """
    examples = list(examples)
    if not examples:
        raise ValueError("the list has 0 examples; give at least 1")
    for i, example in enumerate(examples):
        if not isinstance(example, Mapping):
            raise ValueError(f"example {i} is of type {type(example).__name__}; give a dict "
                             'such as {"text": ...}')
    return examples


# Files --------------------------------------------------------------------------------------------

UNITS = ("document", "line", "file")
TABLES = {".tsv": "\t", ".csv": ","}  # the others of `table` are .jsonl
TABLE_SUFFIXES = (*TABLES, ".jsonl")


def text_files(path: str | Path, *, unit: str = "document") -> list[Example]:
    """Text of a .txt or .txt.gz file, or of all of them in a folder, as `{"text"}`.

    Args:
        unit: what one example is. "document": blank lines stand between documents, and each line
            is a sentence. "line": every line that is not blank. "file": a file just as it stands,
            line ends included.

    Raises:
        FileNotFoundError: the path does not exist, or the folder has no text file.
        ValueError: a file is empty or not UTF-8 (the byte is named), or the unit is unknown.
    """
    if unit not in UNITS:
        raise ValueError(f"unknown unit {unit!r}; choose one of {', '.join(UNITS)}")
    split = {"document": _documents, "line": _lines, "file": lambda text: [text]}[unit]
    texts = [part for file in _text_paths(Path(path)) for part in split(_read_text(file))]
    return [{"text": text} for text in texts]


def _text_paths(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a text file or a folder of them")
    if path.is_file():
        return [path]
    found = sorted(f for pattern in ("*.txt", "*.txt.gz") for f in path.rglob(pattern))
    if not found:
        raise FileNotFoundError(f"{path} has no .txt or .txt.gz file; give a folder with some")
    return found


def _read_text(file: Path) -> str:
    """The file's text with its line ends as they are."""
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{file} is not a whole gzip file ({error}); copy it again") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts from behind a byte order mark, `error.object` too.
        offset = error.start + len(data) - len(error.object)
        raise ValueError(f"{file} is not UTF-8: byte 0x{data[offset]:02x} at offset {offset}; "
                         "convert the file to UTF-8") from None
    if not text.strip():
        raise ValueError(f"{file} has {len(data)} bytes and no text; remove it or write some")
    return text


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if line]


def _documents(text: str) -> list[str]:
    documents: list[list[str]] = [[]]
    for line in map(str.strip, text.split("\n")):
        if line:
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents if lines]


def table(
    path: str | Path, columns: Sequence[str] | Mapping[str, str] | None = None,
    *, header: Sequence[str] | None = None,
) -> list[Example]:
    """Rows of a .tsv, .csv or .jsonl file (or .gz of one) as dicts.

    The first line of .tsv and .csv names the columns. Quotes in .tsv are literal, in .csv they
    quote. Values are str, in .jsonl what JSON says. A .txt file is read like .tsv.

    Args:
        columns: which to keep, all by default; a mapping renames, `{"text": "sentence"}`.
        header: the columns of a .tsv or .csv file whose first line is a row already.

    Raises:
        FileNotFoundError: the path does not exist.
        ValueError: it is empty, a column is missing, or a line does not fit (it is named).
    """
    rows = numbered_rows(path, header=header)
    if columns is None:
        return [row for _, row in rows]
    names = dict(columns) if isinstance(columns, Mapping) else {c: c for c in columns}
    for line, row in rows:
        for column in names.values():
            if column not in row:
                raise ValueError(f"{path} line {line} has no column {column!r}; "
                                 f"it has {', '.join(map(repr, row))}")
    return [{new: row[old] for new, old in names.items()} for _, row in rows]


def numbered_rows(
    path: str | Path, *, header: Sequence[str] | None = None
) -> list[tuple[int, Example]]:
    """Rows of `table`, each with the number of its (last) line in the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a .tsv, .csv or .jsonl file")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".txt":
        suffix = ".tsv"
    if suffix not in TABLE_SUFFIXES:
        raise ValueError(f"{path} ends in {suffix!r}; "
                         f"a table is one of {', '.join(TABLE_SUFFIXES)}")
    if header is not None and (suffix == ".jsonl" or isinstance(header, str)):
        raise ValueError(f"header is {header!r} for {path}; give the names of the columns as a "
                         "sequence, and only for .tsv and .csv")
    text = _read_text(path)
    rows = list(_json_rows(text, path) if suffix == ".jsonl"
                else _csv_rows(text, path, TABLES[suffix], header))
    if not rows:
        raise ValueError(f"{path} has 0 rows below its header; write at least 1")
    return rows


def _csv_rows(
    text: str, path: Path, delimiter: str, header: Sequence[str] | None
) -> Iterator[tuple[int, Example]]:
    rows = _quoted(text, path) if delimiter == "," else (
        (number, line.removesuffix("\r").split(delimiter))
        for number, line in enumerate(text.split("\n"), 1))
    names = [name.strip() for name in (next(rows)[1] if header is None else header)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path} has two columns {min(twice)!r}; give each a name of its own")
    for number, row in rows:
        if row in ([], [""]):
            continue
        if len(row) != len(names):
            raise ValueError(f"{path} line {number} has {len(row)} fields, the header "
                             f"{len(names)}; mend the line")
        yield number, dict(zip(names, row))


def _quoted(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a .csv file. Only \\n and \\r end a line, whatever else Unicode calls an end."""
    csv.field_size_limit(2**31 - 1)  # articles are longer than the 128 KiB that it allows
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        begin = reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise ValueError(f"{path}: the row from line {begin} on is no CSV ({error}); quote "
                             'fields with quotes or line ends in them, and double their quotes, ""'
                             ) from None
        yield reader.line_num, row


def _json_rows(text: str, path: Path) -> Iterator[tuple[int, Example]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} at column "
                             f"{error.colno}; write one object a line") from None
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's
            raise ValueError(f"{path} line {number} cannot be read ({str(error)[:100]}); write one "
                             "plain object a line") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is a {type(row).__name__}; "
                             "write one object a line")
        yield number, row


# Libraries of data sets ---------------------------------------------------------------------------


def tfds_source(
    name: str, split: str, data_dir: str | Path | None = None, download: bool = False
) -> MappedDataset:
    """A split of a TFDS data set by `tfds.data_source`, without TensorFlow.

    It must be prepared as array_record, or `download` must be set to prepare it. bytes become
    str, class labels stay numbers with `label_names`.

    Args:
        data_dir: where TFDS keeps its data; its own default if None.

    Raises:
        ValueError: no such data set or split.
        FileNotFoundError: it is not prepared.
    """
    import tensorflow_datasets as tfds

    where = "" if data_dir is None else f" in {data_dir}"
    options: dict[str, Any] = {} if data_dir is None else {"data_dir": data_dir}
    try:
        # Only to prepare is a file format chosen; what is prepared already knows its own.
        if download:
            options["file_format"] = "array_record"
        builder = _tfds_builder(name, **options)
        if download:
            builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError:
        known = tfds.list_builders(with_community_datasets=False)
        raise ValueError(_unknown("TFDS data set", name, known)) from None
    known = builder.info.splits
    if known and split not in known and "[" not in split and "+" not in split:
        raise ValueError(_unknown(f"split of {name}", split, known))
    try:
        return from_builder(builder, split)
    except (AssertionError, ValueError) as error:
        if known:
            raise
        raise FileNotFoundError(f"TFDS data set {name} is not prepared{where}; prepare it with "
                                "tfds.builder(..., file_format='array_record'), or download=True"
                                ) from error


def _tfds_builder(name: str, **options: Any) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, **options)
    except tfds.core.DatasetNotFoundError:
        # Many builders, those of GLUE among them, are known only once their module is imported.
        for module in ("text", "summarization", "translate", "question_answering"):
            importlib.import_module(f"tensorflow_datasets.{module}")
        return tfds.builder(name, **options)


def hf_source(name_or_path: str, split: str, config: str | None = None, **options: Any) -> MappedDataset:
    """A split of a Hugging Face data set: a name on the Hub, or a local folder.

    A folder that `save_to_disk` wrote is read as such, any other goes to `load_dataset` like a
    name, with `config` and `options`.

    Raises:
        ImportError: the `datasets` library is not installed.
        ValueError: no such split.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise ImportError(f"reading {name_or_path!r} needs the datasets library; "
                          "pip install transformer_jax[hf]") from None
    folder = Path(name_or_path)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        found = datasets.load_from_disk(str(folder))
    else:
        found = datasets.load_dataset(str(name_or_path), config, **options)
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise ValueError(_unknown(f"split of {name_or_path}", split, found))
        found = found[split]
    features = {key: getattr(feature, "feature", feature)  # a list's is that of its items
                for key, feature in found.features.items()}
    classes = {key: feature.names for key, feature in features.items()
               if isinstance(feature, datasets.ClassLabel)}
    return MappedDataset(found, dict, classes)


# By one word --------------------------------------------------------------------------------------

PREFIXES = ("tfds:", "hf:")


def _named(split: str) -> dict[str, Callable[[], Source]]:
    return {f"python_docs/{config}": lambda config=config: python_docs.load(config, split)
            for config in python_docs.CONFIGS}


def is_local(spec: str | Path) -> bool:
    """Whether `load_source` would take the word as a file or folder: it exists, and is no name."""
    spec = str(spec)
    return not spec.startswith(PREFIXES) and spec not in _named("") and Path(spec).exists()


def load_source(spec: str | Path, split: str) -> Source:
    """A split of a data set by name: "tfds:NAME", "hf:NAME", "python_docs/CONFIG", or a path.

    Of a folder that holds files called `split` (train.txt, train.tsv, ...) that file is read. Any
    other path is the "train" split: tables by their ending, all else as text documents.

    Raises:
        FileNotFoundError: neither a known name (near ones are listed) nor an existing path.
        ValueError: the path has no such split; see also the function for each kind.
    """
    spec = str(spec)
    if spec.startswith("tfds:"):
        return tfds_source(spec.removeprefix("tfds:"), split)
    if spec.startswith("hf:"):
        return hf_source(spec.removeprefix("hf:"), split)
    named = _named(split)
    if spec in named:
        return named[spec]()
    path = Path(spec)
    if not path.exists():
        raise FileNotFoundError(_unknown("data set", spec, named)
                                + ", tfds:NAME, hf:NAME, or a path that exists")
    if path.is_dir():
        endings = [s + gz for s in (".txt", *TABLE_SUFFIXES) for gz in ("", ".gz")]
        files = [path / (split + end) for end in endings if (path / (split + end)).is_file()]
        if files:
            return _from_path(files[0])
    if split != "train":
        raise ValueError(f"{path} has no split {split!r}; give a folder with files such as "
                         f"train.txt and {split}.txt, or use the split 'train'")
    return _from_path(path)


def _from_path(path: Path) -> list[Example]:
    is_table = path.name.removesuffix(".gz").endswith(TABLE_SUFFIXES)
    return table(path) if is_table else text_files(path)


def _unknown(what: str, word: str, known: Any) -> str:
    known = sorted(map(str, known))
    near = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    return f"unknown {what} {word!r}; " + (
        f"did you mean {' or '.join(near)}" if near else f"choose from {', '.join(known[:12])}")
