"""A model of ours becomes a checkpoint in the Hugging Face format again."""

import json
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from transformer_jax.data.tokenizers import Tokenizer
from transformer_jax.models import Model, init_params
from transformer_jax.pretrained import safetensors_io, weight_maps
from transformer_jax.pretrained.families import FAMILIES, write_config
from transformer_jax.pretrained.load import CONFIG, GENERATION
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
    """Write a folder that Transformers, and `load_pretrained`, can read.

    Fields of config.json that this library does not know, generation_config.json and the type of
    the weights are those of the checkpoint that the model came from (`Config.source`). Weights of
    more than `shard_bytes` bytes are split.

    Raises:
        ValueError: no family of checkpoints has such a model, or `params` are not the model's; the
            message names the field or parameter.
    """
    config = model.config
    leaves = flatten_paths(params)
    abstract = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in flatten_paths(abstract).items()}
    for name in sorted(shapes.keys() | leaves.keys()):
        ours, wanted = leaves.get(name), shapes.get(name)
        if ours is None or wanted is None or np.shape(ours) != wanted:
            raise ValueError(
                f"params have {name} of shape {None if ours is None else np.shape(ours)}, but a "
                f"{type(model).__name__} for {model.task} has {wanted}; give the params of this "
                "model")
    values = write_config(config, model.task, model.num_classes)
    generation = values.pop("generation_config", None)
    dtype = _DTYPES.get(values.get("torch_dtype") or values.setdefault("dtype", "float32"),
                        np.dtype(np.float32))
    model_type = values["model_type"]
    base = "" if FAMILIES[model_type].heads[model.task] == "Model" else FAMILIES[model_type].base
    planned: dict[safetensors_io.TensorSpec, weight_maps.WeightMap | np.ndarray] = {}

    def plan(theirs: str, shape: tuple[int, ...], source) -> None:
        name = theirs.replace("{base}", base)
        planned[safetensors_io.TensorSpec(name, dtype, shape)] = source

    rules = list(weight_maps.rules(model_type, model.task, config, shapes))
    for rule in rules:
        plan(rule.theirs, rule.their_shape(shapes), rule)
    if lost := sorted(shapes.keys() - {ours for rule in rules for ours in rule.ours}):
        raise ValueError(f"{lost[0]} has no place in a checkpoint of {model_type} for "
                         f"{model.task}; build the model without it")
    if model.task in weight_maps.WRITES_POSITIONS.get(model_type, ()):
        table = weight_maps.position_table(config)
        for position in weight_maps.POSITIONS:
            plan(position.theirs, table.shape, table)
    if model.task == "seq2seq_lm" and "output/bias" not in shapes:
        plan("final_logits_bias", (1, config.vocab_size), np.zeros((1, config.vocab_size)))

    def arrays() -> Iterator[np.ndarray]:
        for tensor in order:
            source = planned[tensor]
            if isinstance(source, weight_maps.WeightMap):
                source = source.to_theirs([np.asarray(leaves[name]) for name in source.ours])
            yield source

    order = sorted(planned)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors_io.write(folder, order, arrays(), shard_bytes)
    _write_json(folder / CONFIG, values)
    if generation is not None:
        _write_json(folder / GENERATION, generation)
    if tokenizer is not None:
        tokenizer.save(folder)


def _write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
