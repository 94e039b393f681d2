"""Loading of Hugging Face checkpoints: `load_pretrained` returns model, parameters and tokenizer.

A checkpoint is a folder with config.json, safetensors and the files of a tokenizer. Tensors are
loaded one at a time, the largest first, and placed on their device or devices immediately. The host
never holds the model twice, and with a mesh each device holds only its shard.
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
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.errors import did_you_mean
from transformer_jax.models import Config, Model, build_model, init_params
from transformer_jax.pretrained import safetensors_io, tokenizer, weight_maps
from transformer_jax.pretrained.config_conversion import config_from_hf, config_num_labels
from transformer_jax.pretrained.families import FAMILIES, get_family, resolve_task
from transformer_jax.pretrained.safetensors_io import INDEX_FILE, WEIGHTS_FILE, TensorEntry
from transformer_jax.pretrained.weight_maps import WeightMap
from transformer_jax.sharding import param_shardings
from transformer_jax.tree import LoadReport, flatten_paths, unflatten_paths

# Modules that are initialized if the checkpoint omits them, because models for other tasks do not
# have them.
HEAD_MODULES = ("pooler", "classifier", "mlm_head", "nsp_head", "lm_head", "output")
CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
# Files to download from the hub. Repositories may also contain the weights in other formats.
DOWNLOAD_PATTERNS = (CONFIG_FILE, GENERATION_CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE,
                     "model-*-of-*.safetensors", *tokenizer.TOKENIZER_FILES)
PACKAGE_PREFIX = "package:"
_TASKS_WITH_LABELS = ("classification", "token_classification")


class Pretrained(NamedTuple):
    """A loaded checkpoint: the result of `load_pretrained`.

    Attributes:
        model: the model.
        params: its parameters, in float32.
        tokenizer: its tokenizer; None if the checkpoint has no supported tokenizer.
    """

    model: Model
    params: dict
    tokenizer: Tokenizer | None


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
        task: the task, which determines the head: a task of this library (a key of the model's
            `METHODS`, such as "classification"), a class of Transformers
            ("BertForSequenceClassification") or a pipeline ("text-classification"). None for the
            task of the checkpoint.
        num_labels: number of classes of a classifier; None for the number in the checkpoint. If
            the numbers differ, a new classifier is initialized.
        mesh: mesh over which the parameters are sharded, as in `sharding.param_shardings`; None
            places them on the first device.
        rng: key to initialize parameters that the checkpoint does not contain, such as those of a
            new classifier; `jax.random.key(0)` if None.
        revision: branch, tag or commit on the hub.
        changes: fields of the model's config to override, such as `dropout_rate=0.0` or
            `dtype="bfloat16"`.

    Raises:
        FileNotFoundError: the source, its weights or a shard does not exist, or the weights are
            only in an unsupported format such as pickle.
        ValueError: a model family, config field or task is not supported, a file is corrupted, or
            the weights contradict config.json. The message names the file or tensor.

    Example:

        >>> import tempfile
        >>> from transformer_jax import models, save_pretrained
        >>> config = models.presets.get("gpt2", num_layers=1, d_model=8, num_heads=2, mlp_dim=32,
        ...                             vocab_size=30, max_length=16)
        >>> model = models.build_model(config, task="causal_lm")
        >>> shapes = jax.eval_shape(lambda rng: models.init_params(model, rng), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        >>> folder = tempfile.mkdtemp()
        >>> save_pretrained(folder, model, params)
        >>> model, params, tokenizer = load_pretrained(folder, dropout_rate=0.0)
        >>> model.task, params["token_embed"]["embedding"].shape
        ('causal_lm', (30, 8))
    """
    folder = _find_folder(source, revision)
    hf_config = _read_config(folder)
    entries = safetensors_io.list_tensors(folder)
    hf_config = _with_dtype(hf_config, entries)
    task = _resolve_task(hf_config, task)
    _check_fields(changes, get_family(hf_config["model_type"]).config_class)
    model = build_model(config_from_hf(hf_config, **changes),
                        _num_classes(hf_config, task, num_labels), task)
    model = model.clone(hf_config=json.dumps(hf_config))
    rng = jax.random.key(0) if rng is None else rng
    params, report = _load_params(entries, hf_config["model_type"], model, mesh, rng,
                                  new_classifier=num_labels is not None)
    if report.new or report.unused:
        print(f"{source}: {report}", file=sys.stderr)
    return Pretrained(model, params, tokenizer.load(folder, hf_config))


def _load_params(
    entries: dict[str, TensorEntry], model_type: str, model: Model, mesh: Mesh | None,
    rng: jax.Array, *, new_classifier: bool,
) -> tuple[dict, LoadReport]:
    """Loads the parameters from the tensors of a checkpoint, and initializes those without one."""
    abstract_params = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_paths(abstract_params).items()}
    matched, unused = match_tensors(entries, model_type, model.task, model.config, shapes,
                                    new_classifier=new_classifier)
    shardings = dict.fromkeys(shapes) if mesh is None else (
        flatten_paths(param_shardings(abstract_params, mesh)))
    params: dict[str, Any] = dict.fromkeys(shapes)
    for weight_map, entry in sorted(matched.items(), key=lambda item: -item[1].num_bytes):
        tensor = safetensors_io.load_tensor(entry)
        for path, value in zip(weight_map.paths, weight_map.to_params(tensor, shapes)):
            params[path] = _to_device(value, shardings[path])
    if new := [path for path, value in params.items() if value is None]:
        params |= _init_some(model, rng, new, [shardings[path] for path in new])
    loaded = sorted(params.keys() - set(new))
    return unflatten_paths(params), LoadReport(loaded, new, unused)


def match_tensors(
    entries: dict[str, TensorEntry], model_type: str, task: str, config: Config,
    shapes: dict[str, tuple[int, ...]], *, new_classifier: bool = False,
) -> tuple[dict[WeightMap, TensorEntry], list[str]]:
    """Assigns the tensors of a checkpoint to the parameters of a model.

    Args:
        entries: tensor name -> entry.
        model_type: the model family.
        task: the model's task.
        config: the model's config.
        shapes: path -> shape of the model's parameters.
        new_classifier: whether a classifier of another shape is ignored, so that a new one is
            initialized. If False, it is rejected.

    Returns:
        (weight map -> entry of its tensor, sorted names of unused tensors).

    Raises:
        ValueError: a parameter outside the heads has no tensor, a tensor has another shape or dtype
            than the model requires, two tensor names denote the same tensor, or there are
            tensors of more layers than the config has.
    """
    base_prefix = FAMILIES[model_type].base_prefix
    names: dict[str, str] = {}  # canonical name -> name in the file
    for name in entries:
        canonical = weight_maps.canonical_name(name, base_prefix)
        if canonical in names:
            raise ValueError(f"the weights have both {names[canonical]!r} and {name!r}, which are "
                             "names of the same tensor; remove one of them")
        names[canonical] = name
    matched, used = {}, set()
    for weight_map in weight_maps.for_model(model_type, task, config, shapes):
        present = [alias for alias in (_short_name(weight_map), *weight_map.aliases)
                   if alias in names]
        used.update(present)
        if not present:
            continue
        name = names[present[0]]
        entry, shape = entries[name], weight_map.hf_shape(shapes)
        if (entry.shape != shape and new_classifier
                and weight_map.paths[0].startswith("classifier/")):
            used.discard(present[0])
            continue
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {entry.shape}, but config.json requires {shape}; "
                             "the weights and config.json belong to different models")
        if entry.dtype.kind not in "fV":  # V: bfloat16
            raise ValueError(f"{name} has dtype {entry.dtype}; parameters must have a "
                             "floating-point dtype")
        matched[weight_map] = entry
    _check_position_tables(entries, names, config)
    _check_complete(matched, config, shapes)
    table_names = {_short_name(table) for table in weight_maps.POSITION_TABLES}
    unused = sorted(names[canonical] for canonical in names.keys() - used
                    if not weight_maps.IGNORED_BUFFERS.search(canonical)
                    and not (canonical in table_names and config.positions != "learned"))
    num_layers = max(weight_maps.num_layers(config).values())
    for name in unused:
        if (weight_maps.layer_index(name) or 0) >= num_layers:
            raise ValueError(f"the weights contain {name}, but the model of config.json has "
                             f"{num_layers} layers; they belong to different models")
    return matched, unused


def _short_name(weight_map: WeightMap | weight_maps.PositionTable) -> str:
    return weight_map.hf_name.removeprefix("{base}")


def _check_complete(matched: dict[WeightMap, TensorEntry], config: Config, shapes: dict) -> None:
    """Raises ValueError if parameters outside the heads have no tensor."""
    loaded = {path for weight_map in matched for path in weight_map.paths}
    missing_params = [path for path in shapes
                      if path not in loaded and path.partition("/")[0] not in HEAD_MODULES]
    if missing_params:
        raise ValueError(f"the weights have no tensors for {len(missing_params)} of {len(shapes)} "
                         f"parameters, such as {missing_params[0]}; the model of config.json has "
                         f"{config.num_layers} layers; the weights and config.json belong to "
                         "different models")


def _check_position_tables(
    entries: dict[str, TensorEntry], names: dict[str, str], config: Config
) -> None:
    """Raises ValueError if position tables differ from the sinusoids that the model computes."""
    if config.positions == "learned":
        return
    for table in weight_maps.POSITION_TABLES:
        name = names.get(_short_name(table))
        if name is None:
            continue
        expected, entry = weight_maps.sinusoidal_table(config), entries[name]
        if entry.shape != expected.shape or not np.allclose(
                safetensors_io.load_tensor(entry).astype(np.float32), expected, atol=0.01):
            raise ValueError(f"unsupported learned positions {name} of shape {entry.shape}; "
                             f"supported: the sinusoids of {config.max_length} positions")


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


def _find_folder(source: str | Path, revision: str | None) -> Path:
    """Returns the folder of a checkpoint, and downloads it if the source is an id on the hub."""
    if str(source).startswith(PACKAGE_PREFIX):
        return _find_in_package(str(source).removeprefix(PACKAGE_PREFIX))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; give the folder of a checkpoint, which contains "
                         f"{CONFIG_FILE}")
    name = str(source)
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
    """Returns the checkpoint folder in an installed package, given as NAME or NAME/FOLDER."""
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
    """Returns the fields of config.json, with those of generation_config.json as one field."""
    path, generation_path = folder / CONFIG_FILE, folder / GENERATION_CONFIG_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the folder of a checkpoint must contain "
                                f"{CONFIG_FILE} and {WEIGHTS_FILE}")
    hf_config = storage.read_json(path)
    if generation_path.is_file():
        hf_config["generation_config"] = storage.read_json(generation_path)
    get_family(hf_config.get("model_type"))  # raises ValueError if it is not supported
    return hf_config


def _resolve_task(hf_config: dict[str, Any], task: str | None) -> str:
    """Returns the given task, or the task of the checkpoint if it is None."""
    model_type = hf_config["model_type"]
    if task is not None:
        return resolve_task(task, model_type)
    architectures = hf_config.get("architectures") or []
    if not architectures:
        return resolve_task("base", model_type)
    try:
        return resolve_task(architectures[0], model_type)
    except ValueError as error:
        raise ValueError(f"{error} The task comes from architectures in config.json; give "
                         "task=... to choose another") from None


def _num_classes(hf_config: dict[str, Any], task: str, num_labels: int | None) -> int:
    if num_labels is not None and task not in _TASKS_WITH_LABELS:
        raise ValueError(f"num_labels is {num_labels}, but the task {task} has no labels; omit "
                         f"num_labels, or give task={_TASKS_WITH_LABELS[0]!r}")
    if num_labels is not None and (not isinstance(num_labels, int) or num_labels < 1):
        raise ValueError(f"num_labels is {num_labels!r}; it must be an integer of at least 1")
    if task in _TASKS_WITH_LABELS:
        return num_labels or config_num_labels(hf_config)
    return {"multiple_choice": 1, "question_answering": 2}.get(task, 0)


def _check_fields(changes: dict[str, Any], config_class: type[Config]) -> None:
    known = {field.name for field in dataclasses.fields(config_class)}
    for name in changes:
        if name not in known:
            raise ValueError(f"unknown option {name!r} of load_pretrained: "
                             f"{config_class.__name__} has no such field; "
                             f"{did_you_mean(name, sorted(known))}")


def _with_dtype(hf_config: dict[str, Any], entries: dict[str, TensorEntry]) -> dict[str, Any]:
    """Sets the dtype in the fields of config.json to that of the weights.

    `save_pretrained` casts the parameters to this dtype.
    """
    dtypes = {entry.dtype for entry in entries.values() if entry.dtype.kind in "fV"}
    if not dtypes:
        raise ValueError("the weights have no tensor with a floating-point dtype; download them "
                         "again")
    # Weights with several dtypes are saved in float32, the dtype of the loaded parameters.
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
    return hf_config if hf_config.get(key) == dtype.name else {**hf_config, key: dtype.name}
