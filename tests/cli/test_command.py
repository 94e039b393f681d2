"""Running functions as commands: arguments, errors and exit status."""

import pytest
import tyro

from transformer_jax.cli.command import (
    UsageError,
    call_with_arguments,
    parse_arguments,
    run_command,
)
from transformer_jax.errors import is_user_error


def fail_with(error):
    raise error


@pytest.mark.parametrize("error", [
    ValueError("rate is 2;\n  lower it"), FileNotFoundError("rate is 2; lower it"),
    ModuleNotFoundError("rate is 2; lower it", name="sacrebleu"),
    FloatingPointError("rate is 2; lower it"), UsageError("rate is 2; lower it")])
def test_user_errors_are_one_line(error, capsys):
    assert run_command(fail_with, error) == 2
    assert capsys.readouterr().err == "error: rate is 2; lower it\n"


@pytest.mark.parametrize("error", [
    TypeError("x"), KeyError("x"), AssertionError("x"), RuntimeError("x"),
    ModuleNotFoundError("No module named x", name="transformer_jax.x")])
def test_bugs_are_raised(error):
    with pytest.raises(type(error)):
        run_command(fail_with, error)


def test_value_errors_of_jax_are_bugs():
    import jax

    with pytest.raises(ValueError) as caught:
        jax.numpy.concatenate([])
    assert not is_user_error(caught.value)


def test_interruption_and_success(capsys):
    assert run_command(fail_with, KeyboardInterrupt()) == 130
    assert run_command(print, "done") == 0
    assert capsys.readouterr().out == "done\n"


def train(steps: int = 3, name: str = "a"):
    """Trains."""
    print(steps, name)


def test_function_is_called_with_the_parsed_value(capsys):
    assert run_command(print, parse=lambda: parse_arguments(int, ["4"], prog="x")) == 0
    assert capsys.readouterr().out == "4\n"
    assert run_command(print, parse=lambda: tyro.cli(train, args=["--step", "4"])) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error: Unrecognized options: --step, 4; did you mean --steps?\n"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--steps", "x"], "Error parsing --steps: invalid literal for int() with base 10: 'x'"),
    (["--steps"], "Missing value for argument '--steps'. Expected 1 values"),
    (["y"], "Unrecognized options: y")])
def test_usage_errors_have_one_line(arguments, message):
    with pytest.raises(UsageError) as caught:
        call_with_arguments(train, arguments)
    assert str(caught.value) == message


def with_flags(rate: float = 0.5, flags: tyro.conf.Suppress[tuple[str, ...]] = ()):
    """Trains.

    Args:
        rate: the rate.
        flags: further flags.
    """
    print(rate, *flags)


def test_unknown_flags_are_passed_on(capsys):
    call_with_arguments(with_flags, ["--rate", "2", "--model.size", "3", "--fast"])
    assert capsys.readouterr().out == "2.0 --model.size 3 --fast\n"
    call_with_arguments(with_flags, ["--help-all"])
    assert capsys.readouterr().out == "Trains.\n\n0.5 --help\n"
    with pytest.raises(SystemExit):
        call_with_arguments(with_flags, ["--help"])
    out = capsys.readouterr().out
    assert "--rate FLOAT" in out and "the rate." in out and "further" not in out
