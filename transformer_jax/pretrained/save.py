"""Saving of Hugging Face checkpoints and of the config of runs: `save_pretrained`."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from transformer_jax import storage
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Config, Model, build_model, config_from_dict, config_to_dict
from transformer_jax.pretrained import safetensors_io, weight_maps
from transformer_jax.pretrained.families import config_to_hf
from transformer_jax.pretrained.load import CONFIG_FILE, GENERATION_CONFIG_FILE
from transformer_jax.pretrained.safetensors_io import TensorSpec
from transformer_jax.pretrained.weight_maps import WeightMap, param_shapes
from transformer_jax.train import checkpoint_files
from transformer_jax.tree import flatten_paths

SHARD_BYTES = 5_000_000_000
_DTYPES = {dtype.name: dtype for dtype in safetensors_io.DTYPES.values() if dtype.kind in "fV"}


def save_pretrained(
    path: str | Path,
    model: Model,
    params: dict,
    tokenizer: Tokenizer | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Saves a model as a folder that Transformers and `load_pretrained` can load.

    If the model was loaded from a checkpoint, its attribute `hf_config` stores that checkpoint's
    dtype, config.json and generation_config.json. The new checkpoint has the same ones, except for
    fields that were changed. Other models are saved in float32.

    Args:
        path: the folder, which is created if needed.
        model: the model.
        params: its parameters, without PEFT parameters; see `finetuning.peft.merge`.
        tokenizer: its tokenizer; None saves no tokenizer.
        shard_bytes: largest size of a weight file, in bytes. Larger weights are split into shards.

    Raises:
        ValueError: the model family does not support the config or task, or `params` do not belong
            to the model. The message names the field or parameter.

    Example:

        >>> import os, tempfile, jax
        >>> from transformer_jax import models
        >>> model = models.build_model(models.presets.bert_tiny(num_layers=1, vocab_size=30))
        >>> folder = tempfile.mkdtemp()
        >>> save_pretrained(folder, model, models.init_params(model, jax.random.key(0)))
        >>> sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    leaves = flatten_paths(params)
    shapes = param_shapes(model)
    _check_params(leaves, shapes, model)
    hf_config = config_to_hf(model)
    generation_config = hf_config.pop("generation_config", None)
    dtype = _DTYPES.get(hf_config.get("torch_dtype") or hf_config.setdefault("dtype", "float32"),
                        np.dtype(np.float32))
    sources = _tensor_sources(model, hf_config["model_type"], shapes, dtype)
    specs = sorted(sources)

    def iter_values() -> Iterator[np.ndarray]:
        for source in map(sources.get, specs):
            if isinstance(source, WeightMap):
                source = source.to_hf(leaves)
            yield source

    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_io.save_tensors(folder, specs, iter_values(), shard_bytes)
    _save_json(folder / CONFIG_FILE, hf_config)
    if generation_config is not None:
        _save_json(folder / GENERATION_CONFIG_FILE, generation_config)
    if tokenizer is not None:
        tokenizer.save(folder)


def _tensor_sources(
    model: Model, model_type: str, shapes: dict[str, tuple[int, ...]], dtype: np.dtype
) -> dict[TensorSpec, WeightMap | np.ndarray]:
    """Spec of a tensor -> its values, or the weight map that computes them from the parameters."""
    maps = weight_maps.for_model(model_type, model, shapes)
    weight_maps.check_all_mapped(maps, model_type, model, shapes)
    sources = {TensorSpec(m.hf_name, dtype, m.hf_shape(shapes)): m for m in maps}
    if model.task in weight_maps.TASKS_WITH_POSITION_TABLES.get(model_type, ()):
        table = weight_maps.sinusoidal_table(model.config)
        base = weight_maps.base_prefix(model_type, model.task)
        sources |= {TensorSpec(base + name, dtype, table.shape): table
                    for name in weight_maps.POSITION_TABLES}
    if model.task == "seq2seq_lm" and "output/bias" not in shapes:
        shape = (1, model.config.vocab_size)
        sources[TensorSpec("final_logits_bias", dtype, shape)] = np.zeros(shape)
    return sources


def _check_params(leaves: dict, shapes: dict[str, tuple[int, ...]], model: Model) -> None:
    """Raises ValueError unless paths and shapes of the parameters are those of the model."""
    model_name = f"a {type(model).__name__} for {model.task}"
    for name in sorted(shapes.keys() | leaves.keys()):
        if name not in leaves:
            problem = f"have no {name}, which {model_name} has"
        elif name not in shapes:
            problem = f"have {name}, which {model_name} does not have"
        elif np.shape(leaves[name]) != shapes[name]:
            problem = (f"have {name} of shape {np.shape(leaves[name])}, but that of {model_name} "
                       f"has shape {shapes[name]}")
        else:
            continue
        raise ValueError(f"params {problem}; give the params of this model")


def _save_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_run_config(
    out: str | Path,
    config: Config,
    tokenizer: Tokenizer,
    label_names: Sequence[str] = (),
    num_averaged_checkpoints: int = 1,
    task: str | None = None,
    num_classes: int | None = None,
    hf_config: str = "",
) -> None:
    """Saves config.json and the tokenizer of a training run, with a manifest of checksums.

    The training loop saves the parameters in `<out>/checkpoints`. `load_run` loads all of it.

    Args:
        out: the folder of the run.
        config: the model's config.
        tokenizer: the tokenizer.
        label_names: names of the classes of a classifier.
        num_averaged_checkpoints: number of last checkpoints whose parameters `load_run` averages.
        task: the model's task; if None, classification if there are label names, otherwise the
            pre-training task.
        num_classes: number of classes of the model's head; if None, the number of label names.
        hf_config: the model's attribute of this name.

    Raises:
        ValueError: the folder has checkpoints of a model with other parameters; nothing is changed.

    Example:

        >>> import tempfile
        >>> from transformer_jax import data, models, pretrained
        >>> folder, tokenizer = tempfile.mkdtemp(), data.tokenizers.train_chars(["abc"])
        >>> save_run_config(folder, models.presets.gpt2(), tokenizer)
        >>> pretrained.is_run(folder)
        True
    """
    out = Path(out)
    _check_checkpoints_fit(out, config)
    out.mkdir(parents=True, exist_ok=True)
    run_config = {
        "model": config_to_dict(config) | {"source": hf_config}, "label_names": list(label_names),
        "average": num_averaged_checkpoints, "task": task, "num_classes": num_classes}
    (out / CONFIG_FILE).write_text(json.dumps(run_config, indent=2) + "\n")
    tokenizer.save(out / "tokenizer")
    storage.write_manifest(out / "tokenizer")


def _check_checkpoints_fit(out: Path, config: Config) -> None:
    """Raises ValueError if the folder has checkpoints of a model with other parameter shapes."""
    path = out / CONFIG_FILE
    if not path.is_file() or not checkpoint_files.saved_steps(out / "checkpoints"):
        return
    try:
        saved = config_from_dict(storage.read_json(path)["model"])
    except ValueError:
        return  # invalid JSON is overwritten, so that the run can be resumed
    if saved == config or param_shapes(build_model(saved)) == param_shapes(build_model(config)):
        return
    then, now = config_to_dict(saved), config_to_dict(config)
    changes = "; ".join(f"{name} was {then.get(name)} and is {now.get(name)}"
                        for name in sorted(then.keys() | now.keys())
                        if then.get(name) != now.get(name))
    raise ValueError(f"{out} has checkpoints of another model: {changes}; use the same model "
                     "settings or another output folder")
