"""What the files of a folder held when they were written, and whether they still do.

Of a checkpoint: Orbax completes one by renaming it, and finds a file that is missing; a flipped bit
in an array it does not. So each complete checkpoint gets a list of its files with their SHA-256.
The tokenizer of a run has such a list too.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "digests.json"


def write_manifest(folder: Path) -> None:
    """List the files of a folder. The list appears as a whole or not at all."""
    listed = {_name(folder, path): sha256(path) for path in _files(folder)}
    unfinished = folder / f"{MANIFEST}.tmp"
    with unfinished.open("w") as file:
        json.dump(listed, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / MANIFEST)


def has_manifest(folder: Path) -> bool:
    """Whether the files are listed, which is the last thing that happens to a folder."""
    return (folder / MANIFEST).is_file()


def verify_manifest(folder: Path, more: bool = False) -> str | None:
    """What is wrong with the first file that is not as it was written; None if all are.

    Args:
        more: other files may be there too.
    """
    try:
        listed = json.loads((folder / MANIFEST).read_bytes())
        expected = {str(name): str(digest) for name, digest in listed.items()}
    except (OSError, ValueError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({str(error).splitlines()[0]})"
    present = {_name(folder, path): path for path in _files(folder)}
    for name, digest in expected.items():
        if name not in present:
            return f"{name} is missing"
        try:
            same = sha256(present[name]) == digest
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not what was written"
    others = present.keys() - expected.keys()
    return f"{min(others)} was not written with it" if others and not more else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path != folder / MANIFEST)


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def sha256(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(data: bytes) -> Any:
    """The value that these bytes say.

    Raises:
        ValueError: they say none, in one line; also where they are nested deeper than Python reads.
    """
    try:
        return json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except ValueError as error:
        raise ValueError(str(error).splitlines()[0][:200]) from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: there is none; the file is named.
    """
    try:
        values = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be an object of fields")
    return values
