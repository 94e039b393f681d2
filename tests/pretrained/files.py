"""Checkpoint folders for the tests, made from the golden files without Transformers."""

import json
from pathlib import Path

import numpy as np

from transformer_jax.pretrained import safetensors_io

GOLDENS = Path(__file__).parents[1] / "goldens" / "checkpoints"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))


def golden(name: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays that `tests/reference/checkpoints.py` saved, by group."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDENS / f"{name}.npz") as file:  # refuses pickles
        for key in file.files:
            group, _, rest = key.partition("/")
            groups.setdefault(group, {})[rest] = file[key]
    return groups


def write_tensors(folder: Path, values: dict[str, np.ndarray], shard_bytes: int = 10**9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    specs = [safetensors_io.TensorSpec(name, values[name].dtype, values[name].shape)
             for name in sorted(values)]
    safetensors_io.save_tensors(folder, specs, [values[spec.name] for spec in specs], shard_bytes)


def write(folder: Path, name: str, rename=lambda name: name, config: dict | None = None,
          dtype=None) -> Path:
    """Writes the golden checkpoint `name` to a folder; tensors renamed to None are omitted."""
    groups = golden(name)
    values = {rename(key): value if dtype is None else value.astype(dtype)
              for key, value in groups["tensors"].items()}
    values.pop(None, None)
    write_tensors(folder, values)
    for file, text in groups["files"].items():
        fields = json.loads(str(text))
        if file == "config.json":
            fields |= config or {}
        (folder / file).write_text(json.dumps(fields))
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: safetensors_io.load_tensor(entry)
            for name, entry in safetensors_io.list_tensors(folder).items()}
