"""Loading and saving of LoRA adapters in the format of Hugging Face PEFT.

The tensors `lora_A` [r, in] and `lora_B` [out, r] of a PEFT module correspond to the parameters
`lora_a` [in, r] and `lora_b` [r, out] of a layer of this library.

The module c_attn of GPT contains the kernels of three layers: query, key and value. When an adapter
is loaded, `lora_a` of each layer is the complete A, and `lora_b` is one third of the rows of B.
When it is saved, the three layers share one A if their `lora_a` are equal, as after loading.
Otherwise A is the concatenation of the three `lora_a`, B is block-diagonal, and the rank is the sum
of the three ranks. This computes the same function without rounding.
"""

import collections
import json
import math
import re
from collections.abc import Collection, Mapping, Sequence
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
Leaves = Mapping[str, Any]  # path -> parameter
_OTHER_MODEL = "load the adapter onto the model that it was trained for"


class LoraModule(NamedTuple):
    """The LoRA update `scale * lora_b @ lora_a` of a PEFT module, and the magnitude of DoRA."""

    lora_a: np.ndarray  # [r, in]
    lora_b: np.ndarray  # [out, r]
    scale: float
    magnitude: np.ndarray | None  # [out]


class _ModelTensors:
    """The tensors of a model in Hugging Face checkpoints."""

    def __init__(self, model: Model):
        self.model_type = config_to_hf(model)["model_type"]
        self.shapes = weight_maps.param_shapes(model)
        self.maps = weight_maps.for_model(self.model_type, model, self.shapes)


def _module_and_kind(weight_map: WeightMap) -> tuple[str, str]:
    """(name of the PEFT module, "weight" or "bias") of a tensor."""
    return weight_map.hf_name.rpartition(".")[::2]


def save_peft(
    folder: str | Path, model: Model, params: PyTree, base_model_name: str = "", *,
    mask: PyTree | None = None, use_rslora: bool = False,
) -> None:
    """Saves the LoRA parameters in `params` as a PEFT adapter in a new or existing folder.

    `peft.PeftModel.from_pretrained` loads it onto the model in Transformers. The classifier, and a
    pooler that is part of its head in Transformers, are saved in full, with their LoRA merged.

    Args:
        base_model_name: folder or hub id of the base model's checkpoint.
        mask: the trainable mask. Besides LoRA and the classifier, it may select all biases (PEFT's
            bias="all"), the biases of layers with LoRA (bias="lora_only"), or parameters of modules
            without LoRA, such as LayerNorms, which are saved in full (modules_to_save).
        use_rslora: whether alpha is stored as scale * sqrt(r) instead of scale * r.

    Raises:
        ValueError: there are no LoRA parameters, there are PEFT parameters of another kind, or
            the format cannot represent a trainable parameter.
    """
    names, leaves = _ModelTensors(model), flatten_paths(params)
    for path in leaves:
        if PEFT_PARAM.search(path) and "/lora_" not in path:
            raise ValueError(f"unsupported PEFT parameter {path}; supported: LoRA parameters; save "
                             "others with finetuning.adapter_io.save_adapter")
    weight_maps.check_all_mapped(names.maps, names.model_type, model, names.shapes)
    full_modules, head_prefixes = _head_modules(model, names)
    # A module that is saved in full cannot have LoRA as well.
    head = {path: leaves.pop(path) for path in list(leaves) if path.startswith(head_prefixes)}
    leaves |= flatten_paths(merge(unflatten_paths(head)))
    lora_modules = {
        _module_and_kind(weight_map)[0]: _combine_layers(weight_map.paths, leaves, names.shapes)
        for weight_map in names.maps
        if any(f"{path.removesuffix('kernel')}lora_a" in leaves for path in weight_map.paths)}
    if not lora_modules:
        raise ValueError(f"none of {len(leaves)} parameters is a LoRA parameter; train with a spec "
                         "such as lora:8, or save the model with save_pretrained")
    other_modules, bias = _other_trainable(names, mask, head_prefixes, lora_modules)
    full_modules |= other_modules
    tensors = _tensors(names, leaves, lora_modules, full_modules, bias)
    dropout_rates = [float(leaf) for path, leaf in leaves.items() if path.endswith("/lora_dropout")]
    known_modules = {_module_and_kind(weight_map)[0] for weight_map in names.maps}
    config = {
        "peft_type": "LORA", "task_type": _TASK_TYPES.get(model.task),
        "base_model_name_or_path": base_model_name or None, "revision": None,
        "inference_mode": True, "init_lora_weights": True,
        **_rank_options(lora_modules, use_rslora),
        "lora_dropout": max(dropout_rates, default=0.0), "use_rslora": use_rslora,
        "use_dora": any(lora.magnitude is not None for lora in lora_modules.values()),
        "target_modules": _target_modules(lora_modules, known_modules),
        "modules_to_save": sorted(full_modules) or None, "bias": bias,
        "fan_in_fan_out": names.model_type in ("gpt2", "openai-gpt"),
    }
    weights = save({f"{_PREFIX}{name}": np.ascontiguousarray(value, np.float32)
                    for name, value in tensors.items()}, {"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, data in ((WEIGHTS_FILE, weights), (CONFIG_FILE, text.encode())):
        with storage.atomic_write(Path(folder) / name) as file:
            file.write(data)


def _tensors(
    names: _ModelTensors, leaves: Leaves, lora_modules: dict[str, LoraModule],
    full_modules: set[str], bias: str,
) -> dict[str, np.ndarray]:
    """Name without `_PREFIX` -> tensor of an adapter."""
    tensors: dict[str, np.ndarray] = {}
    for module, lora in lora_modules.items():
        tensors |= {f"{module}.lora_A.weight": lora.lora_a, f"{module}.lora_B.weight": lora.lora_b}
        if lora.magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = lora.magnitude
    for weight_map in names.maps:
        module, kind = _module_and_kind(weight_map)
        in_full_module = any(f"{module}.".startswith(f"{name}.") for name in full_modules)
        if in_full_module or (kind == "bias" and bias != "none"
                              and (bias == "all" or module in lora_modules)):
            owner = f"{module}.base_layer" if module in lora_modules else module
            tensors[f"{owner}.{kind}"] = weight_map.to_hf(leaves)
    return tensors


def _combine_layers(paths: Sequence[str], leaves: Leaves, shapes: Shapes) -> LoraModule:
    """The LoRA update of the PEFT module that contains the given kernels."""
    updates = {}
    for path in paths:
        layer = path.removesuffix("/kernel")
        if f"{layer}/lora_a" in leaves:
            a, b = (np.asarray(leaves[f"{layer}/lora_{x}"], np.float32) for x in "ab")
            updates[path] = (a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T,
                             float(leaves[f"{layer}/lora_scale"]))
    all_a = [a for a, _, _ in updates.values()]
    first_a, _, scale = next(iter(updates.values()))
    is_shared = all(np.array_equal(a, first_a) for a in all_a)
    lora_a = first_a if is_shared else np.concatenate(all_a)
    blocks, column = [], 0
    for path in paths:
        _, outputs = split_kernel_shape(path, shapes[path])
        blocks.append(np.zeros((math.prod(outputs), len(lora_a)), np.float32))
        if path in updates:
            a, b, layer_scale = updates[path]
            blocks[-1][:, column : column + len(a)] = (
                b if layer_scale == scale else b * (layer_scale / scale))
            column += 0 if is_shared else len(a)
    # PEFT's option use_dora applies to all modules.
    magnitude = None
    if any(path.endswith("/lora_magnitude") for path in leaves):
        magnitude = np.concatenate([_magnitude(path.removesuffix("/kernel"), leaves)
                                    for path in paths])
    return LoraModule(lora_a, np.concatenate(blocks), scale, magnitude)


def _magnitude(layer: str, leaves: Leaves) -> np.ndarray:
    """DoRA magnitude [out] of a layer; without DoRA, the one for which DoRA equals LoRA."""
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
    heads = weight_maps.HEAD_WEIGHT_MAPS[names.model_type] if model.num_classes else {}
    maps = heads.get(model.task, [])
    prefixes = {path.rpartition("/")[0] + "/" for weight_map in maps for path in weight_map.paths}
    return {weight_map.hf_name.partition(".")[0] for weight_map in maps}, tuple(sorted(prefixes))


def _other_trainable(
    names: _ModelTensors, mask: PyTree | None, head_prefixes: tuple[str, ...],
    lora_modules: Collection[str],
) -> tuple[set[str], str]:
    """(modules to save in full, PEFT's option bias), for parameters other than LoRA and head."""
    is_trainable = {} if mask is None else flatten_paths(mask)
    trainable = {path for path, selected in is_trainable.items()
                 if selected and not path.startswith(head_prefixes) and "/lora_" not in path}
    if not trainable:
        return set(), "none"
    owners = {path: _module_and_kind(weight_map)
              for weight_map in names.maps for path in weight_map.paths
              if not path.startswith(head_prefixes)}
    biases = {path for path, (_, kind) in owners.items() if kind == "bias"}
    if trainable == biases:
        return set(), "all"
    if trainable == {path for path in biases if owners[path][0] in lora_modules}:
        return set(), "lora_only"
    full_modules: set[str] = set()
    for path in sorted(trainable):
        module, _ = owners.get(path, ("", ""))
        # PEFT saves a module with all its submodules, so a module with submodules is not supported.
        if (not module or module in lora_modules or path.startswith("token_embed/")
                or any(other.startswith(f"{module}.") for other, _ in owners.values())):
            raise ValueError(f"unsupported trainable parameter {path}: PEFT's format cannot "
                             "represent it in a LoRA adapter; merge LoRA (finetuning.peft.merge) "
                             "and use save_pretrained, or save the adapter with "
                             "finetuning.adapter_io.save_adapter")
        full_modules.add(module)
    return full_modules, "none"


def _rank_options(lora_modules: dict[str, LoraModule], use_rslora: bool) -> dict[str, Any]:
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
    known.add("pooler.dense")  # base models in Transformers have it even if this model does not
    targets = set()
    for module in selected:
        words = module.split(".")
        suffixes = [".".join(words[i:]) for i in range(len(words) - 1, -1, -1)]
        targets.add(next((suffix for suffix in suffixes if all(
            name in selected for name in known if f".{name}".endswith(f".{suffix}"))), module))
    return sorted(targets)


def load_peft(folder: str | Path, model: Model, params: PyTree) -> PyTree:
    """Loads a LoRA adapter in the format of Hugging Face PEFT.

    Returns `params`, which must have no LoRA, with the adapter's LoRA parameters added. Modules and
    biases that the adapter stores in full replace those of `params`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: an option is not supported, or a tensor does not belong to this model.

    Example:

        >>> import tempfile, jax
        >>> from transformer_jax import models
        >>> from transformer_jax.finetuning import peft
        >>> model = models.build_model(models.presets.bert_tiny(num_layers=1, vocab_size=30))
        >>> base = models.init_params(model, jax.random.key(0))
        >>> params, mask = peft.add_and_mask(base, "lora:2:query", jax.random.key(1))
        >>> save_peft(folder := tempfile.mkdtemp(), model, params, mask=mask)
        >>> layer = load_peft(folder, model, base)["encoder"]["layer_0"]
        >>> layer["self_attention"]["query"]["lora_a"].shape
        (128, 2)
    """
    folder = Path(folder)
    config = _load_config(folder / CONFIG_FILE)
    if not (folder / WEIGHTS_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS_FILE}; save the adapter again with "
                                "safe_serialization=True, the default of PEFT")
    names, leaves = _ModelTensors(model), flatten_paths(params)
    if existing := [path for path in leaves if "/lora_" in path]:
        raise ValueError(f"params already contain LoRA parameters such as {existing[0]}; merge "
                         "them first (finetuning.peft.merge), or give the params of the base model")
    maps = {name: weight_map for weight_map in names.maps
            for name in weight_map.names(names.model_type)}
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
    expected = {"lora_A": (rank, num_inputs), "lora_B": (num_outputs, rank)}
    if config["use_dora"]:
        expected["lora_magnitude_vector"] = (num_outputs,)
    if (found := {name: value.shape for name, value in tensors.items()}) != expected:
        raise ValueError(f"the tensors of {module} have shapes {found}; {CONFIG_FILE} and the "
                         f"model require {expected}")
    params, start = {}, 0
    for path in weight_map.paths:
        layer = path.removesuffix("/kernel")
        inputs, outputs = split_kernel_shape(path, shapes[path])
        rows = slice(start, start := start + math.prod(outputs))
        params |= {f"{layer}/lora_a": tensors["lora_A"].T.reshape(*inputs, rank),
                   f"{layer}/lora_b": tensors["lora_B"][rows].T.reshape(rank, *outputs),
                   f"{layer}/lora_scale": scale}
        if config["lora_dropout"]:
            params[f"{layer}/lora_dropout"] = np.float32(config["lora_dropout"])
        if config["use_dora"]:
            params[f"{layer}/lora_magnitude"] = (
                tensors["lora_magnitude_vector"][rows].reshape(outputs))
    return params


# Options of adapter_config.json -> default of PEFT.
_DEFAULTS = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False}
# Other options that are supported, used only in training, or redundant given the tensors.
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
    ranks = {"r": config["r"], **config["rank_pattern"]}
    alphas = {"lora_alpha": config["lora_alpha"], **config["alpha_pattern"]}
    for name in ranks | alphas:
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"{path} has the pattern {name!r}, which is not a regular expression "
                             f"({error})") from None
        if type(rank := ranks.get(name, 1)) is not int or rank < 1:
            raise ValueError(f"{path}: the rank {name} is {rank!r}; it must be an integer of at "
                             "least 1")
        if not isinstance(alpha := alphas.get(name, 1), int | float):
            raise ValueError(f"{path}: the alpha {name} is {alpha!r}; it must be a number")
    return config
