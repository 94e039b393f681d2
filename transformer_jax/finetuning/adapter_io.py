"""Saves and loads adapters: the trained parameters of a fine-tuning run, without the base model.

    save_adapter(folder, params, mask, base, spec="lora:8", task="sst2", label_names=["no", "yes"])
    params = apply_adapter(base, load_adapter(folder, base))  # `peft.merge` gives a plain model

A folder contains a JSON manifest and the safetensors file that it names. An adapter holds all
trained parameters, and also the PEFT and newly initialized parameters that are not trained, such as
the scale of a LoRA. `multi_adapter` applies several adapters in one batch.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from transformer_jax import __version__, storage
from transformer_jax.finetuning.peft import PEFT_PARAM, Leaves
from transformer_jax.finetuning.select import new_param_patterns
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

# The names on disk, and the keys of the manifest, are fixed by existing adapters.
MANIFEST = "delta.json"
_WEIGHTS_PREFIX = "delta-"
FORMAT = 1
_FIELDS = {"format": int, "recipe": str, "task": str, "label_names": list, "base": str,
           "frozen": str, "version": str, "weights": str, "sha256": str, "leaves": dict,
           "metadata": dict}
_DTYPES = ("float32", "bfloat16", "float16")
# Suffixes of the two leaves that replace a weight when it is quantized to int8.
_INT8_SUFFIXES = ("_int8", "_scale")


class SavedAdapter(NamedTuple):
    """An adapter that was loaded from a folder: the trained parameters, and the manifest.

    The manifest has "recipe" (the trainable spec), "task", "label_names", "base" (fingerprint of
    the base), "frozen" (dtype of the frozen weights during training: float32, bfloat16 or int8),
    "version" (of this library), "metadata" (as given to `save_adapter`), and "leaves" (path ->
    shape and dtype).
    """

    params: PyTree
    manifest: dict[str, Any]


def peft_param_paths(leaves: Leaves) -> set[str]:
    """Returns the paths that no base has: PEFT and newly initialized parameters."""
    patterns = [PEFT_PARAM.pattern, *new_param_patterns(list(leaves))]
    return {path for path in leaves if any(re.search(p, path) for p in patterns)}


def fingerprint(params: PyTree) -> str:
    """Returns the fingerprint of a base model: a SHA-256 hash, 64 hexadecimal digits.

    It covers the paths, dtypes, shapes and values of the parameters, except PEFT and newly
    initialized parameters such as the classifier. It does not depend on the devices, the array
    types or the order of the parameters. A quantized base has another fingerprint than the original
    because it computes another function; quantization is deterministic, and so is its fingerprint.
    """
    leaves = flatten_paths(params)
    digest = hashlib.sha256()
    for path in sorted(leaves.keys() - peft_param_paths(leaves)):
        value = np.asarray(leaves[path], order="C")
        digest.update(f"{path} {value.dtype.name} {value.shape}\n".encode())
        digest.update(value.reshape(-1).view(np.uint8))
    return digest.hexdigest()


def save_adapter(
    folder: str | Path, params: PyTree, mask: PyTree, base: PyTree, *, spec: str,
    label_names: Sequence[str] = (), task: str = "", **metadata: Any,
) -> None:
    """Saves the trained, the PEFT and the newly initialized parameters.

    An existing adapter in the folder is replaced atomically: a concurrent reader, or a later reader
    after an interrupted save, finds either the old adapter or the new one.

    Args:
        folder: destination.
        params: parameters after training; frozen weights may be quantized.
        mask: True at trainable parameters.
        base: parameters that training started from, with or without PEFT parameters. If they were
            quantized only for training, give the parameters before quantization.
        spec: trainable spec.
        label_names: names of the classes.
        task: name of the task.
        metadata: JSON values that are stored in the manifest.

    Raises:
        ValueError: frozen parameters differ from the base, newly initialized parameters are
            quantized to int8, a trained parameter is not float32, bfloat16 or float16, or the
            metadata cannot be stored as JSON.

    Example:
        >>> import tempfile
        >>> base = {"mlp": {"kernel": np.ones((2, 2), np.float32), "bias": np.zeros(2, np.float32)}}
        >>> params = {"mlp": base["mlp"] | {"bias": np.ones(2, np.float32)}}
        >>> mask = {"mlp": {"kernel": False, "bias": True}}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(folder, params, mask, base, spec="bitfit")
        ...     adapter = load_adapter(folder, base)
        >>> adapter.params["mlp"].keys(), adapter.manifest["recipe"]
        (dict_keys(['bias']), 'bitfit')
    """
    leaves, is_trainable, base_leaves = (flatten_paths(tree) for tree in (params, mask, base))
    if unmatched := leaves.keys() ^ is_trainable.keys():
        raise ValueError(
            f"only one of mask and params has {min(unmatched)}; give the mask of these params")
    selected = sorted(
        peft_param_paths(leaves) | {path for path, value in is_trainable.items() if value})
    if quantized := [path for path in selected if path.endswith("_int8")]:
        raise ValueError(f"{quantized[0]} is not part of the base but was quantized to int8; give "
                         "`quantize_frozen` a mask in which it is trainable")
    for path in leaves.keys() - set(selected):
        _check_frozen(path, leaves[path], base_leaves)
    saved = {path: np.asarray(leaves[path]) for path in selected}
    if invalid := [path for path, value in saved.items() if value.dtype.name not in _DTYPES]:
        raise ValueError(f"unsupported dtype {saved[invalid[0]].dtype} of {invalid[0]}; supported: "
                         f"{', '.join(_DTYPES)}, so convert it to one of them")
    # Some NumPy readers of safetensors do not support bfloat16; float32 represents it exactly.
    weights = save({path: value if value.dtype.kind == "f" else value.astype(np.float32)
                    for path, value in saved.items()})
    digest = hashlib.sha256(weights).hexdigest()
    manifest = {
        "format": FORMAT, "recipe": spec, "task": task, "label_names": list(label_names),
        "base": fingerprint(base), "frozen": _frozen_dtype(leaves), "version": __version__,
        "weights": f"{_WEIGHTS_PREFIX}{digest[:16]}.safetensors", "sha256": digest,
        "leaves": {path: {"shape": list(value.shape), "dtype": value.dtype.name}
                   for path, value in saved.items()},
        "metadata": metadata,
    }
    try:
        text = json.dumps(manifest, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"metadata cannot be stored as JSON ({error}); give strings, numbers, "
                         "lists and dicts") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((manifest["weights"], weights), (MANIFEST, text.encode())):
        with storage.atomic_write(folder / name) as file:  # the manifest last: readers look for it
            file.write(content)
    weights_files = set(folder.glob(f"{_WEIGHTS_PREFIX}*.safetensors"))
    for path in weights_files - {folder / manifest["weights"]}:
        path.unlink(missing_ok=True)


def _frozen_dtype(leaves: Leaves) -> str:
    if any(path.endswith("_int8") for path in leaves):
        return "int8"
    return "bfloat16" if any(leaf.dtype == jnp.bfloat16 for leaf in leaves.values()) else "float32"


def _check_frozen(path: str, leaf: Any, base: Leaves) -> None:
    """Checks that a frozen parameter equals the base's."""
    original = next(
        (path.removesuffix(suffix) for suffix in _INT8_SUFFIXES if path.endswith(suffix)), path)
    if path not in base and original in base:
        return  # quantized to int8: its values cannot be compared
    if path not in base:
        raise ValueError(f"{path} is frozen, but the base has no such parameter; give the base "
                         "that training started from")
    expected = np.asarray(base[path])
    if expected.shape != leaf.shape or not np.array_equal(
            np.asarray(leaf), expected.astype(leaf.dtype), equal_nan=True):
        raise ValueError(f"{path} is frozen, but differs from the base; give the base and the mask "
                         "of this training run")


def load_adapter(folder: str | Path, base: PyTree) -> SavedAdapter:
    """Loads an adapter and checks that it belongs to the base model with parameters `base`.

    Raises:
        FileNotFoundError: there is no adapter, or its weights are missing.
        ValueError: the adapter was trained on another base, a file is corrupted, or a parameter
            does not fit the base.
    """
    folder = Path(folder)
    manifest = _load_manifest(folder / MANIFEST)
    base_fingerprint, base_leaves = fingerprint(base), flatten_paths(base)
    if manifest["base"] != base_fingerprint:
        raise ValueError(
            f"{folder} was trained on a base with fingerprint {manifest['base'][:16]}..., but this "
            f"base has {base_fingerprint[:16]}...; load the checkpoint that training started from, "
            "without `quantize_frozen` if it was quantized only for training (dtype of the frozen "
            f"weights: {manifest['frozen']})")
    path = folder / manifest["weights"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy the whole folder of the adapter")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{path} is corrupted: its SHA-256 differs from the manifest's; copy the "
                         "folder again")
    try:
        found = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} is not a valid safetensors file ({error}); copy the folder again") from None
    _check_leaves(path, found, manifest["leaves"], base_leaves)
    params = {name: jnp.asarray(value, manifest["leaves"][name]["dtype"])
              for name, value in found.items()}
    return SavedAdapter(unflatten_paths(params), manifest)


def _load_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder that save_adapter wrote")
    manifest = storage.read_json(path)
    for name, kind in _FIELDS.items():
        if type(manifest.get(name)) is not kind:
            raise ValueError(f"{path}: {name} is {manifest.get(name)!r}, not of type "
                             f"{kind.__name__}; copy the folder again")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} has format {manifest['format']}, but this version of the library "
                         f"reads format {FORMAT}; use version {manifest['version']}")
    if not re.fullmatch(rf"{_WEIGHTS_PREFIX}[0-9a-f]+\.safetensors", manifest["weights"]):
        raise ValueError(f"{path}: weights is {manifest['weights']!r}; it must be a file "
                         f"{_WEIGHTS_PREFIX}*.safetensors in the same folder")
    for name, leaf in manifest["leaves"].items():
        if not isinstance(leaf, dict) or leaf.get("dtype") not in _DTYPES or not isinstance(
                leaf.get("shape"), list):
            raise ValueError(f"{path}: leaf {name!r} is {leaf!r}; it must have a shape and a "
                             "floating-point dtype")
    return manifest


def _check_leaves(file: Path, found: dict, expected: dict, base: Leaves) -> None:
    """Checks that the parameters in a file are those of the manifest and fit the base."""
    if unmatched := sorted(found.keys() ^ expected.keys()):
        place = ("in the file but not in the manifest" if unmatched[0] in found
                 else "in the manifest but not in the file")
        raise ValueError(f"{file}: {unmatched[0]!r} is {place}; copy the folder again")
    merged = base | found
    peft_paths = peft_param_paths(merged)
    for path, value in found.items():
        if list(value.shape) != expected[path]["shape"] or value.dtype.kind != "f":
            raise ValueError(
                f"{file}: {path} has dtype {value.dtype} and shape {value.shape}, but shape "
                f"{expected[path]['shape']} in the manifest; copy the folder again")
        original, problem = base.get(path, base.get(f"{path}_int8")), ""
        if path in peft_paths:
            if not _fits_layer(path, merged):
                problem = (f"of shape {value.shape} does not fit the layer of the base, or its "
                           "other PEFT parameters are missing")
        elif original is None:
            problem = "is in the file, but the base has no such parameter"
        elif original.shape != value.shape:
            problem = f"has shape {value.shape}, but {original.shape} in the base"
        if problem:
            raise ValueError(f"{file}: {path} {problem}; the adapter does not belong to this base")


def _fits_layer(path: str, leaves: Leaves) -> bool:
    """Whether a PEFT or newly initialized parameter fits its layer and its companions exist."""

    def shape_of(name: str, layer: str) -> tuple[int, ...]:
        leaf = leaves.get(f"{layer}/{name}", leaves.get(f"{layer}/{name}_int8"))
        return () if leaf is None else leaf.shape

    layer, _, name = path.rpartition("/")
    shape, kernel = leaves[path].shape, shape_of("kernel", layer)
    d_model = shape_of("embedding", "token_embed")[1:]
    if name.startswith("lora_"):
        a, b = shape_of("lora_a", layer), shape_of("lora_b", layer)
        expected = {"lora_a": a, "lora_b": b, "lora_magnitude": b[1:], "lora_scale": (),
                    "lora_dropout": ()}.get(name)
        return (len(a) > 1 and len(b) > 1 and (*a[:-1], *b[1:]) == kernel and a[-1] == b[0]
                and f"{layer}/lora_scale" in leaves and shape == expected)
    if name in ("ia3_input", "ia3_output"):
        num_inputs = 2 if layer.endswith("attention/out") else 1
        return bool(kernel) and shape == (
            kernel[:num_inputs] if name == "ia3_input" else kernel[num_inputs:])
    if name.startswith("prefix_"):
        kernel = shape_of(f"{name.removeprefix('prefix_')}/kernel", layer)
        return len(shape) == 3 and shape[1:] == kernel[1:] and (
            shape_of("prefix_key", layer) == shape_of("prefix_value", layer))
    if match := re.fullmatch(r"(.+)_adapter/(down|up)/(kernel|bias)", path):
        down, up = (shape_of("kernel", f"{match[1]}_adapter/{side}") for side in ("down", "up"))
        biases = [shape_of("bias", f"{match[1]}_adapter/{side}") for side in ("down", "up")]
        return (len(down) == 2 and down == up[::-1] and biases == [down[1:], up[1:]]
                and up[1:] == shape_of("scale", f"{match[1]}_norm"))
    if path in ("prompt", "token_embed/extra"):
        return len(shape) == 2 and shape[1:] == d_model
    if not re.fullmatch(r"(classifier|pooler)/(kernel|bias)", path):
        return False
    return len(kernel) == 2 and kernel[:1] == d_model and (name == "kernel" or shape == kernel[1:])


def apply_adapter(base: PyTree, adapter: SavedAdapter | PyTree) -> PyTree:
    """Returns the base with the parameters of an adapter, without copies of arrays.

    PEFT and newly initialized parameters that the base has from another task are left out, so the
    result is the trained model.
    """
    params = flatten_paths(adapter.params if isinstance(adapter, SavedAdapter) else adapter)
    leaves = flatten_paths(base)
    replaced = {f"{path}{suffix}" for path in params for suffix in _INT8_SUFFIXES}
    replaced |= peft_param_paths(leaves)
    base_params = {path: leaf for path, leaf in leaves.items() if path not in replaced}
    return unflatten_paths(base_params | params)
