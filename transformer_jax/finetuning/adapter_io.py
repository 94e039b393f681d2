"""One base, many tasks: what a fine-tuning trained, apart from the base that it was trained on.

    save_delta(folder, params, mask, base, recipe="lora:8", task="sst2", label_names=["no", "yes"])
    params = apply_delta(base, load_delta(folder, base))     # deltas.merge makes it a plain model

A folder has `delta.json`, the manifest, and the safetensors file that it names. A delta holds what
trained, and all that the base's fingerprint leaves out; that of `full` is as large as the base.
`finetuning.multi_adapter` runs several tasks in one batch.
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
from transformer_jax.finetuning.select import new_parameters
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

MANIFEST = "delta.json"
FORMAT = 1
_FIELDS = {"format": int, "recipe": str, "task": str, "label_names": list, "base": str,
           "frozen": str, "version": str, "weights": str, "sha256": str, "leaves": dict,
           "metadata": dict}
_TYPES = ("float32", "bfloat16", "float16")
_SMALL = ("_int8", "_scale")  # what `shrink` puts in the place of a matrix


class SavedAdapter(NamedTuple):
    """What one task adds to a base.

    `manifest` has recipe, task, label_names, base (its fingerprint), frozen (the type that the
    frozen part had in training: float32, bfloat16 or int8), version (of this library), metadata (as
    it was given) and leaves (path -> shape and dtype).
    """

    params: PyTree
    manifest: dict[str, Any]


def peft_param_paths(leaves: Leaves) -> set[str]:
    """The paths that no base is known by: deltas and new parameters."""
    patterns = [PEFT_PARAM.pattern, *new_parameters(list(leaves))]
    return {path for path in leaves if any(re.search(p, path) for p in patterns)}


def fingerprint(params: PyTree) -> str:
    """A hash (SHA-256, 64 hexadecimal digits) of a base: of paths, types, shapes and values.

    Deltas and new parameters, such as the classifier, are left out. Where the arrays are, what
    made them and their order do not matter. A shrunk base computes another function and is another
    base; `shrink` rounds the same way every time, and so gives the same fingerprint.
    """
    leaves = flatten_paths(params)
    found = hashlib.sha256()
    for path in sorted(leaves.keys() - peft_param_paths(leaves)):
        value = np.asarray(leaves[path], order="C")
        found.update(f"{path} {value.dtype.name} {value.shape}\n".encode())
        found.update(value.reshape(-1).view(np.uint8))
    return found.hexdigest()


def save_adapter(
    folder: str | Path, params: PyTree, mask: PyTree, base: PyTree, *, recipe: str,
    label_names: Sequence[str] = (), task: str = "", **metadata: Any,
) -> None:
    """Write what `mask` says is trained, and what the base's fingerprint leaves out.

    A folder that holds a delta is replaced in one step: whoever reads it, or is killed in writing,
    finds the old delta or the new one.

    Args:
        params: after training, the frozen part shrunk or not.
        base: the parameters that training started from, with or without deltas. If only the copy
            that trained was shrunk, the base as it was.
        metadata: anything that JSON can hold, for the manifest.

    Raises:
        ValueError: what is frozen is not the base's, new parameters are in int8, what trained is
            of another type than float32, bfloat16 or float16, or JSON does not hold the metadata.
    """
    leaves, trains, before = (flatten_paths(tree) for tree in (params, mask, base))
    if leaves.keys() != trains.keys():
        odd = min(leaves.keys() ^ trains.keys())
        raise ValueError(f"mask and params differ in {odd}; give the mask of these params")
    chosen = sorted(peft_param_paths(leaves) | {path for path, train in trains.items() if train})
    if rounded := [path for path in chosen if path.endswith("_int8")]:
        raise ValueError(f"{rounded[0]} is no part of the base, but was shrunk with it; give "
                         "`shrink` a mask in which it trains")
    for path in leaves.keys() - set(chosen):
        _check_frozen(path, leaves[path], before)
    kept = {path: np.asarray(leaves[path]) for path in chosen}
    if odd := [path for path, value in kept.items() if value.dtype.name not in _TYPES]:
        raise ValueError(f"{odd[0]} is of {kept[odd[0]].dtype}; a delta holds "
                         f"{', '.join(_TYPES)}, so convert it to one of them")
    # Not every reader of the format in NumPy knows bfloat16; float32 holds it exactly.
    wide = {path: value if value.dtype.kind == "f" else value.astype(np.float32)
            for path, value in kept.items()}
    weights = save(wide)
    digest = hashlib.sha256(weights).hexdigest()
    manifest = {
        "format": FORMAT, "recipe": recipe, "task": task, "label_names": list(label_names),
        "base": fingerprint(base), "frozen": _frozen_type(leaves), "version": __version__,
        "weights": f"delta-{digest[:16]}.safetensors", "sha256": digest,
        "leaves": {path: {"shape": list(value.shape), "dtype": value.dtype.name}
                   for path, value in kept.items()},
        "metadata": metadata,
    }
    try:
        text = json.dumps(manifest, indent=2) + "\n"
    except TypeError as error:
        raise ValueError(f"metadata is not for JSON ({error}); give strings, numbers, lists and "
                         "dicts") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / manifest["weights"], weights)
    _write(folder / MANIFEST, text.encode())  # only now is the new delta the one that counts
    for path in set(folder.glob("delta-*.safetensors")) - {folder / manifest["weights"]}:
        path.unlink(missing_ok=True)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.replace(path)


def _frozen_type(leaves: Leaves) -> str:
    if any(path.endswith("_int8") for path in leaves):
        return "int8"
    return "bfloat16" if any(leaf.dtype == jnp.bfloat16 for leaf in leaves.values()) else "float32"


def _check_frozen(path: str, leaf: Any, base: Leaves) -> None:
    small = next((path.removesuffix(end) for end in _SMALL if path.endswith(end)), path)
    if path not in base and small in base:
        return  # what int8 rounded cannot be compared
    if path not in base:
        raise ValueError(f"{path} did not train, and the base has no such parameter; give the base "
                         "that training started from")
    was = np.asarray(base[path])
    if was.shape != leaf.shape or not np.array_equal(
            np.asarray(leaf), was.astype(leaf.dtype), equal_nan=True):
        raise ValueError(f"{path} did not train, but differs from the base's; give the base and "
                         "the mask of this training")


def load_adapter(folder: str | Path, base: PyTree) -> SavedAdapter:
    """The delta in a folder, for this base.

    Raises:
        FileNotFoundError: there is no delta, or its weights are missing.
        ValueError: another base, or a file that is damaged, or whose parameters are none of a delta
            of this base.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder / MANIFEST)
    ours, leaves = fingerprint(base), flatten_paths(base)
    if manifest["base"] != ours:
        raise ValueError(
            f"{folder} was trained on a base of fingerprint {manifest['base'][:16]}..., and this "
            f"one has {ours[:16]}...; load the checkpoint that training started from, as it was "
            "before `shrink` if only the copy that trained was shrunk (frozen part: "
            f"{manifest['frozen']})")
    path = folder / manifest["weights"]
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; copy the delta's whole folder")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest["sha256"]:
        raise ValueError(f"{path} is damaged: its hash is not the manifest's; fetch it again")
    try:
        found = load(content)
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no safetensors file ({error}); fetch it again") from None
    _check(path, found, manifest["leaves"], leaves)
    params = {name: jnp.asarray(value, manifest["leaves"][name]["dtype"])
              for name, value in found.items()}
    return SavedAdapter(unflatten_paths(params), manifest)


def _read_manifest(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give a folder that save_delta wrote")
    manifest = storage.read_json(path)
    for name, kind in _FIELDS.items():
        if type(manifest.get(name)) is not kind:
            raise ValueError(f"{path}: {name} is {manifest.get(name)!r}, no {kind.__name__}; fetch "
                             "it again")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{path} is of format {manifest['format']}, and this library reads "
                         f"{FORMAT}; use version {manifest['version']}")
    if not re.fullmatch(r"delta-[0-9a-f]+\.safetensors", manifest["weights"]):
        raise ValueError(f"{path}: weights is {manifest['weights']!r}; it must be a file "
                         "delta-*.safetensors beside it")
    for name, leaf in manifest["leaves"].items():
        if not isinstance(leaf, dict) or leaf.get("dtype") not in _TYPES or not isinstance(
                leaf.get("shape"), list):
            raise ValueError(f"{path}: leaf {name!r} is {leaf!r}; it must have a shape and a "
                             "floating dtype")
    return manifest


def _check(file: Path, found: dict, promised: dict, base: Leaves) -> None:
    """Refuse what is not a delta of this base."""
    if odd := sorted(found.keys() ^ promised.keys()):
        where = "in the file, not in" if odd[0] in found else "in the manifest, not in the file"
        where += " the manifest" if odd[0] in found else ""
        raise ValueError(f"{file}: {odd[0]!r} is {where}; fetch both again")
    every = base | found
    own = peft_param_paths(every)
    for path, value in found.items():
        if list(value.shape) != promised[path]["shape"] or value.dtype.kind != "f":
            raise ValueError(f"{file}: {path} is {value.dtype} of shape {value.shape}, the "
                             f"manifest says {promised[path]['shape']}; fetch both again")
        if path in own:
            if not _fits(path, every):
                raise ValueError(f"{file}: {path} of shape {value.shape} does not fit the base's "
                                 "layer, or parts of it are missing; it is no delta of this base")
            continue
        plain = base.get(path, base.get(f"{path}_int8"))
        if plain is None:
            raise ValueError(f"{file} has {path!r}, and the base no such parameter; it is no delta "
                             "of this base")
        if plain.shape != value.shape:
            raise ValueError(f"{file}: {path} has shape {value.shape}, but {plain.shape} in the "
                             "base; it is no delta of this base")


def _fits(path: str, every: Leaves) -> bool:
    """Whether an edit has the shape of the layer that it edits, and all its other parts."""

    def of(name: str, layer: str) -> tuple[int, ...]:
        at = f"{layer}/{name}"
        leaf = every.get(at, every.get(f"{at}_int8"))
        return () if leaf is None else leaf.shape

    layer, _, name = path.rpartition("/")
    shape, kernel = every[path].shape, of("kernel", layer)
    width = of("embedding", "token_embed")[1:]
    if name.startswith("lora_"):
        a, b = of("lora_a", layer), of("lora_b", layer)
        wanted = {"lora_a": a, "lora_b": b, "lora_magnitude": b[1:], "lora_scale": (),
                  "lora_dropout": ()}.get(name)
        return (len(a) > 1 and len(b) > 1 and (*a[:-1], *b[1:]) == kernel and a[-1] == b[0]
                and f"{layer}/lora_scale" in every and shape == wanted)
    if name in ("ia3_input", "ia3_output"):
        inputs = 2 if layer.endswith("attention/out") else 1
        return bool(kernel) and shape == (
            kernel[:inputs] if name == "ia3_input" else kernel[inputs:])
    if name.startswith("prefix_"):
        kernel = of(f"{name.removeprefix('prefix_')}/kernel", layer)
        return len(shape) == 3 and shape[1:] == kernel[1:] and (
            of("prefix_key", layer) == of("prefix_value", layer))
    if found := re.fullmatch(r"(.+)_adapter/(down|up)/(kernel|bias)", path):
        down, up = (of("kernel", f"{found[1]}_adapter/{side}") for side in ("down", "up"))
        biases = [of("bias", f"{found[1]}_adapter/{side}") for side in ("down", "up")]
        return (len(down) == 2 and down == up[::-1] and biases == [down[1:], up[1:]]
                and up[1:] == of("scale", f"{found[1]}_norm"))
    if path in ("prompt", "token_embed/extra"):
        return len(shape) == 2 and shape[1:] == width
    if not re.fullmatch(r"(classifier|pooler)/(kernel|bias)", path):
        return False
    return len(kernel) == 2 and kernel[:1] == width and (name == "kernel" or shape == kernel[1:])


def apply_adapter(base: PyTree, delta: SavedAdapter | PyTree) -> PyTree:
    """The base with the delta's leaves in it. What the base has of another task, deltas and new
    parameters, is left out, so the result is what was trained; nothing is copied."""
    delta = flatten_paths(delta.params if isinstance(delta, SavedAdapter) else delta)
    leaves = flatten_paths(base)
    replaced = {f"{path}{end}" for path in delta for end in _SMALL}
    plain = {path: leaf for path, leaf in leaves.items()
             if path not in replaced and path not in peft_param_paths(leaves)}
    return unflatten_paths(plain | delta)
