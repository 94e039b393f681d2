"""Options in the adapter_config.json of Hugging Face PEFT: ranks, scales and target modules."""

import collections
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from transformer_jax import storage

_SUPPORTED_OPTIONS = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
    "alpha_pattern", "init_lora_weights"}
# Options that are used only in training, or that are redundant because the adapter's tensors
# contain the same information.
_IGNORED_OPTIONS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
    "peft_version", "target_modules", "exclude_modules", "modules_to_save", "bias",
    "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "runtime_config", "qalora_group_size", "ensure_weight_tying"}
# Values of init_lora_weights that leave the kernels of the base model unchanged.
_SUPPORTED_INITS = (None, True, False, "gaussian", "eva", "orthogonal")


def load_adapter_config(path: Path) -> dict[str, Any]:
    """Loads and checks an adapter_config.json. Missing options get the defaults of PEFT.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the adapter is not LoRA, or an option is invalid or not supported.
    """
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
        if (name not in _SUPPORTED_OPTIONS | _IGNORED_OPTIONS
                and value not in (None, False, 0, [], {})):
            raise ValueError(f"unsupported option {name} {value!r} in {path}; use an adapter that "
                             "was trained without this option")
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False,
              "use_dora": False} | config
    config |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    _check_ranks_and_alphas(config, path)
    return config


def _check_ranks_and_alphas(config: dict[str, Any], path: Path) -> None:
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


def module_option(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT.

    Args:
        patterns: regular expression -> value.
        module: the name of the module.
        default: the value if no pattern matches.

    Example:

        >>> module_option({"query": 4}, "encoder.layer.0.attention.self.query", 8)
        4
    """
    return next((value for pattern, value in patterns.items()
                 if re.match(rf"(.*\.)?({pattern})$", module)), default)


def rank_and_alpha_options(
    ranks_and_scales: Mapping[str, tuple[int, float]], use_rslora: bool
) -> dict[str, Any]:
    """Converts ranks and scales to the options r, lora_alpha, rank_pattern and alpha_pattern.

    The most common rank and alpha become r and lora_alpha; other modules get patterns.

    Args:
        ranks_and_scales: module -> (rank, scale of the LoRA update). It must not be empty.
        use_rslora: whether the scale is alpha / sqrt(r) instead of alpha / r.
    """
    options = {}
    for module, (rank, scale) in ranks_and_scales.items():
        alpha = scale * (math.sqrt(rank) if use_rslora else rank)
        # The scale is stored in float32, so alpha is exact to seven digits.
        nearest = round(alpha)
        options[module] = rank, nearest if math.isclose(alpha, nearest, rel_tol=1e-7) else alpha
    (rank, alpha), _ = collections.Counter(options.values()).most_common(1)[0]
    return {"r": rank, "lora_alpha": alpha,
            "rank_pattern": {m: r for m, (r, _) in options.items() if r != rank},
            "alpha_pattern": {m: a for m, (_, a) in options.items() if a != alpha}}


def target_modules(selected: Collection[str], known: Collection[str]) -> list[str]:
    """The shortest suffixes of module names that match the selected modules and no others.

    Example:

        >>> target_modules({"layer.0.query"}, {"layer.0.query", "layer.0.key"})
        ['query']
    """
    # The base models of Transformers have a pooler even if this model does not.
    known = {*known, "pooler.dense"}
    targets = set()
    for module in selected:
        words = module.split(".")
        suffixes = [".".join(words[i:]) for i in range(len(words) - 1, -1, -1)]
        targets.add(next((suffix for suffix in suffixes if all(
            name in selected for name in known if f".{name}".endswith(f".{suffix}"))), module))
    return sorted(targets)
