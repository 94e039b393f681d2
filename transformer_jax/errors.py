"""Errors of a user's input, and the suggestions that they give."""

import difflib
from collections.abc import Iterable

USER_ERRORS = (ValueError, OSError, ModuleNotFoundError)
"""The errors that a command reports in one line: a value that is out of range, a file that is
missing or damaged, an optional dependency that is not installed."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest known ones, or all of them.

    Example:

        >>> did_you_mean("casual_lm", ["causal_lm", "mlm_nsp"])
        'did you mean causal_lm?'
        >>> did_you_mean("x", ["causal_lm", "mlm_nsp"])
        'choose one of causal_lm, mlm_nsp'
    """
    known = list(known)
    near = difflib.get_close_matches(word, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
