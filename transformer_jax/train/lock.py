"""Exclusive access to a checkpoint directory, so that two runs cannot overwrite each other."""

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


@contextlib.contextmanager
def directory_lock(directory: str | Path, active: bool = True) -> Iterator[None]:
    """Holds an exclusive lock on a directory, which is created if necessary.

    The operating system releases the lock when the process ends, however it ends.

    Args:
        directory: the directory to lock, by a file lock on its file "lock".
        active: False does nothing.

    Raises:
        RuntimeError: another process holds the lock.
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
            raise RuntimeError(
                f"{directory} is in use by another run ({file.read().strip()}); wait until it "
                "ends, stop it, or choose another directory") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
