"""One run a folder: two that write the same checkpoints would ruin both."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a Unix: nobody is kept out
    fcntl = None

NAME = "lock"


@contextlib.contextmanager
def hold(directory: str | Path, active: bool = True) -> Iterator[None]:
    """Holds the folder's lock, which the system frees however the process ends.

    Raises:
        RuntimeError: another process holds it; it is named.
    """
    if not active or fcntl is None:
        yield
        return
    path = Path(directory) / NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{directory} belongs to a run that is going on: {file.read().strip()}; wait for "
                "it, stop it, or choose another folder") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
