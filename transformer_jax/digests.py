"""What the files of a folder held when they were written, and whether they still do.

Of a checkpoint: Orbax completes one by renaming it, and finds a file that is missing; a flipped bit
in an array it does not. So each complete checkpoint gets a list of its files with their SHA-256.
The tokenizer of a run has such a list too.
"""

import hashlib
import json
import os
from pathlib import Path

NAME = "digests.json"


def write(folder: Path) -> None:
    """List the files of a folder. The list appears as a whole or not at all."""
    listed = {_name(folder, path): digest_of(path) for path in _files(folder)}
    unfinished = folder / f"{NAME}.tmp"
    with unfinished.open("w") as file:
        json.dump(listed, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(folder / NAME)


def exist(folder: Path) -> bool:
    """Whether the files are listed, which is the last thing that happens to a folder."""
    return (folder / NAME).is_file()


def damage(folder: Path, more: bool = False) -> str | None:
    """What is wrong with the first file that is not as it was written; None if all are.

    Args:
        more: other files may be there too.
    """
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
            same = digest_of(present[name]) == digest
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if not same:
            return f"{name} is not what was written"
    others = present.keys() - expected.keys()
    return f"{min(others)} was not written with it" if others and not more else None


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*")
                  if path.is_file() and path != folder / NAME)


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()


def digest_of(path: Path) -> str:
    """SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
