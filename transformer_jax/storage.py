"""Atomic writes, manifests with the SHA-256 checksums of a folder's files, and JSON files.

Checkpoints have a manifest, because Orbax detects missing files but not bit errors in arrays.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "digests.json"


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Opens PATH.partial for writing, which replaces `path` at the end of the block unless it
    fails.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "a.json"
        >>> with atomic_write(path) as file:
        ...     _ = file.write(b"{}")
        >>> path.read_bytes()
        b'{}'
    """
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder, atomically: the SHA-256 checksum of each file in it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as name:
        ...     folder = Path(name)
        ...     _ = (folder / "a.txt").write_text("unchanged")
        ...     write_manifest(folder)
        ...     before = verify_manifest(folder)
        ...     _ = (folder / "a.txt").write_text("changed")
        ...     before, verify_manifest(folder)
        (None, 'a.txt is corrupted: its SHA-256 differs from digests.json')
    """
    checksums = {_relative_path(folder, path): sha256(path) for path in _files(folder)}
    with atomic_write(folder / MANIFEST) as file:
        file.write(json.dumps(checksums, indent=0).encode())


def has_manifest(folder: Path) -> bool:
    """Returns whether a folder has a manifest; it is written last, so such a folder is complete."""
    return (folder / MANIFEST).is_file()


def verify_manifest(folder: Path, allow_extra_files: bool = False) -> str | None:
    """Compares the files in a folder with its manifest: returns the first problem, or None."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        expected = {str(name): str(checksum) for name, checksum in content.items()}
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({str(error).splitlines()[0]})"
    present = {_relative_path(folder, path): path for path in _files(folder)}
    for name, checksum in expected.items():
        if name not in present:
            return f"{name} is missing"
        try:
            matches = sha256(present[name]) == checksum
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not matches:
            return f"{name} is corrupted: its SHA-256 differs from {MANIFEST}"
    extra = present.keys() - expected.keys()
    return f"{min(extra)} is not in {MANIFEST}" if extra and not allow_extra_files else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path != folder / MANIFEST)


def _relative_path(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: bytes) -> Any:
    """Parses UTF-8 encoded JSON; the ValueError for invalid or too deeply nested data has one line.

    Example:
        >>> parse_json(b'{"vocab_size": 100}')
        {'vocab_size': 100}
    """
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that contains an object.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file does not contain a JSON object; the message names the file.
    """
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); the file is corrupted or truncated: "
                         "download it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must hold a JSON object")
    return values
