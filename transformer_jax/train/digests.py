"""What the files of a checkpoint held when they were written, and whether they still do.

Orbax completes a checkpoint by renaming it, and finds a file that is missing; a flipped bit in an
array it does not. So each complete checkpoint gets a list of its files with their SHA-256.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "digests.json"


def write(folder: Path) -> None:
    """List the files of a checkpoint. The list appears as a whole or not at all."""
    listed = {_name(folder, path): _digest(path) for path in _files(folder)}
    unfinished = folder / f"{NAME}.tmp"
    with unfinished.open("w") as file:
        json.dump(listed, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / NAME)


def exist(folder: Path) -> bool:
    """Whether the files are listed, which is the last thing that happens to a checkpoint."""
    return (folder / NAME).is_file()


def damage(folder: Path) -> str | None:
    """What is wrong with the first file that is not as it was written; None if all are."""
    try:
        listed = json.loads((folder / NAME).read_bytes())
        expected = {str(name): str(digest) for name, digest in listed.items()}
    except (OSError, ValueError, AttributeError) as error:
        return f"{NAME} cannot be read ({str(error).splitlines()[0]})"
    present = {_name(folder, path): path for path in _files(folder)}
    for name, digest in expected.items():
        if name not in present:
            return f"{name} is missing"
        try:
            same = _digest(present[name]) == digest
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not what was written"
    more = present.keys() - expected.keys()
    return f"{min(more)} was not written with it" if more else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path != folder / NAME)


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
