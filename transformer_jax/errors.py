"""Errors of a user's input, and suggestions for their messages."""

import difflib
import traceback
from collections.abc import Iterable

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, FloatingPointError)
"""The exceptions that commands report in one line: a value that is out of range, a file that is
missing or damaged, an optional dependency that is not installed, a loss that is not finite."""

_NUMERICAL_LIBRARIES = {"jax", "jaxlib", "flax", "optax"}


def is_user_error(error: BaseException) -> bool:
    """Whether an exception is an error of the user's input, as opposed to a bug.

    A ValueError that JAX, Flax or Optax raises is a bug, because settings and data are checked
    before they are called; so is a missing module of this package.

    Example:
        >>> is_user_error(FileNotFoundError("corpus.txt does not exist"))
        True
        >>> is_user_error(TypeError("unexpected argument"))
        False
    """
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith(__package__)
    if isinstance(error, ValueError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        name = frames[-1].f_globals.get("__name__", "") if frames else ""
        return name.partition(".")[0] not in _NUMERICAL_LIBRARIES
    return isinstance(error, USER_ERRORS)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns the end of an error message about an unknown name: similar known names, or all.

    Example:
        >>> did_you_mean("casual_lm", ["causal_lm", "mlm_nsp"])
        'did you mean causal_lm?'
        >>> did_you_mean("x", ["causal_lm", "mlm_nsp"])
        'choose one of causal_lm, mlm_nsp'
    """
    known = list(known)
    similar = difflib.get_close_matches(word, known, n=3)
    return (f"did you mean {' or '.join(similar)}?" if similar
            else f"choose one of {', '.join(known)}")
