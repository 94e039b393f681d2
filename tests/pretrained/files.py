"""Checkpoints for the tests, written by NumPy alone."""

import json
from pathlib import Path

import numpy as np

from transformer_jax.pretrained import safetensors_io

GOLDENS = Path(__file__).parents[1] / "goldens" / "checkpoints"
NAMES = sorted(path.stem for path in GOLDENS.glob("*.npz"))


def golden(name: str) -> dict[str, dict[str, np.ndarray]]:
    """What `tests/reference/checkpoints.py` made, by group."""
    groups: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDENS / f"{name}.npz") as file:  # refuses pickles
        for key in file.files:
            group, _, rest = key.partition("/")
            groups.setdefault(group, {})[rest] = file[key]
    return groups


def write_tensors(folder: Path, values: dict[str, np.ndarray], shard_bytes: int = 10**9) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    plan = [safetensors_io.TensorSpec(name, values[name].dtype, values[name].shape)
            for name in sorted(values)]
    safetensors_io.write(folder, plan, [values[tensor.name] for tensor in plan], shard_bytes)


def write(folder: Path, name: str, rename=lambda name: name, config: dict | None = None,
          dtype=None) -> Path:
    """The golden checkpoint `name` as a folder; `rename` gives None to leave a tensor out."""
    made = golden(name)
    values = {rename(key): value if dtype is None else value.astype(dtype)
              for key, value in made["tensors"].items()}
    values.pop(None, None)
    write_tensors(folder, values)
    for file, text in made["files"].items():
        fields = json.loads(str(text))
        if file == "config.json":
            fields |= config or {}
        (folder / file).write_text(json.dumps(fields))
    return folder


def read_all(folder: Path) -> dict[str, np.ndarray]:
    return {name: safetensors_io.read(entry) for name, entry in safetensors_io.open_weights(folder).items()}
