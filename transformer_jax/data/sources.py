"""Where examples come from: random-access sequences of dicts, whatever stands behind them.

A source has a length and gives a dict for a number; one of annotated examples may have
`label_names`. Text is `str`.
"""

import csv
import difflib
import gzip
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAMED = ("python_docs/documents", "python_docs/topics", "python_docs/summaries")


class Source(Sequence):
    """A view of any random-access sequence of dicts, with bytes as text."""

    def __init__(self, rows: Any, label_names: Sequence[str] | None = None,
                 columns: Mapping[str, str] | None = None):
        self._rows, self._columns = rows, columns
        self.label_names = None if label_names is None else list(label_names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        row = self._rows[i]
        names = self._columns or {name: name for name in row}
        return {name: _text(row[column]) for name, column in names.items()}


def _text(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    return value.item() if isinstance(value, np.generic) else value


def text_files(path: str | Path, *, unit: str = "document") -> list[dict[str, str]]:
    """Plain text: a file, or all .txt and .txt.gz below a folder, as `{"text", "name"}`.

    Args:
        unit: "document": blank lines separate documents; "line": a document a line; "file": each
            file is one, exactly as it stands.

    Raises:
        FileNotFoundError: no such path, or a folder without text files.
        ValueError: a file is empty or not UTF-8, or the unit is unknown.
    """
    if unit not in ("document", "line", "file"):
        raise ValueError(f"unit is {unit!r}; choose document, line or file")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a text file or a folder of them")
    files = [path] if path.is_file() else sorted([*path.rglob("*.txt"), *path.rglob("*.txt.gz")])
    if not files:
        raise FileNotFoundError(f"folder {path} has no .txt or .txt.gz file; add one, or give "
                                "another folder")
    found = []
    for file in files:
        text = read_text(file)
        parts = {"file": lambda t: [t], "line": str.splitlines, "document": _documents}[unit](text)
        found += [{"text": part, "name": str(file)} for part in parts if part.strip()]
    return found


def _documents(text: str) -> list[str]:
    documents: list[list[str]] = [[]]
    for line in text.splitlines():
        if line.strip():
            documents[-1].append(line)
        elif documents[-1]:
            documents.append([])
    return ["\n".join(lines) for lines in documents if lines]


def read_text(file: str | Path) -> str:
    """The text of a file, gzipped or not; newlines as they stand.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is empty, or not UTF-8: the message names the first bad byte.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not a file; check the path")
    raw = gzip.open(file).read() if file.suffix == ".gz" else file.read_bytes()
    if not raw.strip():
        raise ValueError(f"{file} is empty; give a file with text in it")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: byte {raw[error.start]:#04x} at offset {error.start} is not "
                         "UTF-8; convert the file, for example with iconv") from None


def table(path: str | Path, columns: Mapping[str, str]) -> Source:
    """Rows of a .tsv or .csv with a header, or a .jsonl, each also as .gz.

    Args:
        columns: name in the examples -> column of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, a column that is not there (near matches are listed), a line
            that cannot be read.
    """
    path = Path(path)
    kind = next((s for s in reversed(path.suffixes) if s != ".gz"), "")
    lines = read_text(path).splitlines()
    if kind == ".jsonl":
        rows = [_json_line(path, n, line) for n, line in enumerate(lines, 1) if line.strip()]
    elif kind in (".tsv", ".csv"):
        # In TSV files quotes are letters like any other.
        style = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
        rows = list(csv.DictReader(lines, **style))
    else:
        raise ValueError(f"{path} ends in {kind!r}; tables are .tsv, .csv or .jsonl")
    if not rows:
        raise ValueError(f"{path} has a header and no rows; give a file with examples in it")
    for number, row in enumerate(rows, 1):
        for column in columns.values():
            if row.get(column) is None:
                near = difflib.get_close_matches(column, map(str, row), n=1)
                raise ValueError(
                    f"{path} has no column {column!r} in row {number}; it has "
                    f"{', '.join(map(str, row))}" + (f": did you mean {near[0]!r}?" if near else "")
                )
    return Source(rows, columns=columns)


def _json_line(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {number} is not JSON ({error.msg}); mend it") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path} line {number} is not a JSON object; write {{\"name\": value}}")
    return row


def tfds_source(name: str, split: str, data_dir: str | Path | None = None,
                download: bool = False) -> Source:
    """A TensorFlow data set through `tfds.data_source`: array_record, without TensorFlow.

    Args:
        name: a registered name ("glue/sst2"), or the folder of a prepared data set.
        download: prepare the set first if it is not there, which may need TensorFlow and time.

    Raises:
        ValueError: an unknown name or split.
        FileNotFoundError: the set is not prepared as array_record in `data_dir`.
    """
    import tensorflow_datasets as tfds

    try:
        if Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            where = None if data_dir is None else str(data_dir)
            builder = tfds.builder(name, data_dir=where, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        near = difflib.get_close_matches(name.split("/")[0], tfds.list_builders(), n=3)
        raise ValueError(f"TFDS has no data set {name!r}; near: {', '.join(near) or 'none'}"
                         ) from None
    if download:
        builder.download_and_prepare()
    if not builder.info.splits:
        raise FileNotFoundError(f"{name} is not prepared in {builder.data_dir}; prepare it as "
                                "array_record, or pass download=True")
    if split.split("[")[0] not in builder.info.splits:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    label = dict(builder.info.features).get("label")
    return Source(builder.as_data_source(split=split), getattr(label, "names", None))


def hf_source(name: str, split: str, config: str | None = None) -> Source:
    """A Hugging Face data set by hub name, or a local folder (`save_to_disk`'s, or of files).

    Raises:
        ImportError: the `datasets` library is not installed.
        ValueError: no such data set or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("Hugging Face data sets need the `datasets` library: "
                          "pip install 'transformer_jax[hf]'") from error
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = datasets.load_from_disk(name)
            rows = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        else:
            rows = datasets.load_dataset(name, config, split=split)
    except (KeyError, ValueError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"data set {name!r}, split {split!r}: {error}; check both names"
                         ) from error
    return Source(rows, getattr(rows.features.get("label"), "names", None))


def is_local(spec: str | Path) -> bool:
    """Whether a data spec means files of this machine rather than a named set."""
    return not (str(spec) in NAMED or str(spec).startswith(("tfds:", "hf:")))


def load_source(spec: str, split: str) -> Source | list[dict[str, str]]:
    """"python_docs/CONFIG", "tfds:NAME", "hf:NAME", or text files by path.

    Raises:
        ValueError: the spec is none of these; near matches are listed.
    """
    spec = str(spec)
    if spec in NAMED:
        from transformer_jax.data import python_docs

        return python_docs.load(spec.split("/")[1], split)
    kind, _, name = spec.partition(":")
    if name and kind in ("tfds", "hf"):
        return {"tfds": tfds_source, "hf": hf_source}[kind](name, split)
    if Path(spec).exists():
        return text_files(spec)
    near = difflib.get_close_matches(spec, NAMED, n=2)
    raise ValueError(f"{spec!r} is neither a path nor tfds:NAME, hf:NAME or one of "
                     f"{', '.join(near or NAMED)}")
