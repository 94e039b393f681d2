"""JSON files that others wrote."""

import json
from pathlib import Path
from typing import Any


def parse(data: bytes) -> Any:
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


def read(path: Path) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ValueError: there is none; the file is named.
    """
    try:
        values = parse(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}); fetch it again") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; it must be an object of fields")
    return values
