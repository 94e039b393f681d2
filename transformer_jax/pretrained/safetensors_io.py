"""Loading and saving of safetensors files (https://huggingface.co/docs/safetensors).

A file contains the length of the header (8 bytes, little-endian), the header, which is a JSON
object with dtype, shape and byte range of each tensor, and the bytes of the tensors. The weights of
a checkpoint are `model.safetensors`, or several files (shards) and an index of their tensors.

Unlike the `safetensors` package, this module reads and writes one tensor at a time without mapping
the file into memory. Mapped pages count as used memory, so loading would appear to need twice the
memory of the weights.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from transformer_jax import storage

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_MAX_NAME_LENGTH = 200  # characters in the file name of a shard; most file systems allow 255 bytes
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format
DTYPES = {name: np.dtype(dtype) for name, dtype in {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_}.items()}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Weight files of other formats; loading them would need unpickling or another library.
_PICKLED = "pickled weights, which can run any code when they are opened"
UNSUPPORTED_FORMATS = {
    "pytorch_model.bin": _PICKLED, "pytorch_model.bin.index.json": _PICKLED,
    "tf_model.h5": "TensorFlow weights", "flax_model.msgpack": "Flax weights in msgpack"}
_CORRUPTED = "the file is corrupted or truncated; download it again"


class TensorEntry(NamedTuple):
    """Location, dtype and shape of a tensor in a safetensors file."""

    file: Path
    start: int  # offset of the first byte in the file
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorSpec(NamedTuple):
    """Name, dtype and shape of a tensor to save."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


# Loading ------------------------------------------------------------------------------------------


def list_tensors(folder: str | Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry, for all tensors in a checkpoint folder. Only the headers are read.

    FileNotFoundError if weights or a shard are missing, ValueError if a file is invalid.
    """
    folder = Path(folder)
    if (folder / WEIGHTS_FILE).is_file():
        return read_header(folder / WEIGHTS_FILE)
    if (folder / INDEX_FILE).is_file():
        return _read_index(folder / INDEX_FILE)
    for name, description in UNSUPPORTED_FORMATS.items():
        if (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} has only {name} ({description}); convert it to {WEIGHTS_FILE} with the "
                "library that saved it: "
                "AutoModel.from_pretrained(folder).save_pretrained(folder)")
    raise FileNotFoundError(f"{folder} has no weights; it must contain {WEIGHTS_FILE} or "
                            f"{INDEX_FILE}")


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry, for all tensors in one file; ValueError if its header is invalid."""
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if file_bytes < 8 or header_bytes > min(file_bytes - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"{path} is not a valid safetensors file: it has {file_bytes} bytes "
                             f"and declares a header of {header_bytes} bytes; {_CORRUPTED}")
        header = file.read(header_bytes)
    fields = {}
    try:
        for name, values in storage.parse_json(header).items():
            if name != "__metadata__":
                start, end = values["data_offsets"]
                fields[name] = str(values["dtype"]), tuple(values["shape"]), start, end
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} has an invalid header ({type(error).__name__}: {error}); "
                         f"{_CORRUPTED}") from None
    entries = {name: _checked_entry(path, name, 8 + header_bytes, file_bytes, *values)
               for name, values in fields.items()}
    previous_end = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes)):
        if entry.start < previous_end:
            raise ValueError(f"{path}: the bytes of tensor {name!r} overlap those of another "
                             f"tensor; {_CORRUPTED}")
        previous_end = entry.start + entry.num_bytes
    return entries


def _checked_entry(path, name, data_start, file_bytes, dtype, shape, start, end) -> TensorEntry:
    if dtype not in DTYPES:
        raise ValueError(f"{path}: tensor {name!r} has dtype {dtype!r}; it must be one of "
                         f"{', '.join(DTYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, start, end)):
        raise ValueError(f"{path}: tensor {name!r} has shape {shape} and data_offsets "
                         f"[{start}, {end}]; they must be integers of at least 0; {_CORRUPTED}")
    entry = TensorEntry(path, data_start + start, DTYPES[dtype], shape)
    if end - start != entry.num_bytes:
        raise ValueError(f"{path}: tensor {name!r} of shape {shape} and dtype {dtype} needs "
                         f"{entry.num_bytes} bytes but has {end - start}; {_CORRUPTED}")
    if data_start + end > file_bytes:
        raise ValueError(f"{path}: tensor {name!r} ends at byte {data_start + end}, but the file "
                         f"has {file_bytes} bytes; {_CORRUPTED}")
    return entry


def _read_index(path: Path) -> dict[str, TensorEntry]:
    """Tensor name -> entry, for all tensors in the shards that an index lists."""
    try:
        shards = storage.read_json(path)["weight_map"]
        files = sorted(set(shards.values()))
        invalid = [name for name in files
                   if Path(name).name != name or len(name) > _MAX_NAME_LENGTH]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid index of shards ({type(error).__name__}: "
                         f"{error}); {_CORRUPTED}") from None
    if invalid:
        raise ValueError(f"{path} lists the shard {invalid[0][:200]!r}; shards must be files in "
                         "the folder of the index")
    entries: dict[str, TensorEntry] = {}
    for name in files:
        if not (path.parent / name).is_file():
            raise FileNotFoundError(f"{path} lists the shard {name}, which does not exist; "
                                    "download it again")
        entries |= read_header(path.parent / name)
    if missing := sorted(shards.keys() - entries.keys()):
        raise ValueError(f"{path} lists tensor {missing[0]!r}, which {shards[missing[0]]} does not "
                         "contain; download both files again")
    return entries


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialized array that starts at a multiple of 64 bytes; JAX uses it without a copy."""
    num_bytes = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = np.empty(num_bytes + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + num_bytes].view(dtype).reshape(shape)


def load_tensor(entry: TensorEntry) -> np.ndarray:
    """Loads one tensor; ValueError if the file is shorter than when its header was read."""
    values = aligned_empty(entry.shape, entry.dtype)
    with entry.file.open("rb", buffering=0) as file:
        file.seek(entry.start)
        unread = memoryview(values.reshape(-1).view(np.uint8))
        while unread and (count := file.readinto(unread)):
            unread = unread[count:]
    if unread:
        raise ValueError(f"{entry.file} is too short: {len(unread)} bytes of a tensor of shape "
                         f"{entry.shape} are missing; {_CORRUPTED}")
    return values


# Saving -------------------------------------------------------------------------------------------


def save_tensors(folder: Path, specs: Sequence[TensorSpec], values: Iterable[np.ndarray],
                 shard_bytes: int) -> None:
    """Saves tensors as `model.safetensors`, or as several shards with an index.

    With an iterator of values, in the order of the specs, only one value is in memory at a time.
    `shard_bytes` is the largest size of a shard; a larger tensor has a shard of its own. Weights of
    an earlier save in the folder are deleted. ValueError if a shape differs from its spec.
    """
    shards: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if shards[-1] and sum(s.num_bytes for s in shards[-1]) + spec.num_bytes > shard_bytes:
            shards.append([])
        shards[-1].append(spec)
    names = [WEIGHTS_FILE] if len(shards) == 1 else [
        f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    remaining = iter(values)
    for name, shard in zip(names, shards):
        _save_file(folder / name, shard, remaining)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(s.num_bytes for s in specs)},
                 "weight_map": {s.name: name for name, shard in zip(names, shards) for s in shard}}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        names.append(INDEX_FILE)
    # Weights of an earlier save could be loaded in place of the new ones.
    for path in [*folder.glob("model-*-of-*.safetensors"), folder / WEIGHTS_FILE,
                 folder / INDEX_FILE]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _save_file(path: Path, specs: Sequence[TensorSpec], values: Iterator[np.ndarray]) -> None:
    header: dict = {"__metadata__": {"format": "pt"}}  # required by Transformers
    end = 0
    for spec in specs:
        start, end = end, end + spec.num_bytes
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape),
                             "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with storage.atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            array = np.asarray(next(values), spec.dtype, order="C")
            if array.shape != spec.shape:
                raise ValueError(f"tensor {spec.name!r} has shape {array.shape}; its spec requires "
                                 f"{spec.shape}")
            file.write(memoryview(array.reshape(-1).view(np.uint8)))
