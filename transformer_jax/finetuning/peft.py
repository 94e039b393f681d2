"""PEFT parameters: small trainable additions to the parameter tree, applied by the layers.

| spec       | added parameters                                                               |
|------------|--------------------------------------------------------------------------------|
| lora:R:... | in each target layer: lora_a [inputs, R], lora_b [R, outputs], lora_scale []   |
| adapter:M  | for each sublayer: <sublayer>_adapter/{down,up}/{kernel,bias}, of width M      |
| prefix:P   | in each attention layer: prefix_key and prefix_value [P, N, H]                 |
| prompt:P   | in the model: prompt [P, D]                                                    |
| ia3        | in key and value layers: ia3_output [N, H]; in mlp/wo: ia3_input [F]           |

`select` lists the paper of each. A layer uses these parameters whenever they are present.

The targets of LoRA are names of linear layers (query, key, value, out, wi, wo), or "all" for all of
them; by default query and value. Its options are alpha=A (default: twice the rank), dropout=P,
rslora and dora. Examples:

    lora:8    lora:16:query,key,value,out    lora:8:all,alpha=16,dropout=0.05,dora

The added parameters are initialized so that the model's outputs do not change. The exceptions are
prefixes and prompts: tokens attend to them as soon as they are added. `merge` merges LoRA, DoRA and
IA3 into the kernels.
"""

import math
import re
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from transformer_jax.finetuning.select import parse_lora, parse_size, split_spec, trainable_mask
from transformer_jax.models import GPT, Model
from transformer_jax.nn.quantized import dequantize
from transformer_jax.tree import PyTree, flatten_paths, unflatten_paths

# Matches the paths of PEFT parameters, the embeddings of added tokens included.
PEFT_PARAM = re.compile(r"(^|/)(lora_\w+|prefix_key|prefix_value|ia3_\w+|prompt)$|_adapter/"
                        r"|(^|/)token_embed/extra$")
_NUM_OUTPUT_AXES = {"query": 2, "key": 2, "value": 2}  # [D, N, H]; other kernels have one

Leaves = dict[str, jax.Array]  # path -> parameter


def _find_kernels(leaves: Leaves, names: Sequence[str]) -> dict[str, tuple[tuple, tuple]]:
    """Finds the kernels of linear layers with given names in layer_0, layer_1, ...

    Returns layer path -> (sizes of the input axes, sizes of the output axes).
    """
    found = {}
    for path, leaf in leaves.items():
        match = re.search(r"(?:^|/)layer_\d+/.*?(\w+)/kernel(?:_int8)?$", path)
        if match and match[1] in names and "_adapter/" not in path:
            axes = _NUM_OUTPUT_AXES.get(match[1], 1)
            found[path.rpartition("/")[0]] = (leaf.shape[:-axes], leaf.shape[-axes:])
    return found


def _init_lora(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    lora = parse_lora(argument)
    added: Leaves = {}
    for i, (layer, (inputs, outputs)) in enumerate(_find_kernels(leaves, lora.targets).items()):
        # A is uniform, as in the authors' code, and B is zero, so that the update starts at zero.
        bound = 1 / math.sqrt(math.prod(inputs))
        key = jax.random.fold_in(rng, i)
        added[f"{layer}/lora_a"] = jax.random.uniform(
            key, (*inputs, lora.rank), jnp.float32, -bound, bound)
        added[f"{layer}/lora_b"] = jnp.zeros((lora.rank, *outputs))
        added[f"{layer}/lora_scale"] = jnp.float32(lora.scale)
        if lora.dropout:
            added[f"{layer}/lora_dropout"] = jnp.float32(lora.dropout)
        if lora.dora:
            added[f"{layer}/lora_magnitude"] = column_norms(
                float32_matrix(leaves, layer), len(inputs))
    return added


def _init_adapter(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    width = parse_size("adapter", argument)
    added: Leaves = {}
    for path, leaf in leaves.items():
        match = re.fullmatch(r"(.*layer_\d+/(?:attention|cross_attention|mlp))_norm/scale", path)
        if not match:
            continue
        layer, d_model = f"{match[1]}_adapter", leaf.shape[-1]
        key = jax.random.fold_in(rng, len(added))
        # Normal with standard deviation 0.01, truncated at two of them (Houlsby et al. 2019,
        # section 3.6). The up projection is zero, so that the adapter starts as the identity.
        added |= {
            f"{layer}/down/kernel": 0.01 * jax.random.truncated_normal(
                key, -2, 2, (d_model, width), jnp.float32),
            f"{layer}/down/bias": jnp.zeros(width),
            f"{layer}/up/kernel": jnp.zeros((width, d_model)),
            f"{layer}/up/bias": jnp.zeros(d_model),
        }
    return added


def _init_prefix(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    length = parse_size("prefix", argument)
    added: Leaves = {}
    for layer, (_, heads) in _find_kernels(leaves, ("key",)).items():
        for name in ("key", "value"):
            key = jax.random.fold_in(rng, len(added))
            added[f"{layer.rpartition('/')[0]}/prefix_{name}"] = 0.02 * jax.random.normal(
                key, (length, *heads), jnp.float32)
    return added


def _init_prompt(argument: str, leaves: Leaves, rng: jax.Array) -> Leaves:
    # Embeddings of random tokens are better than noise (Lester et al. 2021, section 3.2).
    table = float32_matrix(leaves, "token_embed", "embedding")
    ids = jax.random.choice(rng, table.shape[0], (parse_size("prompt", argument),))
    return {"prompt": jnp.take(table, ids, axis=0)}


def _init_ia3(argument: None, leaves: Leaves, rng: jax.Array) -> Leaves:
    heads, hidden = _find_kernels(leaves, ("key", "value")), _find_kernels(leaves, ("wo",))
    return {f"{layer}/ia3_output": jnp.ones(outputs) for layer, (_, outputs) in heads.items()} | {
        f"{layer}/ia3_input": jnp.ones(inputs) for layer, (inputs, _) in hidden.items()}


# Name of a term -> function (argument, parameters, rng) -> added parameters.
_INITIALIZERS: dict[str, Callable[[str, Leaves, jax.Array], Leaves]] = {
    "lora": _init_lora, "adapter": _init_adapter, "prefix": _init_prefix, "prompt": _init_prompt,
    "ia3": _init_ia3}


def add_peft_params(params: PyTree, spec: str, rng: jax.Array) -> PyTree:
    """Adds the PEFT parameters of a trainable spec; terms such as "bitfit" add nothing.

    The function is pure and can be traced by `jax.jit` and `jax.eval_shape`.

    Raises:
        ValueError: the spec is invalid, there are no layers of the required kind, or the PEFT
            parameters already exist.

    Example:
        >>> params = {"layer_0": {"attention": {"query": {"kernel": jnp.ones((8, 2, 4))}}}}
        >>> params = add_peft_params(params, "lora:3:query", jax.random.key(0))
        >>> query = params["layer_0"]["attention"]["query"]
        >>> query["lora_a"].shape, query["lora_b"].shape
        ((8, 3), (3, 2, 4))
    """
    leaves = flatten_paths(params)
    for i, (name, argument) in enumerate(split_spec(spec)):
        if name not in _INITIALIZERS:
            continue
        added = _INITIALIZERS[name](argument, leaves, jax.random.fold_in(rng, i))
        if not added:
            raise ValueError(f"trainable spec {spec!r}: none of {len(leaves)} parameters belongs "
                             f"to a layer that {name} applies to; give the parameters of a model "
                             "with layers")
        if existing := sorted(added.keys() & leaves.keys()):
            raise ValueError(f"trainable spec {spec!r}: the parameters already have "
                             f"{existing[0]}; merge them first, or start from the base model")
        leaves = leaves | added
    return unflatten_paths(leaves)


def add_and_mask(params: PyTree, spec: str, rng: jax.Array) -> tuple[PyTree, PyTree]:
    """Adds the PEFT parameters of a trainable spec and returns (params, mask).

    The mask is True at trainable parameters.

    Raises:
        ValueError: as `add_peft_params` and `select.trainable_mask`.

    Example:
        >>> params = {"layer_0": {"mlp": {"wo": {"kernel": jnp.ones((8, 4))}}}}
        >>> params, mask = add_and_mask(params, "lora:2:wo", jax.random.key(0))
        >>> mask["layer_0"]["mlp"]["wo"]
        {'kernel': False, 'lora_a': True, 'lora_b': True, 'lora_scale': False}
    """
    params = add_peft_params(params, spec, rng)
    return params, trainable_mask(params, spec)


def merge(params: PyTree) -> PyTree:
    """Merges LoRA, DoRA and IA3 into the kernels, without changing the model's outputs.

    Merged kernels are float32. Other parameters in bfloat16 or int8 are unchanged
    (`frozen.dequantize` converts them).

    Raises:
        ValueError: there are adapters, prefixes, prompts or embeddings of added tokens, which
            cannot be merged.

    Example:
        >>> layer = {"kernel": jnp.ones((4, 2)), "lora_a": jnp.ones((4, 1)),
        ...          "lora_b": jnp.ones((1, 2)), "lora_scale": 2.0}
        >>> merge({"layer_0": {"mlp": {"wo": layer}}})["layer_0"]["mlp"]["wo"]["kernel"][0].tolist()
        [3.0, 3.0]
    """
    leaves, mergeable = flatten_paths(params), re.compile(r"/(lora|ia3)_\w+$")
    for path in leaves:
        if PEFT_PARAM.search(path) and not mergeable.search(path):
            raise ValueError(f"{path} cannot be merged into the base model; save the PEFT "
                             "parameters with finetuning.adapter_io, or train lora or ia3 instead")
    merged = {path: leaf for path, leaf in leaves.items() if not mergeable.search(path)}
    layers = {path.rpartition("/")[0] for path in leaves.keys() - merged.keys()}
    for layer in layers:
        peft = {name: leaves.get(f"{layer}/{name}") for name in (
            "lora_a", "lora_b", "lora_scale", "lora_magnitude", "ia3_input", "ia3_output")}
        kernel = float32_matrix(leaves, layer)
        if peft["lora_a"] is not None:
            kernel = kernel + peft["lora_scale"] * jnp.tensordot(
                peft["lora_a"], peft["lora_b"], axes=1)
        if peft["lora_magnitude"] is not None:
            norms = column_norms(kernel, kernel.ndim - peft["lora_magnitude"].ndim)
            kernel = kernel * (peft["lora_magnitude"] / norms)
        if (scale := peft["ia3_input"]) is not None:
            kernel = kernel * scale.reshape(*scale.shape, *[1] * (kernel.ndim - scale.ndim))
        if (scale := peft["ia3_output"]) is not None:
            kernel = kernel * scale
            if f"{layer}/bias" in merged:
                merged[f"{layer}/bias"] = merged[f"{layer}/bias"] * scale
        for name in ("kernel_int8", "kernel_scale"):
            merged.pop(f"{layer}/{name}", None)
        merged[f"{layer}/kernel"] = kernel
    return unflatten_paths(merged)


def float32_matrix(leaves: Leaves, layer: str, name: str = "kernel") -> jax.Array:
    """Returns the kernel or embedding of a layer in float32; int8 is dequantized."""
    if f"{layer}/{name}" in leaves:
        return jnp.asarray(leaves[f"{layer}/{name}"], jnp.float32)
    scale = leaves[f"{layer}/{name}_scale"]
    return dequantize(leaves[f"{layer}/{name}_int8"], scale if name == "kernel" else scale[:, None])


def column_norms(kernel: jax.Array, num_input_axes: int) -> jax.Array:
    """Returns the norm of each output's weights, at least the smallest normal float32."""
    norms = jnp.sqrt(jnp.square(kernel).sum(tuple(range(num_input_axes))))
    return jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def add_tokens(params: PyTree, num_tokens: int, rng: jax.Array, std: float = 0.02) -> PyTree:
    """Adds embeddings of new special tokens, with the ids vocab_size, vocab_size + 1, ...

    The new tokens are inputs only; the output layer has no logits for them. Their embeddings are
    `token_embed/extra`, `[num_tokens, D]`, with initial standard deviation `std`.
    """
    leaves = flatten_paths(params)
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}; it must be at least 1")
    if "token_embed/extra" in leaves:
        raise ValueError(f"{len(leaves['token_embed/extra'])} tokens were already added to the "
                         "parameters; add all tokens at once")
    d_model = float32_matrix(leaves, "token_embed", "embedding").shape[1]
    extra = std * jax.random.normal(rng, (num_tokens, d_model), jnp.float32)
    return unflatten_paths(leaves | {"token_embed/extra": extra})


def fold_tokens(model: Model, params: PyTree) -> tuple[Model, PyTree]:
    """Appends the embeddings of added tokens to the vocabulary of the model, for export.

    The output layer then has logits for these tokens too: computed from their embeddings if the
    output layer is tied, otherwise 0.
    """
    leaves = dict(flatten_paths(params))
    extra = leaves.pop("token_embed/extra", None)
    if extra is None:
        return model, params
    token_table = jnp.concatenate([float32_matrix(leaves, "token_embed", "embedding"), extra])
    tables = {"token_embed": token_table}
    if any(path.startswith("lm_head/embedding") for path in leaves):
        output_table = float32_matrix(leaves, "lm_head", "embedding")
        tables["lm_head"] = jnp.pad(output_table, ((0, len(extra)), (0, 0)))
    for layer, table in tables.items():
        for name in ("embedding_int8", "embedding_scale"):
            leaves.pop(f"{layer}/{name}", None)
        leaves[f"{layer}/embedding"] = table
    for path in ("mlm_head/output/bias", "output/bias"):
        if path in leaves:
            leaves[path] = jnp.pad(leaves[path], (0, len(extra)))
    config = model.config.replace(vocab_size=token_table.shape[0])
    return model.clone(config=config), unflatten_paths(leaves)


def fold_prompt(model: GPT, params: PyTree) -> PyTree:
    """Converts the prompt of a GPT to equivalent prefixes, which decoding with a cache supports.

    The conversion is exact: the prompt does not attend to the tokens after it, so its keys and
    values in each layer are constant.
    """
    leaves = dict(flatten_paths(params))
    if not isinstance(model, GPT):
        raise ValueError(f"the model is a {type(model).__name__}, in which the prompt attends to "
                         "the tokens; only the prompt of a GPT can be folded into prefixes")
    if "prompt" not in leaves:
        raise ValueError("the parameters have no prompt to fold; use them unchanged")
    if any(path.endswith("prefix_key") for path in leaves):
        raise ValueError("the parameters have both prefixes and a prompt; train only one of them")
    cache = model.apply({"params": params}, GPT.init_cache(model.config, 1, len(leaves["prompt"])),
                        method="prompt_cache")
    del leaves["prompt"]
    for layer, layer_cache in cache.items():
        for name, value in zip(layer_cache._fields, layer_cache.as_bsnh()):
            leaves[f"decoder/{layer}/self_attention/prefix_{name}"] = value[0]
    return unflatten_paths(leaves)
