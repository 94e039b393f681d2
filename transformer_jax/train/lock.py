"""Exclusive lock on a checkpoint directory, so that two runs cannot overwrite its files."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix system: directories are not locked
    fcntl = None

LOCK_FILE = "lock"


class DirectoryInUseError(OSError):
    """Another run holds the lock of a checkpoint directory."""


@contextlib.contextmanager
def directory_lock(directory: str | Path, active: bool = True) -> Iterator[None]:
    """Context manager that holds an exclusive lock on a directory.

    The directory is created if it does not exist. The operating system releases the lock when the
    process ends, even if it is killed. On systems without `fcntl`, directories are not locked.

    Args:
        directory: the directory. The lock is a file lock on `directory / LOCK_FILE`.
        active: whether to lock the directory; if False, the context manager does nothing.

    Raises:
        DirectoryInUseError: another process holds the lock.
    """
    if not active or fcntl is None:
        yield
        return
    path = Path(directory) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise DirectoryInUseError(
                f"{directory} is in use by another run ({file.read().strip()}); wait until it "
                "ends, stop it, or choose another directory") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
