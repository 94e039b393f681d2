"""Deltas: small edits of the parameter tree that layers honour where they are present.

| recipe     | makes                                                                     |
|------------|---------------------------------------------------------------------------|
| lora:R:... | in each target: lora_a [inputs, R], lora_b [R, outputs], lora_scale []    |
| adapter:M  | for each sublayer: <sublayer>_adapter/{down,up}/{kernel,bias} of width M  |
| prefix:P   | in each attention: prefix_key and prefix_value [P, N, H]                  |
| prompt:P   | in the model: prompt [P, D]                                               |
| ia3        | in key and value: ia3_output [N, H]; in mlp/wo: ia3_input [F]             |

Targets of LoRA are names of linear layers, query and value if none is given, or "all". Options:
alpha=A (twice the rank if not given), dropout=P, rslora, dora:

    lora:8    lora:16:query,key,value,out    lora:8:all,alpha=16,dropout=0.05,dora

The model's function is the same before and after an edit, except that prefixes and prompts, which
others look at, change it at once. `merge` folds the rest into plain kernels again.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from transformer_jax.finetuning.select import split_spec, trainable_mask
from transformer_jax.models import GPT, Model
from transformer_jax.nn.layers import dequantize
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

TARGETS = ("query", "key", "value", "out", "wi", "wo")
_OUTPUT_AXES = {"query": 2, "key": 2, "value": 2}  # [D, N, H]; every other kernel has one

Leaves = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class LoRA:
    """The settings of a low-rank update W + s A B.

    Attributes:
        rank: R, the width in the middle.
        targets: names of linear layers.
        alpha: s is alpha / R (Hu et al. 2021, section 4.1).
        dropout: rate on the input of A.
        rslora: s is alpha / sqrt(R) (Kalajdzievski 2023, "rsLoRA", theorem 3.2).
        dora: magnitude and direction apart (Liu et al. 2024, "DoRA", section 4).
    """

    rank: int
    targets: tuple[str, ...] = ("query", "value")
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        alpha = 2 * self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


def parse_lora(argument: str) -> LoRA:
    """The settings in the argument of a recipe, such as "8:query,value,alpha=16,dora".

    Raises:
        ValueError: a rank below 1, an unknown target or option, or a value out of range.
    """
    rank, _, rest = argument.partition(":")
    settings: dict = {"rank": _positive("lora", rank)}
    targets: list[str] = []
    for word in filter(None, rest.split(",")):
        name, equals, value = word.partition("=")
        if word in ("rslora", "dora"):
            settings[word] = True
        elif word == "all":
            targets += TARGETS
        elif word in TARGETS:
            targets.append(word)
        elif equals and name in ("alpha", "dropout"):
            settings[name] = _number(name, value)
        else:
            raise ValueError(f"lora:{argument}: unknown target or option {word!r}; targets are "
                             f"{', '.join(TARGETS)} or all, options alpha=, dropout=, rslora, dora")
    if targets:
        settings["targets"] = tuple(dict.fromkeys(targets))
    return LoRA(**settings)


def _number(name: str, value: str) -> float:
    low, high = (0.0, math.inf) if name == "alpha" else (-1e-300, 1.0)
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not low < found < high:
        raise ValueError(f"{name} of lora is {value!r}; it must be "
                         + ("a number above 0" if name == "alpha" else "at least 0 and below 1"))
    return found


def _positive(name: str, argument: str) -> int:
    if not argument.isdecimal() or int(argument) < 1:
        raise ValueError(f"{name}:{argument}: the size is {argument!r}; it must be a whole number "
                         f"of at least 1, for example {name}:8")
    return int(argument)


def _kernels(leaves: Leaves, names: Sequence[str]) -> dict[str, tuple[tuple, tuple]]:
    """layer path -> (input sizes, output sizes) of the kernels in stacks with one of the names."""
    found = {}
    for path, leaf in leaves.items():
        match = re.search(r"(?:^|/)layer_\d+/.*?(\w+)/kernel(?:_int8)?$", path)
        if match and match[1] in names and "_adapter/" not in path:
            axes = _OUTPUT_AXES.get(match[1], 1)
            found[path.rpartition("/")[0]] = (leaf.shape[:-axes], leaf.shape[-axes:])
    return found


def _lora(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    lora = parse_lora(argument)
    made: Leaves = {}
    for i, (layer, (inputs, outputs)) in enumerate(_kernels(leaves, lora.targets).items()):
        # A uniform as its released code draws it, B zero: the update starts at zero.
        bound = 1 / math.sqrt(math.prod(inputs))
        key = jax.random.fold_in(rng, i)
        made[f"{layer}/lora_a"] = jax.random.uniform(
            key, (*inputs, lora.rank), jnp.float32, -bound, bound)
        made[f"{layer}/lora_b"] = jnp.zeros((lora.rank, *outputs))
        made[f"{layer}/lora_scale"] = jnp.float32(lora.scale)
        if lora.dropout:
            made[f"{layer}/lora_dropout"] = jnp.float32(lora.dropout)
        if lora.dora:
            made[f"{layer}/lora_magnitude"] = column_norms(float_matrix(leaves, layer), len(inputs))
    return made


def _adapter(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    width = _positive("adapter", argument)
    made: Leaves = {}
    for path, leaf in leaves.items():
        match = re.fullmatch(r"(.*layer_\d+/(?:attention|cross_attention|mlp))_norm/scale", path)
        if not match:
            continue
        layer, d_model = f"{match[1]}_adapter", leaf.shape[-1]
        key = jax.random.fold_in(rng, len(made))
        # Normal with deviation 0.01 (Houlsby et al. 2019, section 3.6); up at zero: the identity.
        made |= {
            f"{layer}/down/kernel": 0.01 * jax.random.truncated_normal(
                key, -2, 2, (d_model, width), jnp.float32),
            f"{layer}/down/bias": jnp.zeros(width),
            f"{layer}/up/kernel": jnp.zeros((width, d_model)),
            f"{layer}/up/bias": jnp.zeros(d_model),
        }
    return made


def _prefix(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    length = _positive("prefix", argument)
    made: Leaves = {}
    for layer, (_, heads) in _kernels(leaves, ("key",)).items():
        for name in ("key", "value"):
            key = jax.random.fold_in(rng, len(made))
            made[f"{layer.rpartition('/')[0]}/prefix_{name}"] = 0.02 * jax.random.normal(
                key, (length, *heads), jnp.float32)
    return made


def _prompt(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    """Rows of tokens drawn from the vocabulary, which does better than noise (Lester et al. 2021,
    section 3.2)."""
    length = _positive("prompt", argument)
    table = float_matrix(leaves, "token_embed", "embedding")
    rows = jax.random.choice(rng, table.shape[0], (length,))
    return {"prompt": jnp.take(table, rows, axis=0)}


def _ia3(argument: None, leaves: Leaves, rng: jax.Array) -> Leaves:
    heads = _kernels(leaves, ("key", "value"))
    hidden = _kernels(leaves, ("wo",))
    return {f"{layer}/ia3_output": jnp.ones(outputs) for layer, (_, outputs) in heads.items()} | {
        f"{layer}/ia3_input": jnp.ones(inputs) for layer, (inputs, _) in hidden.items()}


MAKE: dict[str, Callable[[str, Leaves, jax.Array], Leaves]] = {
    "lora": _lora, "adapter": _adapter, "prefix": _prefix, "prompt": _prompt, "ia3": _ia3}
PEFT_PARAM = re.compile(r"(^|/)(lora_\w+|prefix_key|prefix_value|ia3_\w+|prompt)$|_adapter/"
                   r"|(^|/)token_embed/extra$")


def add_peft_params(params: PyTree, recipe: str, rng: jax.Array) -> PyTree:
    """The parameters with what `recipe` trains and they lack; as they are for other recipes.

    Pure, so `jax.eval_shape` and `jit` take it.

    Raises:
        ValueError: a broken recipe, parameters without layers to edit, or a delta that is there
            already.
    """
    leaves = flatten_paths(params)
    for i, (name, argument) in enumerate(split_spec(recipe)):
        if name not in MAKE:
            continue
        made = MAKE[name](argument, leaves, jax.random.fold_in(rng, i))
        if not made:
            raise ValueError(f"recipe {recipe!r}: {name} finds nothing to edit among "
                             f"{len(leaves)} parameters; give those of a model with layers")
        if twice := sorted(made.keys() & leaves.keys()):
            raise ValueError(f"recipe {recipe!r}: the parameters have {twice[0]} already; merge "
                             "what was trained before, or start from the plain base")
        leaves = leaves | made
    return unflatten_paths(leaves)


def add_and_mask(params: PyTree, recipe: str, rng: jax.Array) -> tuple[PyTree, PyTree]:
    """(parameters with the recipe's deltas, mask of what trains): the start of a fine-tuning."""
    params = add_peft_params(params, recipe, rng)
    return params, trainable_mask(params, recipe)


def merge(params: PyTree) -> PyTree:
    """Plain parameters of the same function: LoRA, DoRA and IA3 are folded into their kernels.
    Those kernels are float32; what else is in bfloat16 or int8 stays so (`shrink.restore`).

    Raises:
        ValueError: adapters, prefixes, prompts or new tokens, which no plain model has a place for.
    """
    leaves = flatten_paths(params)
    for path in leaves:
        if PEFT_PARAM.search(path) and not re.search(r"/(lora|ia3)_\w+$", path):
            raise ValueError(f"{path} has no place in a plain model; keep the deltas "
                             "(finetune.store), or train lora or ia3 in its stead")
    return unflatten_paths(_fold(leaves))


def _fold(leaves: Leaves) -> Leaves:
    """LoRA and IA3 in kernels and biases; all else as it is."""
    plain = {path: leaf for path, leaf in leaves.items()
             if not re.search(r"/(lora|ia3)_\w+$", path)}
    edited = {path.rpartition("/")[0] for path in leaves.keys() - plain.keys()}
    for layer in edited:
        edits = {name: leaves.get(f"{layer}/{name}") for name in (
            "lora_a", "lora_b", "lora_scale", "lora_magnitude", "ia3_input", "ia3_output")}
        kernel = float_matrix(leaves, layer)
        if edits["lora_a"] is not None:
            kernel = kernel + edits["lora_scale"] * jnp.tensordot(
                edits["lora_a"], edits["lora_b"], axes=1)
        if edits["lora_magnitude"] is not None:
            norms = column_norms(kernel, kernel.ndim - edits["lora_magnitude"].ndim)
            kernel = kernel * (edits["lora_magnitude"] / norms)
        if (factor := edits["ia3_input"]) is not None:
            kernel = kernel * factor.reshape(*factor.shape, *[1] * (kernel.ndim - factor.ndim))
        if (factor := edits["ia3_output"]) is not None:
            kernel = kernel * factor
            if f"{layer}/bias" in plain:
                plain[f"{layer}/bias"] = plain[f"{layer}/bias"] * factor
        plain.pop(f"{layer}/kernel_int8", None)
        plain.pop(f"{layer}/kernel_scale", None)
        plain[f"{layer}/kernel"] = kernel
    return plain


def float_matrix(leaves: Leaves, layer: str, name: str = "kernel") -> jax.Array:
    """A layer's matrix in float32, however it is kept."""
    if f"{layer}/{name}" in leaves:
        return jnp.asarray(leaves[f"{layer}/{name}"], jnp.float32)
    scale = leaves[f"{layer}/{name}_scale"]
    return dequantize(leaves[f"{layer}/{name}_int8"], scale if name == "kernel" else scale[:, None])


def column_norms(kernel: jax.Array, inputs: int) -> jax.Array:
    """The length of every output's column of weights, and a little where it is zero."""
    norms = jnp.sqrt(jnp.square(kernel).sum(tuple(range(inputs))))
    return jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def add_tokens(params: PyTree, count: int, rng: jax.Array, std: float = 0.02) -> PyTree:
    """The parameters with rows for `count` new special tokens, whose ids follow the vocabulary:
    vocab_size, vocab_size + 1, ... They are inputs only: the output layer does not score them.

    Raises:
        ValueError: a count below 1, or there are such rows already.
    """
    leaves = flatten_paths(params)
    if count < 1:
        raise ValueError(f"count is {count}; add at least 1 token")
    if "token_embed/extra" in leaves:
        raise ValueError(f"the parameters have {len(leaves['token_embed/extra'])} new tokens "
                         "already; add all at once")
    width = float_matrix(leaves, "token_embed", "embedding").shape[1]
    rows = std * jax.random.normal(rng, (count, width), jnp.float32)
    return unflatten_paths(leaves | {"token_embed/extra": rows})


def fold_tokens(model: Model, params: PyTree) -> tuple[Model, PyTree]:
    """(model, parameters) with the rows of new tokens at the end of the vocabulary: a plain model,
    for export. Its output layer then scores them too: a tied one by their rows, another as 0."""
    leaves = dict(flatten_paths(params))
    extra = leaves.pop("token_embed/extra", None)
    if extra is None:
        return model, params
    table = jnp.concatenate([float_matrix(leaves, "token_embed", "embedding"), extra])
    tables = {"token_embed": table}
    if any(path.startswith("lm_head/embedding") for path in leaves):
        untied = float_matrix(leaves, "lm_head", "embedding")
        tables["lm_head"] = jnp.pad(untied, ((0, len(extra)), (0, 0)))
    for layer, whole in tables.items():
        for name in ("embedding_int8", "embedding_scale"):
            leaves.pop(f"{layer}/{name}", None)
        leaves[f"{layer}/embedding"] = whole
    for path in ("mlm_head/output/bias", "output/bias"):
        if path in leaves:
            leaves[path] = jnp.pad(leaves[path], (0, len(extra)))
    config = model.config.replace(vocab_size=table.shape[0])
    return type(model)(config, model.num_classes, model.task), unflatten_paths(leaves)


def fold_prompt(model: GPT, params: PyTree) -> PyTree:
    """A causal model's prompt as prefixes of every layer, exactly: the prompt does not see the
    tokens, so its keys and values never change. With them the model can decode with a cache.

    Raises:
        ValueError: not a GPT, or there is no prompt, or prefixes besides it.
    """
    leaves = dict(flatten_paths(params))
    if not isinstance(model, GPT):
        raise ValueError(f"the model is a {type(model).__name__}, whose prompt sees the tokens; "
                         "only GPT's can be folded")
    if "prompt" not in leaves:
        raise ValueError("the parameters have no prompt to fold")
    if any(path.endswith("prefix_key") for path in leaves):
        raise ValueError("the parameters have prefixes besides a prompt; train one of them")
    cache = model.apply({"params": params}, GPT.init_cache(model.config, 1, len(leaves["prompt"])),
                        method="prompt_cache")
    del leaves["prompt"]
    for layer, seen in cache.items():
        for name, value in zip(seen._fields, seen.rows()):
            leaves[f"decoder/{layer}/self_attention/prefix_{name}"] = value[0]
    return unflatten_paths(leaves)
