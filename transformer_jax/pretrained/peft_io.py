"""Loading and saving of LoRA adapters in the format of Hugging Face PEFT.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. The tensors `lora_A`
[r, in] and `lora_B` [out, r] of a module correspond to the parameters `lora_a` [in, r] and `lora_b`
[r, out] of a layer of this library.

The module c_attn of GPT contains the kernels of three layers: query, key and value. When an adapter
is loaded, `lora_a` of each layer is the complete A, and `lora_b` is one third of the rows of B.
When it is saved, the three layers share one A if their `lora_a` are equal, as they are after
loading. Otherwise A is the concatenation of the three `lora_a`, B is block-diagonal, and the rank
is the sum of the three ranks. This computes the same function without rounding.

PEFT's option use_dora applies to all modules. If only some modules use DoRA, the others are saved
with the magnitude for which DoRA equals LoRA.
"""

import collections
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from transformer_jax import storage
from transformer_jax.finetuning.peft import PEFT_PARAM, column_norms, float32_matrix, merge
from transformer_jax.models import Model
from transformer_jax.pretrained import peft_config, safetensors_io, weight_maps
from transformer_jax.pretrained.config_conversion import config_to_hf
from transformer_jax.pretrained.families import FAMILIES
from transformer_jax.pretrained.weight_maps import WeightMap
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # all tensor names in an adapter start with it
# Task -> task_type of PEFT.
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS",
               "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS",
               "base": "FEATURE_EXTRACTION", "encoder": "FEATURE_EXTRACTION"}


class LoraModule(NamedTuple):
    """The LoRA update of a PEFT module.

    Attributes:
        lora_a: [r, in].
        lora_b: [out, r].
        scale: factor of the update `lora_b @ lora_a`.
        magnitude: [out], the magnitude vector of DoRA; None without DoRA.
    """

    lora_a: np.ndarray
    lora_b: np.ndarray
    scale: float
    magnitude: np.ndarray | None


class _TensorNames(NamedTuple):
    """The tensor names of a model in Hugging Face checkpoints.

    Attributes:
        model_type: the model family.
        base: prefix of the names of tensors outside the head.
        shapes: parameter path -> shape.
        maps: tensor name without the prefix, or alias -> weight map.
    """

    model_type: str
    base: str
    shapes: dict[str, tuple[int, ...]]
    maps: dict[str, WeightMap]

    def module_and_kind(self, weight_map: WeightMap) -> tuple[str, str]:
        """(name of the PEFT module, "weight" or "bias") of a tensor."""
        module, _, kind = weight_map.hf_name.replace("{base}", self.base).rpartition(".")
        return module, kind


def _tensor_names(model: Model) -> _TensorNames:
    model_type = config_to_hf(model)["model_type"]
    family = FAMILIES[model_type]
    shapes = weight_maps.param_shapes(model)
    maps = {}
    for weight_map in weight_maps.for_model(model_type, model.task, model.config, shapes):
        names = (weight_map.hf_name.removeprefix("{base}"), *weight_map.aliases)
        maps |= dict.fromkeys(names, weight_map)
    base = "" if family.class_suffixes[model.task] == "Model" else family.base_prefix
    return _TensorNames(model_type, base, shapes, maps)


def save_peft(
    folder: str | Path, model: Model, params: PyTree, base_model_name: str = "", *,
    mask: PyTree | None = None, use_rslora: bool = False,
) -> None:
    """Saves the LoRA parameters in `params` as a PEFT adapter.

    `peft.PeftModel.from_pretrained` loads it onto the model in Transformers. The classifier,
    and a pooler that is part of its head in Transformers, are saved in full, with their LoRA
    parameters merged.

    Args:
        folder: the folder, which is created if needed.
        model: the model.
        params: its parameters, including LoRA parameters.
        base_model_name: folder or hub id of the base model's checkpoint, stored as
            base_model_name_or_path.
        mask: the trainable mask. Besides LoRA and the classifier, it may select all biases (PEFT's
            bias="all"), the biases of layers with LoRA (bias="lora_only"), or parameters of modules
            without LoRA, such as LayerNorms, which are saved in full (modules_to_save).
        use_rslora: value of PEFT's use_rslora. If True, alpha is stored as scale * sqrt(r), and
            otherwise as scale * r.

    Raises:
        ValueError: there are no LoRA parameters, there are PEFT parameters of another kind, or
            the format cannot represent a trainable parameter.
    """
    names, leaves = _tensor_names(model), flatten_paths(params)
    for path in leaves:
        if PEFT_PARAM.search(path) and "/lora_" not in path:
            raise ValueError(f"unsupported PEFT parameter {path}; supported: LoRA parameters; save "
                             "others with finetuning.adapter_io.save_adapter")
    use_dora = any(path.endswith("/lora_magnitude") for path in leaves)
    maps = list(dict.fromkeys(names.maps.values()))
    mapped = {path for weight_map in maps for path in weight_map.paths}
    if unmapped := [path for path in names.shapes if path not in mapped]:
        raise ValueError(f"unsupported parameter {unmapped[0]}: {names.model_type} checkpoints for "
                         f"{model.task} have no tensor for it; build the model without it")
    full_modules, head_prefixes = _head_modules(model, names)
    # A module that is saved in full cannot have LoRA as well.
    head = {path: leaves.pop(path) for path in list(leaves) if path.startswith(head_prefixes)}
    leaves |= flatten_paths(merge(unflatten_paths(head)))
    lora_modules = _lora_modules(names, leaves, use_dora)
    if not lora_modules:
        raise ValueError(f"none of {len(leaves)} parameters is a LoRA parameter; train with a spec "
                         "such as lora:8, or save the model with save_pretrained")
    tensors: dict[str, np.ndarray] = {}
    for module, lora in lora_modules.items():
        tensors |= {f"{module}.lora_A.weight": lora.lora_a, f"{module}.lora_B.weight": lora.lora_b}
        if lora.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = lora.magnitude
    other_modules, bias = _other_trainable(names, mask, head_prefixes, set(lora_modules))
    full_modules |= other_modules
    for weight_map in maps:
        module, kind = names.module_and_kind(weight_map)
        in_full_module = any(f"{module}.".startswith(f"{name}.") for name in full_modules)
        if in_full_module or (bias == "all" and kind == "bias") or (
                bias == "lora_only" and kind == "bias" and module in lora_modules):
            owner = f"{module}.base_layer" if module in lora_modules else module
            tensors[f"{owner}.{kind}"] = weight_map.to_hf(
                [np.asarray(leaves[path]) for path in weight_map.paths])
    dropout_rates = [float(leaf) for path, leaf in leaves.items() if path.endswith("/lora_dropout")]
    ranks_and_scales = {m: (len(lora.lora_a), lora.scale) for m, lora in lora_modules.items()}
    known_modules = {names.module_and_kind(weight_map)[0] for weight_map in maps}
    config = {
        "peft_type": "LORA", "task_type": _TASK_TYPES.get(model.task),
        "base_model_name_or_path": base_model_name or None, "revision": None,
        "inference_mode": True, "init_lora_weights": True,
        **peft_config.rank_and_alpha_options(ranks_and_scales, use_rslora),
        "lora_dropout": max(dropout_rates, default=0.0), "use_rslora": use_rslora,
        "use_dora": use_dora,
        "target_modules": peft_config.target_modules(set(lora_modules), known_modules),
        "modules_to_save": sorted(full_modules) or None, "bias": bias,
        "fan_in_fan_out": names.model_type in ("gpt2", "openai-gpt"),
    }
    _save_files(Path(folder), tensors, config)


def _save_files(folder: Path, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> None:
    weights = save({f"{_PREFIX}{name}": np.ascontiguousarray(value, np.float32)
                    for name, value in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((WEIGHTS_FILE, weights), (CONFIG_FILE, text.encode())):
        with storage.atomic_write(folder / name) as file:
            file.write(data)


def _split_shape(layer: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input sizes, output sizes) of a layer's kernel."""
    num_input_axes = 2 if layer.endswith("attention/out") else 1
    return shape[:num_input_axes], shape[num_input_axes:]


def _lora_modules(
    names: _TensorNames, leaves: Mapping[str, Any], use_dora: bool
) -> dict[str, LoraModule]:
    """Name of a PEFT module -> LoRA update, if at least one layer of the module has LoRA."""
    modules = {}
    for weight_map in dict.fromkeys(names.maps.values()):
        layers = [path.removesuffix("/kernel") for path in weight_map.paths]
        if any(f"{layer}/lora_a" in leaves for layer in layers):
            module, _ = names.module_and_kind(weight_map)
            modules[module] = _combine_layers(layers, leaves, names.shapes, use_dora)
    return modules


def _combine_layers(
    layers: Sequence[str], leaves: Mapping[str, Any], shapes: dict[str, tuple[int, ...]],
    use_dora: bool,
) -> LoraModule:
    """The LoRA update of the PEFT module that contains the kernels of the given layers."""
    updates: list[tuple[np.ndarray, np.ndarray, float] | None] = []
    for layer in layers:
        if f"{layer}/lora_a" not in leaves:
            updates.append(None)
            continue
        a, b = (np.asarray(leaves[f"{layer}/lora_{x}"], np.float32) for x in "ab")
        updates.append((a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T,
                        float(leaves[f"{layer}/lora_scale"])))
    present = [update for update in updates if update is not None]
    first_a, _, scale = present[0]
    is_shared = all(np.array_equal(a, first_a) for a, _, _ in present)
    lora_a = first_a if is_shared else np.concatenate([a for a, _, _ in present])
    blocks, column = [], 0
    for layer, update in zip(layers, updates):
        _, outputs = _split_shape(layer, shapes[f"{layer}/kernel"])
        block = np.zeros((math.prod(outputs), len(lora_a)), np.float32)
        if update is not None:
            a, b, layer_scale = update
            block[:, column : column + len(a)] = (
                b if layer_scale == scale else b * (layer_scale / scale))
            column += 0 if is_shared else len(a)
        blocks.append(block)
    magnitude = None
    if use_dora:
        magnitude = np.concatenate([_magnitude(layer, leaves) for layer in layers])
    return LoraModule(lora_a, np.concatenate(blocks), scale, magnitude)


def _magnitude(layer: str, leaves: Mapping[str, Any]) -> np.ndarray:
    """DoRA magnitude [out] of a layer.

    For a layer without DoRA, the column norms of its merged kernel, for which DoRA equals LoRA.
    """
    if (magnitude := leaves.get(f"{layer}/lora_magnitude")) is None:
        kernel = float32_matrix(leaves, layer)
        if f"{layer}/lora_a" in leaves:
            a, b, scale = (leaves[f"{layer}/lora_{name}"] for name in ("a", "b", "scale"))
            kernel = kernel + scale * jnp.tensordot(a, b, axes=1)
        magnitude = column_norms(kernel, len(_split_shape(layer, kernel.shape)[0]))
    return np.asarray(magnitude, np.float32).reshape(-1)


def _head_modules(model: Model, names: _TensorNames) -> tuple[set[str], tuple[str, ...]]:
    """(PEFT modules of the classification head, path prefixes of its parameters)."""
    maps = []
    if model.num_classes:
        maps = weight_maps.HEAD_WEIGHT_MAPS[names.model_type].get(model.task, [])
    prefixes = {path.rpartition("/")[0] + "/" for weight_map in maps for path in weight_map.paths}
    return {weight_map.hf_name.partition(".")[0] for weight_map in maps}, tuple(sorted(prefixes))


def _other_trainable(
    names: _TensorNames, mask: PyTree | None, head_prefixes: tuple[str, ...],
    lora_modules: set[str],
) -> tuple[set[str], str]:
    """Parameters to save besides LoRA and the head, given a trainable mask.

    Returns:
        (names of modules to save in full, value of PEFT's option bias).
    """
    full_modules: set[str] = set()
    is_trainable = {} if mask is None else flatten_paths(mask)
    trainable = {path for path, selected in is_trainable.items()
                 if selected and not path.startswith(head_prefixes) and "/lora_" not in path}
    if not trainable:
        return full_modules, "none"
    owners = {path: names.module_and_kind(weight_map)
              for weight_map in names.maps.values() for path in weight_map.paths
              if not path.startswith(head_prefixes)}
    biases = {path for path, (_, kind) in owners.items() if kind == "bias"}
    if trainable == biases:
        return full_modules, "all"
    if trainable == {path for path in biases if owners[path][0] in lora_modules}:
        return full_modules, "lora_only"
    for path in sorted(trainable):
        module, _ = owners.get(path, (None, None))
        # PEFT saves a module with all its submodules, so a module with submodules is not supported.
        has_submodules = module is not None and any(
            other.startswith(f"{module}.") for other, _ in owners.values())
        if (not module or has_submodules or module in lora_modules
                or path.startswith("token_embed/")):
            raise ValueError(f"unsupported trainable parameter {path}: PEFT's format cannot "
                             "represent it in a LoRA adapter; merge LoRA (finetuning.peft.merge) "
                             "and use save_pretrained, or save the adapter with "
                             "finetuning.adapter_io.save_adapter")
        full_modules.add(module)
    return full_modules, "none"


def load_peft(folder: str | Path, model: Model, params: PyTree) -> PyTree:
    """Loads a LoRA adapter in the format of Hugging Face PEFT.

    Args:
        folder: the folder of the adapter.
        model: the base model.
        params: its parameters, without LoRA.

    Returns:
        `params` with the adapter's LoRA parameters added. Modules and biases that the adapter
        stores in full replace those of `params`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: the adapter is not LoRA or uses an unsupported option, or its tensors do not
            belong to this model. The message names the option or tensor.

    Example:

        >>> import tempfile, jax
        >>> from transformer_jax import models
        >>> from transformer_jax.finetuning import peft
        >>> config = models.presets.get("gpt2", num_layers=1, d_model=8, num_heads=2, mlp_dim=32,
        ...                             vocab_size=30, max_length=16)
        >>> model = models.build_model(config, task="causal_lm")
        >>> shapes = jax.eval_shape(lambda rng: models.init_params(model, rng), jax.random.key(0))
        >>> base = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)
        >>> params, mask = peft.add_and_mask(base, "lora:2:query", jax.random.key(1))
        >>> folder = tempfile.mkdtemp()
        >>> save_peft(folder, model, params, mask=mask)
        >>> loaded = load_peft(folder, model, base)
        >>> loaded["decoder"]["layer_0"]["self_attention"]["query"]["lora_a"].shape
        (8, 2)
    """
    folder = Path(folder)
    config = peft_config.load_adapter_config(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}; save the adapter again with "
                                "safe_serialization=True, the default of PEFT")
    names, leaves = _tensor_names(model), flatten_paths(params)
    if existing := [path for path in leaves if "/lora_" in path]:
        raise ValueError(f"params already contain LoRA parameters such as {existing[0]}; merge "
                         "them first (finetuning.peft.merge), or give the params of the base model")
    model_name = f"a {type(model).__name__} for {model.task}"
    lora_tensors: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    base_prefix, loaded = FAMILIES[names.model_type].base_prefix, {}
    for name, entry in safetensors_io.read_header(folder / WEIGHTS_FILE).items():
        value = safetensors_io.load_tensor(entry).astype(np.float32)
        short = name.removeprefix(_PREFIX)
        if match := re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", short):
            lora_tensors[match[1]][match[2]] = value
            continue
        plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", short)
        weight_map = names.maps.get(plain.removeprefix(base_prefix))
        if weight_map is None:
            raise ValueError(f"{folder}: {name} is not a tensor of {model_name}; load the adapter "
                             "onto the model that it was trained for")
        if value.shape != (shape := weight_map.hf_shape(names.shapes)):
            raise ValueError(f"{folder}: {name} has shape {value.shape}, but {model_name} has "
                             f"shape {shape} there; load the adapter onto the model that it was "
                             "trained for")
        loaded |= zip(weight_map.paths, weight_map.to_params(value, names.shapes))
    for module, tensors in lora_tensors.items():
        weight_map = names.maps.get(f"{module.removeprefix(base_prefix)}.weight")
        if weight_map is None or not weight_map.paths[0].endswith("/kernel"):
            raise ValueError(f"{folder} has LoRA for {module}, which is not a linear layer of "
                             f"{model_name}; load the adapter onto the model that it was trained "
                             "for")
        loaded |= _split_layers(module, weight_map, tensors, config, names.shapes)
    return unflatten_paths(leaves | {path: jnp.asarray(value) for path, value in loaded.items()})


def _split_layers(
    module: str, weight_map: WeightMap, tensors: dict[str, np.ndarray], config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """Path -> LoRA parameter, for the layers whose kernels a PEFT module contains."""
    rank = peft_config.module_option(config["rank_pattern"], module, config["r"])
    alpha = peft_config.module_option(config["alpha_pattern"], module, config["lora_alpha"])
    scale = np.float32(alpha / (math.sqrt(rank) if config["use_rslora"] else rank))
    hf_shape = weight_map.hf_shape(shapes)
    num_outputs, num_inputs = hf_shape if weight_map.is_transposed else hf_shape[::-1]
    expected = {"lora_A": (rank, num_inputs), "lora_B": (num_outputs, rank)} | (
        {"lora_magnitude_vector": (num_outputs,)} if config["use_dora"] else {})
    if (found := {name: value.shape for name, value in tensors.items()}) != expected:
        raise ValueError(f"the tensors of {module} have shapes {found}; {CONFIG_FILE} and the "
                         f"model require {expected}")
    params, start = {}, 0
    for path in weight_map.paths:
        layer = path.removesuffix("/kernel")
        inputs, outputs = _split_shape(layer, shapes[path])
        rows = slice(start, start := start + math.prod(outputs))
        params |= {
            f"{layer}/lora_a": tensors["lora_A"].T.reshape(*inputs, rank),
            f"{layer}/lora_b": tensors["lora_B"][rows].T.reshape(rank, *outputs),
            f"{layer}/lora_scale": scale,
        }
        if config["lora_dropout"]:
            params[f"{layer}/lora_dropout"] = np.float32(config["lora_dropout"])
        if config["use_dora"]:
            params[f"{layer}/lora_magnitude"] = (
                tensors["lora_magnitude_vector"][rows].reshape(outputs))
    return params
