"""LoRA in the format of Hugging Face PEFT: adapter_config.json and adapter_model.safetensors.

A module of theirs with `lora_A` [r, in] and `lora_B` [out, r] is one of our kernels with lora_a and
lora_b. GPT's c_attn is query, key and value in one: read, each gets all of A and its third of B.
Written, they share an A if theirs are equal, as after reading; otherwise A has the rows of all
three, B is made of blocks, and the rank is their sum: the same function, and no rounding. Where one
module has DoRA and another LoRA alone, that one gets the magnitudes that change nothing.
"""

import collections
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save

from transformer_jax import storage
from transformer_jax.finetuning.peft import PEFT_PARAM, column_norms, float_matrix, merge
from transformer_jax.models import Model, init_params
from transformer_jax.pretrained import safetensors_io, weight_maps
from transformer_jax.pretrained.families import FAMILIES, write_config
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_TASK_TYPES = {"causal_lm": "CAUSAL_LM", "seq2seq_lm": "SEQ_2_SEQ_LM", "classification": "SEQ_CLS",
               "token_classification": "TOKEN_CLS", "question_answering": "QUESTION_ANS",
               "base": "FEATURE_EXTRACTION", "encoder": "FEATURE_EXTRACTION"}
_READ = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern",
         "alpha_pattern", "init_lora_weights"}
# What the weights themselves say, or what only training or starting anew would need.
_UNUSED = {"auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode",
           "peft_version", "target_modules", "exclude_modules", "modules_to_save", "bias",
           "fan_in_fan_out", "layers_to_transform", "layers_pattern", "megatron_config",
           "megatron_core", "loftq_config", "eva_config", "runtime_config", "qalora_group_size",
           "ensure_weight_tying"}
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # those that leave the base as it is


class LoraModule(NamedTuple):
    """The update of a module as they have it."""

    a: np.ndarray  # [r, in]
    b: np.ndarray  # [out, r]
    scale: float
    magnitude: np.ndarray | None  # [out]


class _Names(NamedTuple):
    model_type: str
    base: str  # in front of all names but the head's
    shapes: dict[str, tuple[int, ...]]
    rules: dict[str, weight_maps.WeightMap]  # by their names, without the base's


def _names(model: Model) -> _Names:
    model_type = write_config(model.config, model.task, model.num_classes)["model_type"]
    family = FAMILIES[model_type]
    abstract = jax.eval_shape(lambda rng: init_params(model, rng), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in flatten_paths(abstract).items()}
    rules = {}
    for rule in weight_maps.rules(model_type, model.task, model.config, shapes):
        rules |= dict.fromkeys((rule.theirs.removeprefix("{base}"), *rule.aliases), rule)
    return _Names(model_type, "" if family.heads[model.task] == "Model" else family.base, shapes,
                  rules)


def _full(rule: weight_maps.WeightMap, names: _Names) -> tuple[str, str]:
    """(module, "weight" or "bias") of a tensor."""
    module, _, kind = rule.theirs.replace("{base}", names.base).rpartition(".")
    return module, kind


def save_peft(
    folder: str | Path, model: Model, params: PyTree, base_model_name: str = "", *,
    mask: PyTree | None = None, rslora: bool = False,
) -> None:
    """Write the LoRA in `params` so that `peft.PeftModel.from_pretrained` loads it onto the
    reference's model.

    The classifier, and what the reference has in one module with it, is written too, with its
    own LoRA folded in.

    Args:
        base_model_name: of the checkpoint, a folder or an id on the hub, for whoever loads it.
        mask: what trained. Besides LoRA and the classifier these may be all biases (PEFT's bias
            "all"), those of the layers with LoRA ("lora_only"), or any others in layers without
            LoRA, such as norms, which are written whole ("modules_to_save").
        rslora: write alpha for PEFT's use_rslora, s sqrt(r) in the place of s r.

    Raises:
        ValueError: no LoRA, other deltas besides it, or what trained has no place in the format.
    """
    names, leaves = _names(model), flatten_paths(params)
    for path in leaves:
        if PEFT_PARAM.search(path) and "/lora_" not in path:
            raise ValueError(f"{path} has no place in PEFT's LoRA; keep such deltas with "
                             "finetune.store.save_delta")
    use_dora = any(path.endswith("/lora_magnitude") for path in leaves)
    rules = list(dict.fromkeys(names.rules.values()))
    placed = {path for rule in rules for path in rule.ours}
    if lost := [path for path in names.shapes if path not in placed]:
        raise ValueError(f"{lost[0]} has no place in a checkpoint of {names.model_type} for "
                         f"{model.task}; build the model without it")
    whole, head = _head(model, names)
    # Where a module is written whole, it cannot have a LoRA of its own beside it.
    folded = {path: leaves.pop(path) for path in list(leaves) if path.startswith(head)}
    leaves |= flatten_paths(merge(unflatten_paths(folded)))
    lows: dict[str, LoraModule] = {}
    for rule in rules:
        layers = [path.removesuffix("/kernel") for path in rule.ours]
        if any(f"{layer}/lora_a" in leaves for layer in layers):
            lows[_full(rule, names)[0]] = _joined(layers, leaves, names.shapes, use_dora)
    if not lows:
        raise ValueError(f"none of {len(leaves)} parameters is of LoRA; train a recipe lora:R, or "
                         "write the whole model with save_pretrained")
    values: dict[str, np.ndarray] = {}
    for module, low in lows.items():
        values |= {f"{module}.lora_A.weight": low.a, f"{module}.lora_B.weight": low.b}
        if low.magnitude is not None:
            values[f"{module}.lora_magnitude_vector"] = low.magnitude
    others, bias = _besides(names, mask, head, set(lows))
    whole |= others
    for rule in rules:
        module, kind = _full(rule, names)
        owner = next((name for name in whole if f"{module}.".startswith(f"{name}.")), None)
        if owner or (bias == "all" and kind == "bias") or (
                bias == "lora_only" and kind == "bias" and module in lows):
            at = f"{module}.base_layer" if module in lows else module
            values[f"{at}.{kind}"] = rule.to_theirs([np.asarray(leaves[p]) for p in rule.ours])
    rates = [float(leaf) for path, leaf in leaves.items() if path.endswith("/lora_dropout")]
    known = {_full(rule, names)[0] for rule in rules}
    config = {
        "peft_type": "LORA", "task_type": _TASK_TYPES.get(model.task),
        "base_model_name_or_path": base_model_name or None, "revision": None,
        "inference_mode": True, "init_lora_weights": True, **_strengths(lows, rslora),
        "lora_dropout": max(rates, default=0.0), "use_rslora": rslora, "use_dora": use_dora,
        "target_modules": _targets(set(lows), known), "modules_to_save": sorted(whole) or None,
        "bias": bias, "fan_in_fan_out": names.model_type in ("gpt2", "openai-gpt"),
    }
    content = save({f"{_PREFIX}{name}": np.ascontiguousarray(value, np.float32)
                    for name, value in values.items()}, {"format": "pt"})
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    for name, data in ((WEIGHTS, content), (CONFIG, text.encode())):
        partial = folder / f"{name}.partial"
        partial.write_bytes(data)
        partial.replace(folder / name)


def _sides(layer: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input sizes, output sizes) of a kernel."""
    inputs = 2 if layer.endswith("attention/out") else 1
    return shape[:inputs], shape[inputs:]


def _joined(layers: Sequence[str], leaves: dict, shapes: dict, use_dora: bool) -> LoraModule:
    """The update of the module that these layers are in theirs."""
    parts: list[tuple[np.ndarray, np.ndarray, float] | None] = []
    for layer in layers:
        if f"{layer}/lora_a" not in leaves:
            parts.append(None)
            continue
        a, b = (np.asarray(leaves[f"{layer}/lora_{x}"], np.float32) for x in "ab")
        parts.append((a.reshape(-1, a.shape[-1]).T, b.reshape(len(b), -1).T,
                      float(leaves[f"{layer}/lora_scale"])))
    present = [part for part in parts if part is not None]
    first, _, scale = present[0]
    shared = all(np.array_equal(a, first) for a, _, _ in present)
    joined = first if shared else np.concatenate([a for a, _, _ in present])
    blocks, column = [], 0
    for layer, part in zip(layers, parts):
        block = np.zeros((math.prod(_sides(layer, shapes[f"{layer}/kernel"])[1]), len(joined)),
                         np.float32)
        if part is not None:
            a, b, own = part
            block[:, column : column + len(a)] = b if own == scale else b * (own / scale)
            column += 0 if shared else len(a)
        blocks.append(block)
    magnitude = None
    if use_dora:
        magnitude = np.concatenate([_magnitude(layer, leaves) for layer in layers])
    return LoraModule(joined, np.concatenate(blocks), scale, magnitude)


def _magnitude(layer: str, leaves: dict) -> np.ndarray:
    """DoRA's m, or the norms that it divides by, with which it is LoRA."""
    if (found := leaves.get(f"{layer}/lora_magnitude")) is None:
        kernel = float_matrix(leaves, layer)
        if f"{layer}/lora_a" in leaves:
            a, b, scale = (leaves[f"{layer}/lora_{part}"] for part in ("a", "b", "scale"))
            kernel = kernel + scale * jnp.tensordot(a, b, axes=1)
        found = column_norms(kernel, len(_sides(layer, kernel.shape)[0]))
    return np.asarray(found, np.float32).reshape(-1)


def _strengths(lows: dict[str, LoraModule], rslora: bool) -> dict[str, Any]:
    """r and alpha of most modules, and patterns for the others."""
    found = {}
    for module, low in lows.items():
        rank = len(low.a)
        alpha = low.scale * (math.sqrt(rank) if rslora else rank)
        near = round(alpha)
        # A scale in float32 is off in the eighth digit.
        found[module] = rank, near if math.isclose(alpha, near, rel_tol=1e-7) else alpha
    (rank, alpha), _ = collections.Counter(found.values()).most_common(1)[0]
    return {"r": rank, "lora_alpha": alpha,
            "rank_pattern": {m: r for m, (r, _) in found.items() if r != rank},
            "alpha_pattern": {m: a for m, (_, a) in found.items() if a != alpha}}


def _targets(chosen: set[str], known: set[str]) -> list[str]:
    """The shortest ends of names that are those of the chosen modules alone."""
    known = known | {"pooler.dense"}  # the reference's bare models have it, whoever uses them
    found = set()
    for module in chosen:
        words = module.split(".")
        ends = [".".join(words[i:]) for i in range(len(words) - 1, -1, -1)]
        found.add(next((end for end in ends if all(
            name in chosen for name in known if f".{name}".endswith(f".{end}"))), module))
    return sorted(found)


def _head(model: Model, names: _Names) -> tuple[set[str], tuple[str, ...]]:
    """The modules of the classifier, and the beginnings of our paths in them."""
    rules = weight_maps.HEADS[names.model_type].get(model.task, []) if model.num_classes else []
    paths = {path.rpartition("/")[0] + "/" for rule in rules for path in rule.ours}
    return {rule.theirs.partition(".")[0] for rule in rules}, tuple(sorted(paths))


def _besides(
    names: _Names, mask: PyTree | None, head: tuple[str, ...], lows: set[str]
) -> tuple[set[str], str]:
    """(modules below the head that are written whole, which biases are)."""
    whole: set[str] = set()
    trains = {} if mask is None else flatten_paths(mask)
    left = {path for path, train in trains.items()
            if train and not path.startswith(head) and "/lora_" not in path}
    if not left:
        return whole, "none"
    placed = {path: _full(rule, names) for rule in names.rules.values() for path in rule.ours
              if not path.startswith(head)}
    biases = {path for path, (_, kind) in placed.items() if kind == "bias"}
    if left == biases:
        return whole, "all"
    if left == {path for path in biases if placed[path][0] in lows}:
        return whole, "lora_only"
    for path in sorted(left):
        module, _ = placed.get(path, (None, None))
        # PEFT copies a module with all that is inside it, so nothing else may own a part of it.
        nested = module is not None and any(
            other.startswith(f"{module}.") for other, _ in placed.values())
        if not module or nested or module in lows or path.startswith("token_embed/"):
            raise ValueError(f"{path} trained beside LoRA, and PEFT's format has no place for it; "
                             "merge the LoRA and use save_pretrained, or keep it with "
                             "finetune.store.save_delta")
        whole.add(module)
    return whole, "none"


def load_peft(folder: str | Path, model: Model, params: PyTree) -> PyTree:
    """`params` with the LoRA of an adapter that PEFT wrote, and with the modules and biases that it
    holds whole in the place of theirs.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: another kind of adapter, an option that is not here, or tensors that are not
            this model's; the message names it.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}; save the adapter again with "
                                "safe_serialization, the default")
    names, leaves = _names(model), flatten_paths(params)
    if twice := [path for path in leaves if "/lora_" in path]:
        raise ValueError(f"the parameters have {twice[0]} already; merge it first, or give those "
                         "of the plain base")
    parts: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    base, made = FAMILIES[names.model_type].base, {}
    for name, entry in safetensors_io.read_header(folder / WEIGHTS).items():
        value = safetensors_io.read(entry).astype(np.float32)
        short = name.removeprefix(_PREFIX)
        if found := re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.weight)?", short):
            parts[found[1]][found[2]] = value
            continue
        plain = re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", short)
        rule = names.rules.get(plain.removeprefix(base))
        if rule is None or value.shape != rule.their_shape(names.shapes):
            wanted = None if rule is None else rule.their_shape(names.shapes)
            raise ValueError(f"{folder}: {name} has shape {value.shape}, the model's {wanted}; "
                             f"a {type(model).__name__} for {model.task} is not what it is for")
        made |= zip(rule.ours, rule.to_ours(value, names.shapes))
    for module, tensors_of in parts.items():
        rule = names.rules.get(f"{module.removeprefix(base)}.weight")
        if rule is None or not rule.ours[0].endswith("/kernel"):
            raise ValueError(f"{folder}: LoRA of {module}, which is no linear layer of a "
                             f"{type(model).__name__} for {model.task}")
        made |= _split(module, rule, tensors_of, config, names.shapes)
    return unflatten_paths(leaves | {path: jnp.asarray(value) for path, value in made.items()})


def _split(module: str, rule: weight_maps.WeightMap, found: dict, config: dict, shapes: dict) -> dict:
    """A module's update as leaves of our layers."""
    rank = _by_pattern(config["rank_pattern"], module, config["r"])
    alpha = _by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    theirs = rule.their_shape(shapes)
    outputs, inputs = theirs if rule.transposed else theirs[::-1]
    wanted = {"lora_A": (rank, inputs), "lora_B": (outputs, rank)} | (
        {"lora_magnitude_vector": (outputs,)} if config["use_dora"] else {})
    if (shape := {name: value.shape for name, value in found.items()}) != wanted:
        raise ValueError(f"{module} has tensors of the shapes {shape}; {CONFIG} and the model ask "
                         f"for {wanted}")
    made, start = {}, 0
    for path in rule.ours:
        layer = path.removesuffix("/kernel")
        ins, outs = _sides(layer, shapes[path])
        rows = slice(start, start := start + math.prod(outs))
        made |= {
            f"{layer}/lora_a": found["lora_A"].T.reshape(*ins, rank),
            f"{layer}/lora_b": found["lora_B"][rows].T.reshape(rank, *outs),
            f"{layer}/lora_scale": np.float32(
                alpha / (math.sqrt(rank) if config["use_rslora"] else rank)),
        }
        if config["lora_dropout"]:
            made[f"{layer}/lora_dropout"] = np.float32(config["lora_dropout"])
        if config["use_dora"]:
            made[f"{layer}/lora_magnitude"] = found["lora_magnitude_vector"][rows].reshape(outs)
    return made


def _by_pattern(patterns: dict[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of the module's name is, as PEFT reads them."""
    return next((value for pattern, value in patterns.items()
                 if re.match(rf"(.*\.)?({pattern})$", module)), default)


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; give the folder of a PEFT adapter")
    config = storage.read_json(path)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path} has peft_type {config.get('peft_type')!r}; only 'LORA' is read "
                         "here")
    if (start := config.get("init_lora_weights", True)) not in _STARTS:
        raise ValueError(f"{path} has init_lora_weights {start!r}, which changes the base's "
                         "kernels; convert the adapter to plain LoRA first (PEFT's "
                         "path_initial_model_for_weight_conversion)")
    for name, value in config.items():
        if name not in _READ | _UNUSED and value not in (None, False, 0, [], {}):
            raise ValueError(f"{path} has {name} {value!r}, which is not here; train the adapter "
                             "without it")
    config = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False,
              "use_dora": False} | config
    config |= {name: config.get(name) or {} for name in ("rank_pattern", "alpha_pattern")}
    for pattern in (*config["rank_pattern"], *config["alpha_pattern"]):
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{path}: {pattern!r} is no regular expression ({error})") from None
    numbers = [config["r"], *config["rank_pattern"].values()]
    if any(type(n) is not int or n < 1 for n in numbers) or not all(
            isinstance(a, int | float) for a in (config["lora_alpha"],
                                                 *config["alpha_pattern"].values())):
        raise ValueError(f"{path}: r must be a whole number of at least 1 and lora_alpha a number")
    return config
