"""The folder of a training run: config.json, tokenizer/ and checkpoints/.

The card in config.json says which model the parameters are of, what its labels are called, and how
many of the last checkpoints to average.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from transformer_jax import storage, tree
from transformer_jax.data import tokenizers
from transformer_jax.models import Config, Model, build_model, config_from_dict, config_to_dict
from transformer_jax.train import checkpointing


class LoadedRun(NamedTuple):
    """What a finished run gives to the next: see `load_run`."""

    model: Model
    params: dict
    tokenizer: tokenizers.Tokenizer
    label_names: list[str]  # of a classifier


def save_run_config(
    out: str | Path,
    config: Config,
    tokenizer: tokenizers.Tokenizer,
    label_names: Sequence[str] = (),
    average: int = 1,
    task: str | None = None,
    num_classes: int | None = None,
) -> None:
    """config.json and the tokenizer's files, with their digests, which `tokenizers.load` holds
    them to; parameters are in `<out>/checkpoints`.

    `task` and `num_classes` are those of the model's head; None: classification by `label_names`,
    or pre-training where there are none.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    card = {"model": config_to_dict(config), "label_names": list(label_names), "average": average,
            "task": task, "num_classes": num_classes}
    (out / "config.json").write_text(json.dumps(card, indent=2) + "\n")
    tokenizer.save(out / "tokenizer")
    storage.write_manifest(out / "tokenizer")


def is_run(folder: str | Path) -> bool:
    """Whether `load_run` would read the folder."""
    card = Path(folder) / "config.json"
    # Whatever is wrong with the file is said by whoever reads it.
    return card.is_file() and b'"label_names"' in card.read_bytes()


def load_run(folder: str | Path) -> LoadedRun:
    """The model of a run's folder with its parameters and tokenizer.

    Raises:
        FileNotFoundError: there is no finished run in the folder.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the --out folder of a finished run")
    card = json.loads(path.read_text())
    labels = card["label_names"]
    width = card.get("num_classes")
    model = build_model(config_from_dict(card["model"]), len(labels) if width is None else width,
                        card.get("task") or ("classification" if labels else None))
    params = checkpointing.average_params(folder / "checkpoints", card.get("average", 1))
    params = tree.unstack_layers(params)  # of a run that scanned over its layers
    return LoadedRun(model, params, tokenizers.load(folder / "tokenizer"), labels)
