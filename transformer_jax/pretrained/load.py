"""Checkpoints in the Hugging Face format become a model, its parameters and a tokenizer.

A checkpoint is a folder with config.json, safetensors and a tokenizer's files. Tensors are read one
at a time, the largest first, and put where they stay at once: the host never holds the model twice,
and on a mesh no device more than its share.
"""

import dataclasses
import difflib
import importlib.resources
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from transformer_jax import storage
from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Config, Model, build_model, init_params
from transformer_jax.pretrained import safetensors_io, tokenizer, weight_maps
from transformer_jax.pretrained.families import (
    FAMILIES,
    find_family,
    find_task,
    num_labels,
    read_config,
)
from transformer_jax.sharding import param_shardings
from transformer_jax.tree import LoadReport, flatten_paths, unflatten_paths

# What a checkpoint may lack: the parts on top, which another task has not trained.
HEADS = ("pooler", "classifier", "mlm_head", "nsp_head", "lm_head", "output")
CONFIG = "config.json"
GENERATION = "generation_config.json"
# Of a hub's repository only these are fetched: not the same weights in three formats.
NEEDED = (CONFIG, GENERATION, safetensors_io.WEIGHTS, safetensors_io.INDEX, "model-*-of-*.safetensors",
          *tokenizer.FILES)
PACKAGE = "package:"
_CLASSIFIED = ("classification", "token_classification")


class Pretrained(NamedTuple):
    """What `load_pretrained` gives."""

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
    """The model of a checkpoint with the head of `task`, float32 parameters, and its tokenizer.

    Args:
        source: a folder, an id on the Hugging Face hub, such as "openai-community/gpt2", or
            "package:NAME/FOLDER", a folder inside an installed package.
        task: a task of the model's METHODS ("classification"), a class of Transformers
            ("BertForSequenceClassification") or a pipeline ("text-classification"); None for that
            of the checkpoint.
        num_labels: classes of a classifier; None for the checkpoint's number. Another number than
            the checkpoint's makes a new classifier.
        mesh: puts every parameter where `sharding.param_shardings` has it; None: the first device.
        rng: for parameters that the checkpoint lacks, such as a new classifier's; key(0) if None.
        revision: the hub's branch, tag or commit.
        changes: fields of the model's config, such as `dropout_rate=0.0` or `dtype="bfloat16"`.

    What is new and what was not used is printed to standard error.

    Raises:
        FileNotFoundError: the source, its weights or a shard is missing, or only pickled weights
            are there.
        ValueError: a family, field or task that is not here, a damaged file, or weights that
            contradict config.json; the message names the file or tensor.
    """
    folder = _find(source, revision)
    values = _read_json(folder / CONFIG)
    if (folder / GENERATION).is_file():
        values["generation_config"] = _read_json(folder / GENERATION)
    family = find_family(values.get("model_type"))
    model_type = values["model_type"]
    entries = safetensors_io.open_weights(folder)
    values = _with_dtype(values, entries)
    task = _task(values, task)
    config = read_config(values, **_checked(changes, family.kind))
    model = build_model(config, _num_classes(values, task, num_labels), task)
    abstract = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_paths(abstract).items()}

    found, unused = match(entries, model_type, task, config, shapes,
                          new_classifier=num_labels is not None)
    shardings = dict.fromkeys(shapes) if mesh is None else (
        flatten_paths(param_shardings(abstract, mesh)))
    params: dict[str, Any] = dict.fromkeys(shapes)
    for rule, entry in sorted(found.items(), key=lambda item: -item[1].size):
        for path, value in zip(rule.ours, rule.to_ours(safetensors_io.read(entry), shapes)):
            params[path] = _place(value, shardings[path])
    new = [path for path, value in params.items() if value is None]
    if new:
        rng = jax.random.key(0) if rng is None else rng
        params |= _fresh(model, rng, new, [shardings[path] for path in new])
    if new or unused:
        loaded = sorted(params.keys() - set(new))
        print(f"{source}: {LoadReport(loaded, new, unused)}", file=sys.stderr)
    return Pretrained(model, unflatten_paths(params), tokenizer.load(folder, values))


def match(
    entries: dict[str, safetensors_io.Entry], model_type: str, task: str, config: Config,
    shapes: dict[str, tuple[int, ...]], *, new_classifier: bool = False,
) -> tuple[dict[weight_maps.WeightMap, safetensors_io.Entry], list[str]]:
    """Which tensor holds which parameters, and the names of tensors that hold none.

    Raises:
        ValueError: a parameter below the heads has no tensor, a tensor's shape or type is not what
            the config asks for, or there are more layers than it has.
    """
    base = FAMILIES[model_type].base
    named: dict[str, str] = {}
    for name in entries:
        short = weight_maps.modern(name, base)
        if short in named:
            raise ValueError(f"the weights have both {named[short]!r} and {name!r}, which name the "
                             "same tensor; remove one of them")
        named[short] = name
    found, used = {}, set()
    for rule in weight_maps.rules(model_type, task, config, shapes):
        short = rule.theirs.removeprefix("{base}")
        present = [name for name in (short, *rule.aliases) if name in named]
        used.update(present)
        if not present:
            continue
        name = named[present[0]]
        entry, shape = entries[name], rule.their_shape(shapes)
        if entry.shape != shape and new_classifier and rule.ours[0].startswith("classifier/"):
            used.discard(present[0])
            continue
        if entry.shape != shape:
            raise ValueError(f"{name} has shape {entry.shape}, but config.json asks for {shape}; "
                             "the weights and config.json are not of one model")
        if entry.dtype.kind not in "fV":  # V: bfloat16
            raise ValueError(f"{name} is of type {entry.dtype}; parameters are of a floating type")
        found[rule] = entry
    _check_positions(entries, named, config)
    loaded = {path for rule in found for path in rule.ours}
    lacking = [path for path in shapes
               if path not in loaded and path.partition("/")[0] not in HEADS]
    if lacking:
        raise ValueError(f"the weights lack {len(lacking)} of {len(shapes)} parameters, such as "
                         f"{lacking[0]}; config.json, which speaks of {config.num_layers} layers, "
                         "and the weights are not of one model")
    fixed = {p.theirs.removeprefix("{base}") for p in weight_maps.POSITIONS}
    unused = sorted(named[short] for short in named.keys() - used
                    if not weight_maps.BUFFERS.search(short)
                    and not (short in fixed and config.positions != "learned"))
    most = max(config.num_layers, getattr(config, "num_decoder_layers", None) or 0)
    for name in unused:
        if (weight_maps.layer_number(name) or 0) >= most:
            raise ValueError(f"the weights have {name}, but config.json speaks of {most} layers; "
                             "they are not of one model")
    return found, unused


def _check_positions(entries, named, config) -> None:
    """A file may have the table that fixed positions are computed by; refuse one that is trained.
    """
    if config.positions == "learned":
        return
    for position in weight_maps.POSITIONS:
        name = named.get(position.theirs.removeprefix("{base}"))
        if name is None:
            continue
        table, entry = weight_maps.position_table(config), entries[name]
        if entry.shape != table.shape or not np.allclose(
                safetensors_io.read(entry).astype(np.float32), table, atol=0.01):
            raise ValueError(f"{name} of shape {entry.shape} does not hold the fixed sinusoids of "
                             f"{config.max_length} positions; learned ones are not here")


def _place(value: np.ndarray, sharding) -> jax.Array:
    if value.dtype != np.float32 or not value.flags.c_contiguous:
        copy = safetensors_io.empty(value.shape, np.float32)
        copy[...] = value
        value = copy
    if sharding is None:
        return jax.device_put(value)  # on a CPU the array itself
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def _fresh(model: Model, rng: jax.Array, paths: list[str], shardings: list) -> dict[str, jax.Array]:
    """Initial values of some parameters alone: XLA leaves out what makes the others."""

    def init(rng):
        params = flatten_paths(init_params(model, rng))
        return {path: params[path] for path in paths}

    out = None if shardings[0] is None else dict(zip(paths, shardings))
    return jax.jit(init, out_shardings=out)(rng)


def _find(source: str | Path, revision: str | None) -> Path:
    """The checkpoint's folder, fetched if it is not here."""
    if str(source).startswith(PACKAGE):
        return _in_package(str(source).removeprefix(PACKAGE))
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"{source} is a file; give the folder of a checkpoint, with {CONFIG}")
    name = str(source)
    if isinstance(source, Path) or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{source} does not exist; give the folder of a checkpoint, or an "
                                "id on the hub such as openai-community/gpt2")
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(NEEDED)))
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{name} is no folder, and the hub did not give it "
                                f"({type(error).__name__}: {reason})") from None


def _in_package(name: str) -> Path:
    """The folder of weights that were installed like a package: NAME, or NAME/FOLDER."""
    package, _, inside = name.partition("/")
    try:
        found = importlib.resources.files(package)
    except (ModuleNotFoundError, TypeError, ValueError):
        raise FileNotFoundError(f"{PACKAGE}{name}: there is no package {package!r}; install it, or "
                                "give a folder") from None
    folder = Path(str(found)) / inside
    if not folder.resolve().is_relative_to(Path(str(found)).resolve()) or not folder.is_dir():
        raise FileNotFoundError(f"{PACKAGE}{name}: the package {package} has no folder {inside!r}")
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint's folder has {CONFIG} and "
                                f"{safetensors_io.WEIGHTS}")
    return storage.read_json(path)


def _task(values: dict[str, Any], task: str | None) -> str:
    model_type = values["model_type"]
    if task is not None:
        return find_task(task, model_type)
    named = values.get("architectures") or []
    if not named:
        return find_task("base", model_type)
    try:
        return find_task(named[0], model_type)
    except ValueError as error:
        raise ValueError(f"{error} config.json names this architecture; give task=...") from None


def _num_classes(values: dict[str, Any], task: str, given: int | None) -> int:
    if given is not None and task not in _CLASSIFIED:
        raise ValueError(f"num_labels is {given}, but {task} has no labels; leave it out, or give "
                         f"task={_CLASSIFIED[0]!r}")
    if given is not None and (not isinstance(given, int) or given < 1):
        raise ValueError(f"num_labels is {given!r}; it must be a whole number of at least 1")
    if task in _CLASSIFIED:
        return given or num_labels(values)
    return {"multiple_choice": 1, "question_answering": 2}.get(task, 0)


def _checked(changes: dict[str, Any], kind: type[Config]) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(kind)}
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3) or sorted(known)
            raise ValueError(f"unknown option {name!r} of load_pretrained; fields of "
                             f"{kind.__name__} near it are {', '.join(near)}")
    return changes


def _with_dtype(values: dict[str, Any], entries: dict[str, safetensors_io.Entry]) -> dict[str, Any]:
    """config.json, in which the type of the weights is that of the file: the way back casts to it.
    """
    kinds = {entry.dtype for entry in entries.values() if entry.dtype.kind in "fV"}
    if not kinds:
        raise ValueError("the weights have no tensor of a floating type; fetch them again")
    dtype = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # the widest that we have
    key = "torch_dtype" if "torch_dtype" in values else "dtype"
    return values if values.get(key) == dtype.name else {**values, key: dtype.name}
