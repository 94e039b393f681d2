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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from transformer_jax import storage
from transformer_jax.finetuning.peft import PEFT_PARAM, column_norms, float32_matrix, merge
from transformer_jax.models import Model
from transformer_jax.pretrained import safetensors_io, weight_maps
from transformer_jax.pretrained.families import FAMILIES, config_to_hf
from transformer_jax.pretrained.weight_maps import Shapes, WeightMap, split_kernel_shape
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # all tensor names in an adapter start with it
# Task -> task_type of PEFT.
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS",
               "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS",
               "base": "FEATURE_EXTRACTION", "encoder": "FEATURE_EXTRACTION"}
_OTHER_MODEL = "load the adapter onto the model that it was trained for"


class LoraModule(NamedTuple):
    """The LoRA update `scale * lora_b @ lora_a` of a PEFT module."""

    lora_a: np.ndarray  # [r, in]
    lora_b: np.ndarray  # [out, r]
    scale: float
    magnitude: np.ndarray | None  # [out], of DoRA


class _ModelTensors(NamedTuple):
    """The tensors of a model in Hugging Face checkpoints."""

    model_type: str
    base: str  # prefix of the names of tensors outside the head
    shapes: Shapes
    maps: list[WeightMap]

    def module_and_kind(self, weight_map: WeightMap) -> tuple[str, str]:
        """(name of the PEFT module, "weight" or "bias") of a tensor."""
        module, _, kind = weight_map.hf_name.replace("{base}", self.base).rpartition(".")
        return module, kind


def _model_tensors(model: Model) -> _ModelTensors:
    model_type = config_to_hf(model)["model_type"]
    shapes = weight_maps.param_shapes(model)
    return _ModelTensors(model_type, weight_maps.base_prefix(model_type, model.task), shapes,
                         weight_maps.for_model(model_type, model, shapes))


# Saving -------------------------------------------------------------------------------------------


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
        base_model_name: folder or hub id of the base model's checkpoint.
        mask: the trainable mask. Besides LoRA and the classifier, it may select all biases (PEFT's
            bias="all"), the biases of layers with LoRA (bias="lora_only"), or parameters of modules
            without LoRA, such as LayerNorms, which are saved in full (modules_to_save).
        use_rslora: whether alpha is stored as scale * sqrt(r) instead of scale * r.

    Raises:
        ValueError: there are no LoRA parameters, there are PEFT parameters of another kind, or
            the format cannot represent a trainable parameter.
    """
    names, leaves = _model_tensors(model), flatten_paths(params)
    for path in leaves:
        if PEFT_PARAM.search(path) and "/lora_" not in path:
            raise ValueError(f"unsupported PEFT parameter {path}; supported: LoRA parameters; save "
                             "others with finetuning.adapter_io.save_adapter")
    weight_maps.check_all_mapped(names.maps, names.model_type, model, names.shapes)
    use_dora = any(path.endswith("/lora_magnitude") for path in leaves)
    full_modules, head_prefixes = _head_modules(model, names)
    # A module that is saved in full cannot have LoRA as well.
    head = {path: leaves.pop(path) for path in list(leaves) if path.startswith(head_prefixes)}
    leaves |= flatten_paths(merge(unflatten_paths(head)))
    lora_modules = _lora_modules(names, leaves, use_dora)
    if not lora_modules:
        raise ValueError(f"none of {len(leaves)} parameters is a LoRA parameter; train with a spec "
                         "such as lora:8, or save the model with save_pretrained")
    other_modules, bias = _other_trainable(names, mask, head_prefixes, lora_modules)
    full_modules |= other_modules
    tensors = _tensors(names, leaves, lora_modules, full_modules, bias)
    dropout_rates = [float(leaf) for path, leaf in leaves.items() if path.endswith("/lora_dropout")]
    known_modules = {names.module_and_kind(weight_map)[0] for weight_map in names.maps}
    config = {
        "peft_type": "LORA", "task_type": _TASK_TYPES.get(model.task),
        "base_model_name_or_path": base_model_name or None, "revision": None,
        "inference_mode": True, "init_lora_weights": True,
        **_rank_and_alpha_options(lora_modules, use_rslora),
        "lora_dropout": max(dropout_rates, default=0.0), "use_rslora": use_rslora,
        "use_dora": use_dora, "target_modules": _target_modules(lora_modules, known_modules),
        "modules_to_save": sorted(full_modules) or None, "bias": bias,
        "fan_in_fan_out": names.model_type in ("gpt2", "openai-gpt"),
    }
    weights = save({f"{_PREFIX}{name}": np.ascontiguousarray(value, np.float32)
                    for name, value in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in ((WEIGHTS_FILE, weights), (CONFIG_FILE, text.encode())):
        with storage.atomic_write(folder / name) as file:
            file.write(data)


def _tensors(
    names: _ModelTensors, leaves: Mapping[str, Any], lora_modules: dict[str, LoraModule],
    full_modules: set[str], bias: str,
) -> dict[str, np.ndarray]:
    """Name without `_PREFIX` -> tensor of an adapter."""
    tensors: dict[str, np.ndarray] = {}
    for module, lora in lora_modules.items():
        tensors |= {f"{module}.lora_A.weight": lora.lora_a, f"{module}.lora_B.weight": lora.lora_b}
        if lora.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = lora.magnitude
    for weight_map in names.maps:
        module, kind = names.module_and_kind(weight_map)
        in_full_module = any(f"{module}.".startswith(f"{name}.") for name in full_modules)
        is_saved_bias = kind == "bias" and (
            bias == "all" or (bias == "lora_only" and module in lora_modules))
        if in_full_module or is_saved_bias:
            owner = f"{module}.base_layer" if module in lora_modules else module
            tensors[f"{owner}.{kind}"] = weight_map.to_hf(leaves)
    return tensors


def _lora_modules(
    names: _ModelTensors, leaves: Mapping[str, Any], use_dora: bool
) -> dict[str, LoraModule]:
    """Name of a PEFT module -> LoRA update, if at least one layer of the module has LoRA."""
    modules = {}
    for weight_map in names.maps:
        layers = [path.removesuffix("/kernel") for path in weight_map.paths]
        if any(f"{layer}/lora_a" in leaves for layer in layers):
            module, _ = names.module_and_kind(weight_map)
            modules[module] = _combine_layers(layers, leaves, names.shapes, use_dora)
    return modules


def _combine_layers(
    layers: list[str], leaves: Mapping[str, Any], shapes: Shapes, use_dora: bool
) -> LoraModule:
    """The LoRA update of the PEFT module that contains the kernels of the given layers."""
    updates = {}
    for layer in layers:
        if f"{layer}/lora_a" in leaves:
            a, b = (np.asarray(leaves[f"{layer}/lora_{x}"], np.float32) for x in "ab")
            updates[layer] = (a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T,
                              float(leaves[f"{layer}/lora_scale"]))
    all_a = [a for a, _, _ in updates.values()]
    first_a, _, scale = next(iter(updates.values()))
    is_shared = all(np.array_equal(a, first_a) for a in all_a)
    lora_a = first_a if is_shared else np.concatenate(all_a)
    blocks, column = [], 0
    for layer in layers:
        path = f"{layer}/kernel"
        _, outputs = split_kernel_shape(path, shapes[path])
        blocks.append(np.zeros((math.prod(outputs), len(lora_a)), np.float32))
        if layer in updates:
            a, b, layer_scale = updates[layer]
            blocks[-1][:, column : column + len(a)] = (
                b if layer_scale == scale else b * (layer_scale / scale))
            column += 0 if is_shared else len(a)
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
        inputs, _ = split_kernel_shape(f"{layer}/kernel", kernel.shape)
        magnitude = column_norms(kernel, len(inputs))
    return np.asarray(magnitude, np.float32).reshape(-1)


def _head_modules(model: Model, names: _ModelTensors) -> tuple[set[str], tuple[str, ...]]:
    """(PEFT modules of the classification head, path prefixes of its parameters)."""
    maps = []
    if model.num_classes:
        maps = weight_maps.HEAD_WEIGHT_MAPS[names.model_type].get(model.task, [])
    prefixes = {path.rpartition("/")[0] + "/" for weight_map in maps for path in weight_map.paths}
    return {weight_map.hf_name.partition(".")[0] for weight_map in maps}, tuple(sorted(prefixes))


def _other_trainable(
    names: _ModelTensors, mask: PyTree | None, head_prefixes: tuple[str, ...],
    lora_modules: Collection[str],
) -> tuple[set[str], str]:
    """(modules to save in full, PEFT's option bias), for what is trained besides LoRA and head."""
    is_trainable = {} if mask is None else flatten_paths(mask)
    trainable = {path for path, selected in is_trainable.items()
                 if selected and not path.startswith(head_prefixes) and "/lora_" not in path}
    if not trainable:
        return set(), "none"
    owners = {path: names.module_and_kind(weight_map)
              for weight_map in names.maps for path in weight_map.paths
              if not path.startswith(head_prefixes)}
    biases = {path for path, (_, kind) in owners.items() if kind == "bias"}
    if trainable == biases:
        return set(), "all"
    if trainable == {path for path in biases if owners[path][0] in lora_modules}:
        return set(), "lora_only"
    full_modules: set[str] = set()
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


def _rank_and_alpha_options(
    lora_modules: dict[str, LoraModule], use_rslora: bool
) -> dict[str, Any]:
    """The options r and lora_alpha, the most common values, and the patterns of other modules."""
    options = {}
    for module, lora in lora_modules.items():
        rank = len(lora.lora_a)
        alpha = lora.scale * (math.sqrt(rank) if use_rslora else rank)
        # The scale is stored in float32, so alpha is exact to seven digits.
        nearest = round(alpha)
        options[module] = rank, nearest if math.isclose(alpha, nearest, rel_tol=1e-7) else alpha
    (rank, alpha), _ = collections.Counter(options.values()).most_common(1)[0]
    return {"r": rank, "lora_alpha": alpha,
            "rank_pattern": {m: r for m, (r, _) in options.items() if r != rank},
            "alpha_pattern": {m: a for m, (_, a) in options.items() if a != alpha}}


def _target_modules(selected: Collection[str], known: set[str]) -> list[str]:
    """The shortest suffixes of module names that match the selected modules and no others."""
    # The base models of Transformers have a pooler even if this model does not.
    known = {*known, "pooler.dense"}
    targets = set()
    for module in selected:
        words = module.split(".")
        suffixes = [".".join(words[i:]) for i in range(len(words) - 1, -1, -1)]
        targets.add(next((suffix for suffix in suffixes if all(
            name in selected for name in known if f".{name}".endswith(f".{suffix}"))), module))
    return sorted(targets)


# Loading ------------------------------------------------------------------------------------------


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
        >>> model = models.build_model(models.presets.bert_tiny(num_layers=1, vocab_size=30))
        >>> base = models.init_params(model, jax.random.key(0))
        >>> params, mask = peft.add_and_mask(base, "lora:2:query", jax.random.key(1))
        >>> folder = tempfile.mkdtemp()
        >>> save_peft(folder, model, params, mask=mask)
        >>> loaded = load_peft(folder, model, base)
        >>> loaded["encoder"]["layer_0"]["self_attention"]["query"]["lora_a"].shape
        (128, 2)
    """
    folder = Path(folder)
    config = _load_config(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}; save the adapter again with "
                                "safe_serialization=True, the default of PEFT")
    names, leaves = _model_tensors(model), flatten_paths(params)
    if existing := [path for path in leaves if "/lora_" in path]:
        raise ValueError(f"params already contain LoRA parameters such as {existing[0]}; merge "
                         "them first (finetuning.peft.merge), or give the params of the base model")
    maps = {name: weight_map for weight_map in names.maps for name in weight_map.names}
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
        weight_map = maps.get(plain.removeprefix(base_prefix))
        if weight_map is None:
            raise ValueError(f"{folder}: {name} is not a tensor of {model_name}; {_OTHER_MODEL}")
        if value.shape != (shape := weight_map.hf_shape(names.shapes)):
            raise ValueError(f"{folder}: {name} has shape {value.shape}, but {model_name} has "
                             f"shape {shape} there; {_OTHER_MODEL}")
        loaded |= zip(weight_map.paths, weight_map.to_params(value, names.shapes))
    for module, tensors in lora_tensors.items():
        weight_map = maps.get(f"{module.removeprefix(base_prefix)}.weight")
        if weight_map is None or not weight_map.paths[0].endswith("/kernel"):
            raise ValueError(f"{folder} has LoRA for {module}, which is not a linear layer of "
                             f"{model_name}; {_OTHER_MODEL}")
        loaded |= _split_layers(module, weight_map, tensors, config, names.shapes)
    return unflatten_paths(leaves | {path: jnp.asarray(value) for path, value in loaded.items()})


def _split_layers(
    module: str, weight_map: WeightMap, tensors: dict[str, np.ndarray], config: dict[str, Any],
    shapes: Shapes,
) -> dict[str, np.ndarray]:
    """Path -> LoRA parameter, for the layers whose kernels a PEFT module contains."""
    rank, alpha = (
        next((value for pattern, value in config[patterns].items()
              if re.match(rf"(.*\.)?({pattern})$", module)), config[name])
        for patterns, name in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")))
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
        inputs, outputs = split_kernel_shape(path, shapes[path])
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


# Options of adapter_config.json -> default of PEFT.
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
# Other options that are supported, used only in training, or redundant because the adapter's
# tensors contain the same information.
_OTHER_OPTIONS = {
    "peft_type", "rank_pattern", "alpha_pattern", "init_lora_weights", "auto_mapping",
    "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version",
    "target_modules", "exclude_modules", "modules_to_save", "bias", "fan_in_fan_out",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config",
    "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying"}
# Values of init_lora_weights that leave the kernels of the base model unchanged.
_SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def _load_config(path: Path) -> dict[str, Any]:
    """Loads and checks an adapter_config.json. Missing options get the defaults of PEFT."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a PEFT adapter")
    config = storage.read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"unsupported peft_type {config.get('peft_type')!r} in {path}; supported: "
                         "'LORA'")
    if (init := config.get("init_lora_weights", True)) not in _SUPPORTED_INITS:
        raise ValueError(f"unsupported init_lora_weights {init!r} in {path}, which changes the "
                         "kernels of the base model; supported: "
                         f"{', '.join(map(repr, _SUPPORTED_INITS))}; convert the adapter to plain "
                         "LoRA first (PEFT's path_initial_model_for_weight_conversion)")
    for name, value in config.items():
        if name not in {*_DEFAULTS, *_OTHER_OPTIONS} and value not in (None, False, 0, [], {}):
            raise ValueError(f"unsupported option {name} {value!r} in {path}; use an adapter that "
                             "was trained without this option")
    config = _DEFAULTS | config
    config |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for pattern in (*config["rank_pattern"], *config["alpha_pattern"]):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{path} has the pattern {pattern!r}, which is not a regular "
                             f"expression ({error})") from None
    for name, rank in (("r", config["r"]), *config["rank_pattern"].items()):
        if type(rank) is not int or rank < 1:
            raise ValueError(f"{path}: the rank {name} is {rank!r}; it must be an integer of at "
                             "least 1")
    for name, alpha in (("lora_alpha", config["lora_alpha"]), *config["alpha_pattern"].items()):
        if not isinstance(alpha, int | float):
            raise ValueError(f"{path}: the alpha {name} is {alpha!r}; it must be a number")
    return config
