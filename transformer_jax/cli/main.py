"""The `transformer-jax` command line, also `python -m transformer_jax`.

A command is a function: its name is that of the command, its parameters are the arguments and
flags, and its docstring is the help. JAX is imported only when a command runs, so that `--help`
does not wait for it.
"""

import sys
from collections.abc import Callable, Sequence

from transformer_jax import __version__
from transformer_jax.cli import analysis, inference, training
from transformer_jax.cli.command import PROGRAM, UsageError, call_with_arguments, run_command
from transformer_jax.errors import did_you_mean

COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command for command in (
        training.pretrain, training.finetune, inference.evaluate, inference.predict,
        inference.generate, inference.fill, inference.classify, inference.translate,
        inference.summarize, analysis.convert, analysis.report, analysis.plan)}

HELP = """usage: {program} COMMAND [arguments]

The encoder-decoder Transformer, GPT, BERT and BART in JAX.

{commands}

`{program} COMMAND --help` describes a command. MODEL is the folder of a run of this
library, a checkpoint in the Hugging Face format (a folder or an id on the Hugging Face Hub), or
package:NAME/FOLDER, a folder in an installed package. If no TEXT is given, texts are read from
standard input."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command, `sys.argv[1:]` by default, and returns the exit status: 0, 2 for a user
    error, or 130 if interrupted.
    """
    return run_command(_main, list(sys.argv[1:] if arguments is None else arguments))


def _main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        summaries = (f"  {name:<11}{function.__doc__.splitlines()[0]}"
                     for name, function in COMMANDS.items())
        print(HELP.format(program=PROGRAM, commands="\n".join(summaries)))
    elif arguments[0] == "--version":
        print(f"{PROGRAM} {__version__}")
    elif arguments[0] in COMMANDS:
        call_with_arguments(COMMANDS[arguments[0]], arguments[1:])
    else:
        raise UsageError(
            f"unknown command {arguments[0]!r}; {did_you_mean(arguments[0], COMMANDS)}")
