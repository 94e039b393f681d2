"""Commands that write files for other libraries: `convert`."""

from pathlib import Path
from typing import Annotated

import tyro

from transformer_jax.cli.inputs import ModelArgument, optional


def convert(
    model: ModelArgument,
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    /,
    task: Annotated[str | None, optional("STR")] = None,
) -> None:
    """Converts a run or a checkpoint to the Hugging Face format, as safetensors.

        transformer-jax convert runs/bert exported

    Args:
        model: folder of a run or a checkpoint, or an id on the Hugging Face Hub.
        out: output folder.
        task: head to convert, such as causal_lm, masked_lm, seq2seq_lm or classification; by
            default, that of the checkpoint.
    """
    from transformer_jax.pretrained import load_pretrained, save_pretrained
    from transformer_jax.pretrained.runs import is_run, load_run

    found = load_run(model) if is_run(model) else load_pretrained(model, task)
    save_pretrained(out, found.model, found.params, found.tokenizer)
    print(f"{out}: {', '.join(sorted(path.name for path in out.iterdir()))}")
