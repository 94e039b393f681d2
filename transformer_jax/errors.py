"""Errors in user input, and "did you mean" suggestions for error messages."""

import difflib
import traceback
from collections.abc import Iterable
from typing import Any

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError, FloatingPointError)
"""Exceptions that commands report in one line, without a traceback: a value is out of range, a file
is missing or corrupted, an optional dependency is not installed, or a loss is not finite."""

_NUMERICAL_LIBRARIES = {"jax", "jaxlib", "flax", "optax"}


def is_user_error(error: BaseException) -> bool:
    """Returns whether an exception is an error in user input, as opposed to a bug.

    A ValueError raised by JAX, Flax or Optax is a bug, because settings and data are checked before
    these libraries are called. A missing module of this package is a bug too.

    Example:
        >>> is_user_error(FileNotFoundError("corpus.txt")), is_user_error(TypeError("unexpected"))
        (True, False)
    """
    if isinstance(error, ModuleNotFoundError):
        return not (error.name or "").startswith(__package__)
    if isinstance(error, ValueError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        name = frames[-1].f_globals.get("__name__", "") if frames else ""
        return name.partition(".")[0] not in _NUMERICAL_LIBRARIES
    return isinstance(error, USER_ERRORS)


def did_you_mean(word: str, known: Iterable[Any], *, show_all: bool = False) -> str:
    """Returns a suggestion for an error message about an unknown name: similar names, or all names.

    With `show_all`, the known names, of which at most 30 are shown, follow the similar ones.

    Example:
        >>> did_you_mean("casual_lm", ["causal_lm", "mlm_nsp"])
        'did you mean causal_lm?'
        >>> did_you_mean("x", ["causal_lm", "mlm_nsp"])
        'choose one of causal_lm, mlm_nsp'
    """
    known = list(map(str, known))
    similar = difflib.get_close_matches(str(word), known, n=3, cutoff=0.5)
    names = ", ".join([*known[:30], *(["..."] if known[30:] else [])])
    if not similar:
        return f"choose one of {names}"
    suggestion = f"did you mean {' or '.join(similar)}?"
    return f"{suggestion} Choose one of {names}" if show_all else suggestion


def similar_names(word: str, known: Iterable[Any], n: int = 3) -> list[str]:
    """Returns at most `n` of the known names that are similar to a word, the most similar first."""
    return difflib.get_close_matches(str(word), list(map(str, known)), n=n, cutoff=0.5)
