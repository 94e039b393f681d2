"""Saving of models as Hugging Face checkpoints: `save_pretrained`."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Model
from transformer_jax.pretrained import safetensors_io, weight_maps
from transformer_jax.pretrained.config_conversion import config_to_hf
from transformer_jax.pretrained.families import FAMILIES
from transformer_jax.pretrained.load import CONFIG_FILE, GENERATION_CONFIG_FILE
from transformer_jax.pretrained.safetensors_io import TensorSpec
from transformer_jax.pretrained.weight_maps import WeightMap
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
        >>> config = models.presets.get("gpt2", num_layers=1, d_model=8, num_heads=2, mlp_dim=32,
        ...                             vocab_size=30, max_length=16)
        >>> model = models.build_model(config, task="causal_lm")
        >>> shapes = jax.eval_shape(lambda rng: models.init_params(model, rng), jax.random.key(0))
        >>> params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        >>> folder = tempfile.mkdtemp()
        >>> save_pretrained(folder, model, params)
        >>> sorted(os.listdir(folder))
        ['config.json', 'model.safetensors']
    """
    leaves = flatten_paths(params)
    shapes = weight_maps.param_shapes(model)
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
                source = source.to_hf([np.asarray(leaves[path]) for path in source.paths])
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
    family = FAMILIES[model_type]
    base = "" if family.class_suffixes[model.task] == "Model" else family.base_prefix
    sources: dict[TensorSpec, WeightMap | np.ndarray] = {}

    def add(hf_name: str, shape: tuple[int, ...], source: WeightMap | np.ndarray) -> None:
        sources[TensorSpec(hf_name.replace("{base}", base), dtype, shape)] = source

    maps = list(weight_maps.for_model(model_type, model.task, model.config, shapes))
    for weight_map in maps:
        add(weight_map.hf_name, weight_map.hf_shape(shapes), weight_map)
    if unmapped := sorted(shapes.keys() - {path for m in maps for path in m.paths}):
        raise ValueError(f"unsupported parameter {unmapped[0]}: {model_type} checkpoints for "
                         f"{model.task} have no tensor for it; build the model without it")
    if model.task in weight_maps.TASKS_WITH_POSITION_TABLES.get(model_type, ()):
        table = weight_maps.sinusoidal_table(model.config)
        for position_table in weight_maps.POSITION_TABLES:
            add(position_table.hf_name, table.shape, table)
    if model.task == "seq2seq_lm" and "output/bias" not in shapes:
        vocab_size = model.config.vocab_size
        add("final_logits_bias", (1, vocab_size), np.zeros((1, vocab_size)))
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
