"""Loading of the model and the input texts of a command."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from transformer_jax.models import Model
    from transformer_jax.pretrained.runs import LoadedRun

ModelArgument = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
"""Type of a parameter for a model: the folder of a run, or a checkpoint."""
TextArguments = Annotated[
    tuple[str, ...], tyro.conf.Positional,
    tyro.conf.arg(metavar="[TEXT ...]", help_behavior_hint="")]
"""Type of a parameter for any number of texts."""


def optional(metavar: str, default: str = "", **options: Any) -> Any:
    """Returns the tyro settings, for `Annotated`, of a flag whose default is None.

    Args:
        metavar: placeholder of the value in the help.
        default: what None means; the help shows it as the default. If empty, the help shows no
            default.
        options: further options of `tyro.conf.arg`.
    """
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, **options)


def load_model(source: str, task: str) -> "LoadedRun":
    """Loads the model, parameters and tokenizer of a run or a checkpoint.

    Args:
        source: folder of a run, or a checkpoint in the Hugging Face format.
        task: task of the head to load from a checkpoint, such as "causal_lm".

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source has no tokenizer, or no head for the task.
    """
    from transformer_jax.pretrained import load_pretrained
    from transformer_jax.pretrained.runs import LoadedRun, is_run, load_run

    if is_run(source):
        return load_run(source)
    model, params, tokenizer = load_pretrained(source, task)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; add its tokenizer.json or vocabulary files")
    return LoadedRun(model, params, tokenizer, [])


def check_family(model: "Model", family: str) -> None:
    """Raises ValueError if a model is not of a family: "GPT", "BERT" or "Transformer"."""
    from transformer_jax import models

    if not isinstance(model, getattr(models, family)):
        raise ValueError(f"the model is a {type(model).__name__}; this command needs a {family}")


def read_texts(texts: Sequence[str], single: bool = False) -> list[str]:
    """Returns the texts, or the texts on standard input if `texts` is empty.

    Args:
        texts: the texts of the command line.
        single: read standard input as one text instead of one text per line.

    Raises:
        ValueError: there is no text.
    """
    if not texts:
        content = sys.stdin.read()
        texts = ([content.strip()] if single
                 else [line for line in content.splitlines() if line.strip()])
    if not any(text.strip() for text in texts):
        raise ValueError("no text is given; pass it as an argument or on standard input")
    return list(texts)
