"""Execution of functions as commands: parameters as flags, input texts, one-line user errors.

JAX is not imported here, so that `--help` and usage errors are printed without delay.
"""

import contextlib
import functools
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from transformer_jax.errors import is_user_error

if TYPE_CHECKING:
    from transformer_jax.models import Model

PROGRAM = "transformer-jax"
USER_ERROR_STATUS = 2
INTERRUPTED_STATUS = 130  # 128 + SIGINT, as in shells

ModelArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
"""Type of a parameter for a model: the folder of a run, or a checkpoint."""
TextArguments = Annotated[
    tuple[str, ...], tyro.conf.Positional,
    tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint="")]
"""Type of a parameter for any number of texts."""


class UsageError(ValueError):
    """Command-line arguments that cannot be parsed."""


def run_command(
    function: Callable[..., Any], *arguments: Any, parse: Callable[[], Any] | None = None
) -> int:
    """Calls a function and returns the exit status of the process.

    An error in the user's input is printed to standard error as one line, and the status is 2;
    other exceptions are bugs and are raised. `parse`, such as `lambda: tyro.cli(Config)`, parses
    the command line; its result is then the only argument of the function.

    Example:
        >>> run_command(print, "done")
        done
        0
    """
    try:
        if parse is not None:
            with _one_line_usage_errors():
                arguments = (parse(),)
        function(*arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED_STATUS
    except BrokenPipeError:  # the reader of standard output, such as `head`, has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if not is_user_error(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR_STATUS
    return 0


def call_with_arguments(function: Callable[..., Any], arguments: Sequence[str]) -> None:
    """Parses command-line arguments and calls a function with them; its docstring is the help.

    Arguments that match no parameter of the function are a `UsageError`, unless it has a parameter
    `flags`, which receives them. `--help-all` is passed to `flags` as `--help`; without `flags`, it
    is the same as `--help`.
    """
    prog = f"{PROGRAM} {function.__name__}"
    target, arguments = _bind(function), list(arguments)
    if {"-h", "--help", "--help-all"} & set(arguments):
        # The docstring is printed here, because tyro would change its line breaks.
        print(inspect.getdoc(function).partition("\n\nArgs:")[0] + "\n")
    if "flags" not in inspect.signature(function).parameters:
        arguments = ["--help" if a == "--help-all" else a for a in arguments]
        args, kwargs = parse_arguments(target, arguments, prog=prog)
    else:
        (args, kwargs), flags = parse_arguments(
            target, [a for a in arguments if a != "--help-all"], prog=prog,
            return_unknown_args=True)
        kwargs["flags"] = (*flags, *["--help"] * ("--help-all" in arguments))
    function(*args, **kwargs)


def parse_arguments(target: Any, arguments: Sequence[str], *, prog: str, **options: Any) -> Any:
    """Returns `tyro.cli(target, args=arguments)`, with usage errors as one-line `UsageError`."""
    with _one_line_usage_errors():
        return tyro.cli(target, args=list(arguments), prog=prog, description="", **options)


def _bind(function: Callable[..., Any]) -> Callable[..., tuple[tuple, dict]]:
    """Returns a function with the same signature that returns its arguments."""

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        return args, kwargs

    # tyro would keep the line breaks in the descriptions of parameters.
    bound.__doc__ = re.sub(r"\n {8,}", " ", inspect.getdoc(function))
    bound.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    del bound.__wrapped__  # tyro would use its docstring
    return bound


@contextlib.contextmanager
def _one_line_usage_errors() -> Iterator[None]:
    """Converts the usage errors of tyro, which prints a box and exits, to `UsageError`."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if stop.code == USER_ERROR_STATUS:
            raise UsageError(_to_one_line(printed.getvalue())) from None
        raise
    sys.stderr.write(printed.getvalue())  # warnings


def _to_one_line(box: str) -> str:
    """Returns the message in a box that tyro printed, without the descriptions of flags.

    Example:
        >>> _to_one_line("╭─ Error ─╮\\n│ a is    │\\n│ bad.    │\\n│ ─────── │\\n│ More    │")
        'a is bad'
    """
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colors
    if "│" in box:
        lines = re.findall(r"^│ ?(.*?) *│$", box, re.MULTILINE)
    else:  # in an ASCII terminal, the box is a title, a rule and indented lines
        lines = [line[2:].rstrip() for line in box.splitlines()[2:]]
    sections: list[list[str]] = [[]]
    for line in lines:
        if re.fullmatch(r"[─-]+", line):
            sections.append([])
        elif not line.startswith(" " * 8):  # lines that start so describe a flag
            sections[-1].append(line.strip())
    message = " ".join(sections[0]).rstrip(".")
    if suggestion := next((s for s in sections if s and s[0].startswith("Perhaps")), None):
        names = [line.split()[0].rstrip(",") for line in suggestion if line.startswith("-")]
        message += f"; did you mean {' or '.join(dict.fromkeys(names))}?"
    return message


# Arguments ----------------------------------------------------------------------------------------


def optional(metavar: str, default: str = "", **options: Any) -> Any:
    """Returns the tyro settings, for `Annotated`, of a flag whose default is None.

    The help shows `default`, what None means, as the default, unless it is empty.
    """
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, **options)


def given(**options: Any) -> dict[str, Any]:
    """Returns the options that are not None."""
    return {name: value for name, value in options.items() if value is not None}


def check_family(model: "Model", family: str) -> None:
    """Raises ValueError if a model is not of a family: "GPT", "BERT" or "Transformer"."""
    from transformer_jax import models

    if not isinstance(model, getattr(models, family)):
        raise ValueError(f"the model is a {type(model).__name__}; this command needs a {family}")


def read_texts(texts: Sequence[str], single: bool = False) -> list[str]:
    """Returns the texts, or if there are none the lines of standard input, or with `single` all of
    it.
    """
    if not texts:
        content = sys.stdin.read()
        texts = ([content.strip()] if single
                 else [line for line in content.splitlines() if line.strip()])
    if not any(text.strip() for text in texts):
        raise ValueError("no text is given; pass it as an argument or on standard input")
    return list(texts)
