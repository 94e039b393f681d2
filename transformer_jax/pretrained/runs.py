"""Folders of training runs, which contain config.json, tokenizer/ and checkpoints/.

config.json contains the config, task and number of classes of the model, the names of its labels,
and the number of last checkpoints to average.
"""

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from transformer_jax import storage, tree
from transformer_jax.data import tokenizers
from transformer_jax.models import (
    Config,
    Model,
    build_model,
    config_from_dict,
    config_to_dict,
    init_params,
)
from transformer_jax.pretrained.load import load_pretrained
from transformer_jax.train import checkpoint_files, checkpointing


class LoadedRun(NamedTuple):
    """The model of a training run or checkpoint: the result of `load_run` and `load_model`.

    Attributes:
        model: the model.
        params: its parameters.
        tokenizer: its tokenizer.
        label_names: names of the classes of a run's classifier, in the order of their ids; empty
            for other models and for checkpoints.
    """

    model: Model
    params: dict
    tokenizer: tokenizers.Tokenizer
    label_names: list[str]


def save_run_config(
    out: str | Path,
    config: Config,
    tokenizer: tokenizers.Tokenizer,
    label_names: Sequence[str] = (),
    num_averaged_checkpoints: int = 1,
    task: str | None = None,
    num_classes: int | None = None,
    hf_config: str = "",
) -> None:
    """Saves config.json and the tokenizer of a training run.

    A manifest with the checksums of the tokenizer's files is saved too, which `tokenizers.load`
    verifies. The parameters are not saved here; the training loop saves them in
    `<out>/checkpoints`.

    Args:
        out: the folder of the run.
        config: the model's config.
        tokenizer: the tokenizer.
        label_names: names of the classes of a classifier.
        num_averaged_checkpoints: number of last checkpoints; `load_run` averages their parameters.
        task: the model's task; if None, classification if there are label names, otherwise the
            pre-training task.
        num_classes: number of classes of the model's head; if None, the number of label names.
        hf_config: the model's attribute of this name.

    Raises:
        ValueError: the folder has checkpoints of a model with other parameters; nothing is changed.

    Example:

        >>> import tempfile
        >>> from transformer_jax.models import presets
        >>> folder = tempfile.mkdtemp()
        >>> save_run_config(folder, presets.get("gpt2"), tokenizers.train_chars(["abc"]))
        >>> is_run(folder)
        True
    """
    out = Path(out)
    _check_checkpoints_fit(out, config)
    out.mkdir(parents=True, exist_ok=True)
    run_config = {
        "model": config_to_dict(config) | {"source": hf_config}, "label_names": list(label_names),
        "average": num_averaged_checkpoints, "task": task, "num_classes": num_classes}
    (out / "config.json").write_text(json.dumps(run_config, indent=2) + "\n")
    tokenizer.save(out / "tokenizer")
    storage.write_manifest(out / "tokenizer")


def _check_checkpoints_fit(out: Path, config: Config) -> None:
    """Raises ValueError if the folder has checkpoints of a model with other parameter shapes."""
    path = out / "config.json"
    if not path.is_file() or not checkpoint_files.saved_steps(out / "checkpoints"):
        return
    try:
        saved = config_from_dict(storage.read_json(path)["model"])
    except ValueError:
        return  # invalid JSON is overwritten, so that the run can be resumed
    if saved == config or _param_shapes(saved) == _param_shapes(config):
        return
    then, now = config_to_dict(saved), config_to_dict(config)
    changes = "; ".join(f"{name} was {then.get(name)} and is {now.get(name)}"
                        for name in sorted(then.keys() | now.keys())
                        if then.get(name) != now.get(name))
    raise ValueError(f"{out} has checkpoints of another model: {changes}; use the same model "
                     "settings or another output folder")


def _param_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    params = jax.eval_shape(functools.partial(init_params, build_model(config)), jax.random.key(0))
    return {name: leaf.shape for name, leaf in tree.flatten_paths(params).items()}


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a training run, as opposed to a Hugging Face checkpoint."""
    path = Path(folder) / "config.json"
    # The file is not parsed, so that `load_run` reports invalid JSON.
    return path.is_file() and b'"label_names"' in path.read_bytes()


def load_model(source: str | Path, task: str | None = None, **changes: Any) -> LoadedRun:
    """Loads the model, parameters and tokenizer of a run or of a checkpoint.

    Args:
        source: folder of a run, or a checkpoint in the Hugging Face format; see `load_pretrained`.
        task: task of the head to load from a checkpoint, such as "causal_lm"; None for its own.
            Ignored for a run, which has one head only.
        changes: fields of the model's config to override, such as `dropout_rate=0.0`.

    Raises:
        FileNotFoundError: the source does not exist, or a run is incomplete (see `load_run`).
        ValueError: a checkpoint has no tokenizer or its model family does not support the task, or
            a file is corrupted.
    """
    if is_run(source):
        run = load_run(source)
        return run._replace(model=run.model.clone(config=run.model.config.replace(**changes)))
    model, params, tokenizer = load_pretrained(source, task, **changes)
    if tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; add its tokenizer.json or vocabulary files")
    return LoadedRun(model, params, tokenizer, [])


def load_run(folder: str | Path) -> LoadedRun:
    """Loads the model, parameters and tokenizer of a training run.

    Raises:
        FileNotFoundError: the folder has no config.json, no tokenizer, or too few checkpoints.
        ValueError: config.json is not valid JSON, or a file is corrupted.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the --out folder of a finished run")
    # Older runs lack the last three fields.
    defaults = {"average": 1, "task": None, "num_classes": None}
    run_config = defaults | storage.read_json(path)
    label_names, num_classes = run_config["label_names"], run_config["num_classes"]
    model = build_model(
        config_from_dict(run_config["model"]),
        len(label_names) if num_classes is None else num_classes,
        run_config["task"] or ("classification" if label_names else None))
    model = model.clone(hf_config=run_config["model"].get("source", ""))
    params = checkpointing.average_params(folder / "checkpoints", run_config["average"])
    params = tree.unstack_layers(params)  # the layers are stacked if the run scanned over them
    return LoadedRun(model, params, tokenizers.load(folder / "tokenizer"), label_names)
