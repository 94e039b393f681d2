"""The safetensors format, one tensor at a time.

A file is the length of its header (8 bytes, little-endian), the header (JSON: name -> dtype, shape
and the place of its bytes), and the bytes (https://huggingface.co/docs/safetensors). A checkpoint
is `model.safetensors`, or several files with an index of which one holds a name.

Tensors are read by plain reads of their own bytes, never by mapping the file: mapped pages count as
memory in use, so that loading would seem, and on a full machine would be, twice as large.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from transformer_jax import storage

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_NAME = 200  # characters of a file's name; no system has longer ones
LONGEST_HEADER = 100_000_000  # bytes, the format's own limit
# bfloat16 is no type of NumPy's own; ml_dtypes comes with JAX.
DTYPES = {
    "F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# What others keep weights in; reading them means unpickling, or another library.
FOREIGN = {
    "pytorch_model.bin": "pickled weights, which can run any code when they are opened",
    "pytorch_model.bin.index.json": "pickled weights, which can run any code when they are opened",
    "tf_model.h5": "TensorFlow weights",
    "flax_model.msgpack": "Flax weights in msgpack",
}


class Entry(NamedTuple):
    """Where a tensor is, and what it is."""

    file: Path
    start: int  # first byte in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def open_weights(folder: str | Path) -> dict[str, Entry]:
    """All tensors of a checkpoint's folder by name; only headers are read.

    Raises:
        FileNotFoundError: there are no weights, only those of other formats, or a shard is missing.
        ValueError: a header, the index or the length of a file is not what the format wants.
    """
    folder = Path(folder)
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    if (folder / INDEX).is_file():
        return _read_index(folder / INDEX)
    for name, what in FOREIGN.items():
        if (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has only {name} ({what}); write {WEIGHTS} with the library that made "
                "it: AutoModel.from_pretrained(folder).save_pretrained(folder)")
    raise FileNotFoundError(f"{folder} has no weights; {WEIGHTS} or {INDEX} must be in it")


def read_header(path: str | Path) -> dict[str, Entry]:
    """The tensors of one file.

    Raises:
        ValueError: the file is cut off, or its header is damaged.
    """
    path = Path(path)
    total = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if total < 8 or length > min(total - 8, LONGEST_HEADER):
            raise ValueError(f"{path} is no safetensors file, or cut off: it has {total} bytes and "
                             f"says that {length} of them are its header; fetch it again")
        header = file.read(length)
    try:
        header = storage.parse_json(header)
        header.pop("__metadata__", None)
        entries = {}
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            entries[name] = str(entry["dtype"]), tuple(entry["shape"]), start, end
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has a damaged header ({type(error).__name__}: {error}); fetch it "
                         "again") from None
    base = 8 + length
    found = {name: _entry(path, name, base, total, *entry) for name, entry in entries.items()}
    taken = 0
    for name, entry in sorted(found.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start - base < taken:
            raise ValueError(f"{path}: tensor {name!r} begins inside another one; fetch it again")
        taken = entry.start - base + entry.size
    return found


def _entry(path, name, base, total, dtype, shape, start, end) -> Entry:
    if dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} is of type {dtype!r}; it must be one of "
                         f"{', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"{path}: tensor {name!r} has shape {shape} and bytes {start} to {end}; "
                         "they must be whole numbers from 0; fetch it again")
    entry = Entry(path, base + start, DTYPES[dtype], shape)
    if end - start != entry.size:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} and type {dtype} needs "
                         f"{entry.size} bytes but has {end - start}; fetch it again")
    if base + end > total:
        raise ValueError(f"{path} is cut off: tensor {name!r} ends at byte {base + end} of "
                         f"{total}; fetch it again")
    return entry


def _read_index(path: Path) -> dict[str, Entry]:
    try:
        shards = storage.read_json(path)["weight_map"]
        files = sorted(set(shards.values()))
        outside = [name for name in files if Path(name).name != name or len(name) > LONGEST_NAME]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no index of weights ({type(error).__name__}: {error}); fetch "
                         "it again") from None
    if outside:
        raise ValueError(f"{path} names {outside[0][:200]!r}; shards must be files beside it")
    for name in files:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} names {name}, which is not there; fetch it again")
    found: dict[str, Entry] = {}
    for name in files:
        found |= read_header(path.parent / name)
    if missing := sorted(shards.keys() - found.keys()):
        raise ValueError(f"{path} names tensor {missing[0]!r}, which is not in "
                         f"{shards[missing[0]]}; fetch it again")
    return found


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that JAX can take over on a CPU instead of copying it: it begins at a multiple of 64.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def read(entry: Entry) -> np.ndarray:
    """The values of one tensor.

    Raises:
        ValueError: the file has become shorter.
    """
    values = empty(entry.shape, entry.dtype)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        view = memoryview(values.reshape(-1).view(np.uint8))
        while view and (count := file.readinto(view)):
            view = view[count:]
    if view:
        raise ValueError(f"{entry.file} is cut off: {len(view)} bytes of a tensor of shape "
                         f"{entry.shape} are missing; fetch it again")
    return values


class TensorSpec(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(folder: str | Path, plan: Sequence[TensorSpec], values: Iterable[np.ndarray],
          shard_bytes: int) -> None:
    """Tensors into `model.safetensors`, or into numbered files with an index where they are more
    than `shard_bytes`. `values` come in the order of `plan`, and only one is held at a time."""
    folder = Path(folder)
    shards: list[list[TensorSpec]] = [[]]
    for tensor in plan:
        if shards[-1] and sum(t.size for t in shards[-1]) + tensor.size > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    names = [WEIGHTS] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    rest = iter(values)
    for name, shard in zip(names, shards):
        _write_file(folder / name, shard, rest)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(t.size for t in plan)},
                 "weight_map": {t.name: name for name, shard in zip(names, shards) for t in shard}}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    # Weights of an earlier save would be read in the place of these, or beside them.
    stale = {*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS, folder / INDEX}
    kept = {folder / name for name in names} | ({folder / INDEX} if len(shards) > 1 else set())
    for path in stale - kept:
        path.unlink(missing_ok=True)


def _write_file(path: Path, plan: Sequence[TensorSpec], values: Iterator[np.ndarray]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}  # the reference reads no file without it
    end = 0
    for tensor in plan:
        start, end = end, end + tensor.size
        header[tensor.name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    # Whoever is killed while writing leaves the old file whole.
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in plan:
            array = np.asarray(next(values), tensor.dtype, order="C")
            if array.shape != tensor.shape:
                raise ValueError(f"tensor {tensor.name!r} has shape {array.shape}, not "
                                 f"{tensor.shape}")
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
    partial.replace(path)
