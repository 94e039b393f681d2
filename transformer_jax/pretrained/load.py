"""Loading of Hugging Face checkpoints and of training runs: `load_pretrained` and `load_run`.

Tensors of a checkpoint are loaded one at a time, the largest first, and placed on their devices
immediately. The host never holds the model twice, and with a mesh each device holds its shard only.
"""

import dataclasses
import importlib.resources
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import storage
from transformer_jax.data import tokenizers
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.errors import did_you_mean
from transformer_jax.models import Config, Model, build_model, config_from_dict, init_params
from transformer_jax.pretrained import safetensors_io, tokenizer
from transformer_jax.pretrained.families import (
    config_from_hf,
    config_num_labels,
    get_family,
    resolve_task,
)
from transformer_jax.pretrained.safetensors_io import INDEX_FILE, WEIGHTS_FILE, TensorEntry
from transformer_jax.pretrained.weight_maps import abstract_params, match_tensors
from transformer_jax.sharding import param_shardings
from transformer_jax.train import checkpointing
from transformer_jax.tree import LoadReport, flatten_paths, unflatten_paths, unstack_layers

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# Files to download from the hub. Repositories may also contain the weights in other formats.
DOWNLOAD_PATTERNS = (CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE,
                     "model-*-of-*.safetensors", *tokenizer.TOKENIZER_FILES)
PACKAGE_PREFIX = "package:"
_TASKS_WITH_LABELS = ("classification", "token_classification")


class Pretrained(NamedTuple):
    """A loaded checkpoint: the result of `load_pretrained`.

    `params` are in float32; `tokenizer` is None if the checkpoint has no supported tokenizer.
    """

    model: Model
    params: dict
    tokenizer: Tokenizer | None


class LoadedRun(NamedTuple):
    """The model of a training run or checkpoint: the result of `load_run` and `load_model`.

    `label_names` are the names of the classes of a run's classifier; empty for other models.
    """

    model: Model
    params: dict
    tokenizer: Tokenizer
    label_names: list[str]


def load_pretrained(
    source: str | Path,
    task: str | None = None,
    num_labels: int | None = None,
    *,
    mesh: Mesh | None = None,
    rng: jax.Array | None = None,
    revision: str | None = None,
    **changes: Any,
) -> Pretrained:
    """Loads a checkpoint in the Hugging Face format.

    Parameters that the checkpoint does not contain are initialized. Their paths, and the names of
    tensors that the model does not use, are printed to standard error.

    Args:
        source: a folder; an id on the Hugging Face hub, such as "openai-community/gpt2"; or
            "package:NAME/FOLDER", a folder inside an installed Python package.
        task: a task of this library (a key of the model's `METHODS`, such as "classification"), a
            class of Transformers ("BertForSequenceClassification") or a pipeline
            ("text-classification"). None for the task of the checkpoint.
        num_labels: number of classes; None for the number in the checkpoint. If the numbers
            differ, a new classifier is initialized.
        mesh: mesh over which the parameters are sharded, as in `sharding.param_shardings`; None
            places them on the first device.
        rng: key to initialize missing parameters; `jax.random.key(0)` if None.
        revision: branch, tag or commit on the hub.
        changes: fields of the model's config to override, such as `dropout_rate=0.0`.

    Raises:
        FileNotFoundError: the source, its weights or a shard does not exist, or the weights are
            only in an unsupported format such as pickle.
        ValueError: a model family, config field or task is not supported, a file is corrupted, or
            the weights contradict config.json. The message names the file or tensor.

    Example:

        >>> import tempfile
        >>> from transformer_jax import models, save_pretrained
        >>> config = models.GPTConfig(vocab_size=30, max_length=16, num_layers=1, d_model=8,
        ...                           num_heads=2, mlp_dim=32, norm_first=True)
        >>> model = models.build_model(config)
        >>> folder = tempfile.mkdtemp()
        >>> init = jax.jit(models.init_params, static_argnums=0)
        >>> save_pretrained(folder, model, init(model, jax.random.key(0)))
        >>> model, params, tokenizer = load_pretrained(folder, dropout_rate=0.0)
        >>> model.task, params["token_embed"]["embedding"].shape
        ('causal_lm', (30, 8))
    """
    folder = _find_folder(source, revision)
    hf_config = _read_config(folder)
    family = get_family(hf_config.get("model_type"))
    entries = safetensors_io.list_tensors(folder)
    hf_config = _with_dtype(hf_config, entries)
    task = _resolve_task(hf_config, task)
    _check_fields(changes, family.config_class)
    model = build_model(config_from_hf(hf_config, **changes),
                        _num_classes(hf_config, task, num_labels), task)
    model = model.clone(hf_config=json.dumps(hf_config))
    rng = jax.random.key(0) if rng is None else rng
    params, report = _load_params(
        entries, hf_config["model_type"], model, mesh, rng, num_labels is not None)
    if report.new or report.unused:
        print(f"{source}: {report}", file=sys.stderr)
    return Pretrained(model, params, tokenizer.load(folder, hf_config))


def load_model(source: str | Path, task: str | None = None, **changes: Any) -> LoadedRun:
    """Loads a run (`load_run`) or a checkpoint with a tokenizer (`load_pretrained`).

    Args:
        source: folder of a run, or the source of a checkpoint.
        task: task of a checkpoint; ignored for a run, which has one head only.
        changes: fields of the model's config to override, such as `dropout_rate=0.0`.

    Raises:
        FileNotFoundError: the source does not exist, or a run is incomplete.
        ValueError: as in `load_pretrained`, or a checkpoint has no tokenizer.
    """
    if is_run(source):
        run = load_run(source)
        return run._replace(model=run.model.clone(config=run.model.config.replace(**changes)))
    pretrained = load_pretrained(source, task, **changes)
    if pretrained.tokenizer is None:
        raise ValueError(f"{source} has no tokenizer; add its tokenizer.json or vocabulary files")
    return LoadedRun(*pretrained, [])


def is_run(folder: str | Path) -> bool:
    """Whether a folder is that of a training run, as opposed to a Hugging Face checkpoint."""
    path = Path(folder) / CONFIG_FILE
    # The file is not parsed, so that `load_run` reports invalid JSON.
    return path.is_file() and b'"label_names"' in path.read_bytes()


def load_run(folder: str | Path) -> LoadedRun:
    """Loads the model, parameters and tokenizer of a training run.

    The run's config.json (`save_run_config`) says how many of the last checkpoints are averaged.

    Raises:
        FileNotFoundError: the folder has no config.json, no tokenizer, or too few checkpoints.
        ValueError: config.json is not valid JSON, or a file is corrupted.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
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
    params = unstack_layers(params)  # the layers are stacked if the run scanned over them
    return LoadedRun(model, params, tokenizers.load(folder / "tokenizer"), label_names)


# Parameters ---------------------------------------------------------------------------------------


def _load_params(
    entries: dict[str, TensorEntry], model_type: str, model: Model, mesh: Mesh | None,
    rng: jax.Array, new_classifier: bool,
) -> tuple[dict, LoadReport]:
    """Loads the parameters from the tensors of a checkpoint, and initializes those without one."""
    abstract = abstract_params(model)
    shapes = {path: leaf.shape for path, leaf in flatten_paths(abstract).items()}
    matched, unused = match_tensors(entries, model_type, model, shapes, new_classifier)
    shardings = dict.fromkeys(shapes) if mesh is None else (
        flatten_paths(param_shardings(abstract, mesh)))
    params: dict[str, Any] = dict.fromkeys(shapes)
    for weight_map, entry in sorted(matched.items(), key=lambda item: -item[1].num_bytes):
        tensor = safetensors_io.load_tensor(entry)
        for path, value in zip(weight_map.paths, weight_map.to_params(tensor, shapes)):
            params[path] = _to_device(value, shardings[path])
    if new := [path for path, value in params.items() if value is None]:
        params |= _init_some(model, rng, new, [shardings[path] for path in new])
    loaded = sorted(params.keys() - set(new))
    return unflatten_paths(params), LoadReport(loaded, new, unused)


def _to_device(value: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Copies a value to the first device, or to the devices of a sharding, in float32."""
    if value.dtype != np.float32 or not value.flags.c_contiguous:
        copy = safetensors_io.aligned_empty(value.shape, np.float32)
        copy[...] = value
        value = copy
    if sharding is None:
        return jax.device_put(value)  # on a CPU, without a copy
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _init_some(
    model: Model, rng: jax.Array, paths: list[str], shardings: list
) -> dict[str, jax.Array]:
    """Initializes the given parameters; XLA eliminates the initialization of the others."""

    def init(rng):
        params = flatten_paths(init_params(model, rng))
        return {path: params[path] for path in paths}

    out_shardings = None if shardings[0] is None else dict(zip(paths, shardings))
    return jax.jit(init, out_shardings=out_shardings)(rng)


# Files and options --------------------------------------------------------------------------------


def _find_folder(source: str | Path, revision: str | None) -> Path:
    """The folder of a checkpoint, which is downloaded if the source is an id on the hub."""
    name = str(source)
    if name.startswith(PACKAGE_PREFIX):
        return _find_in_package(name.removeprefix(PACKAGE_PREFIX))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; give the folder of a checkpoint, which contains "
                         f"{CONFIG_FILE}")
    if isinstance(source, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{source} does not exist; give the folder of a checkpoint, or an "
                                "id on the hub such as openai-community/gpt2")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(DOWNLOAD_PATTERNS)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{name} is not a folder, and its download from the hub failed "
                                f"({type(error).__name__}: {reason})") from None


def _find_in_package(name: str) -> Path:
    """The folder in an installed package, given as NAME or NAME/FOLDER."""
    package, _, subfolder = name.partition("/")
    try:
        root = Path(str(importlib.resources.files(package)))
    except (ModuleNotFoundError, TypeError, ValueError):
        raise FileNotFoundError(f"{PACKAGE_PREFIX}{name}: the package {package!r} is not "
                                "installed; install it, or give a folder") from None
    folder = root / subfolder
    if not folder.resolve().is_relative_to(root.resolve()) or not folder.is_dir():
        raise FileNotFoundError(f"{PACKAGE_PREFIX}{name}: the package {package} has no folder "
                                f"{subfolder!r}")
    return folder


def _read_config(folder: Path) -> dict[str, Any]:
    """The fields of config.json, with those of generation_config.json as one field."""
    path, generation_path = folder / CONFIG_FILE, folder / GENERATION_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the folder of a checkpoint must contain "
                                f"{CONFIG_FILE} and {WEIGHTS_FILE}")
    hf_config = storage.read_json(path)
    if generation_path.is_file():
        hf_config["generation_config"] = storage.read_json(generation_path)
    return hf_config


def _with_dtype(hf_config: dict[str, Any], entries: dict[str, TensorEntry]) -> dict[str, Any]:
    """Sets the dtype in config.json, to which `save_pretrained` casts, to that of the weights.

    It is float32, the dtype of the loaded parameters, if the weights have several dtypes.
    """
    dtypes = {entry.dtype for entry in entries.values() if entry.dtype.kind in "fV"}
    if not dtypes:
        raise ValueError("the weights have no tensor with a floating-point dtype; download them "
                         "again")
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    return hf_config | {"torch_dtype" if "torch_dtype" in hf_config else "dtype": dtype.name}


def _resolve_task(hf_config: dict[str, Any], task: str | None) -> str:
    """The given task, or that of the checkpoint if it is None."""
    model_type = hf_config["model_type"]
    if task is not None:
        return resolve_task(task, model_type)
    architectures = hf_config.get("architectures") or ["base"]
    try:
        return resolve_task(architectures[0], model_type)
    except ValueError as error:
        raise ValueError(f"{error} The task comes from architectures in config.json; give "
                         "task=... to choose another") from None


def _num_classes(hf_config: dict[str, Any], task: str, num_labels: int | None) -> int:
    has_labels = task in _TASKS_WITH_LABELS
    if num_labels is not None and not has_labels:
        raise ValueError(f"num_labels is {num_labels}, but the task {task} has no labels; omit "
                         f"num_labels, or give task={_TASKS_WITH_LABELS[0]!r}")
    if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"num_labels is {num_labels!r}; it must be an integer of at least 1")
    if has_labels:
        return num_labels or config_num_labels(hf_config)
    return {"multiple_choice": 1, "question_answering": 2}.get(task, 0)


def _check_fields(changes: dict[str, Any], config_class: type[Config]) -> None:
    known = {field.name for field in dataclasses.fields(config_class)}
    if unknown := [name for name in changes if name not in known]:
        raise ValueError(f"unknown option {unknown[0]!r} of load_pretrained: "
                         f"{config_class.__name__} has no such field; "
                         f"{did_you_mean(unknown[0], sorted(known))}")
