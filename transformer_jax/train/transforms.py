"""Optax transformations for fine-tuning, which `optimizers.make_optimizer` combines.

Each transformation receives the tree of trainable parameters, with None in place of frozen ones,
and selects parameters by their paths. The field names of the state tuples, and the group labels of
`gradual_unfreezing`, are parts of the paths in saved checkpoints: do not rename them.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer_jax.tree import LAYERS, PyTree, flatten_paths, map_paths, path_string

# Regular expressions, searched in parameter paths: new parameters (classifier, embeddings of added
# tokens, PEFT parameters), and the classifier.
NEW_PARAMS = r"(^|/)(classifier/|extra$)|(^|/)(lora_\w+|prefix_\w+|ia3_\w+|prompt)$|_adapter/"
HEAD_PARAMS = r"(^|/)classifier/"
_LAYER = re.compile(r"(?:^|/)(encoder|decoder)/layer_(\d+)/")
_STACKED = re.compile(rf"(^|/){LAYERS}/")
_BELOW_LAYERS = re.compile(r"_embed/|(^|/)embed_norm/|_embed_norm/|^prompt$")


# Layer depth and layer-wise learning rates --------------------------------------------------------


def layer_depths(params: PyTree) -> tuple[dict[str, int], int]:
    """Returns the depth of each parameter by path, and the number of layers L.

    The depth is 0 for embeddings and prompts, i + 1 in layer i (its PEFT parameters included), and
    L + 1 for parameters above the layers, such as heads, and for the embeddings of added tokens.
    The layers of a decoder are numbered after those of the encoder, whose final norm then has the
    depth of its last layer. Frozen parameters (None) have no depth, but their layers are counted.
    """
    paths = [path_string(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(
        params, is_leaf=lambda node: node is None or isinstance(node, optax.MaskedNode))]
    if stacked := [path for path in paths if _STACKED.search(path)]:
        raise ValueError(f"{stacked[0]} holds all layers in one array, which has a single learning "
                         "rate; unstack the parameters with tree.unstack_layers")
    layers = [match for path in paths if (match := _LAYER.search(path))]
    num_layers = {stack: 1 + max((int(m[2]) for m in layers if m[1] == stack), default=-1)
                  for stack in ("encoder", "decoder")}
    offset = {"encoder": 0, "decoder": num_layers["encoder"]}
    total = sum(num_layers.values())

    def depth(path: str) -> int:
        if match := _LAYER.search(path):
            return offset[match[1]] + int(match[2]) + 1
        if path.startswith("encoder/") and num_layers["decoder"]:
            return num_layers["encoder"]
        # Embeddings of added tokens are trained from the first step on, like a new head.
        return 0 if _BELOW_LAYERS.search(path) and not path.endswith("/extra") else total + 1

    return {path: depth(path) for path in flatten_paths(params)}, total


def layerwise_lr_multipliers(
    params: PyTree, layer_decay: float | None, head_lr_multiplier: float,
    head_pattern: str = HEAD_PARAMS,
) -> PyTree:
    """Returns the learning-rate multiplier of each parameter (discriminative fine-tuning).

    With the depth d of a parameter and L layers (`layer_depths`), the multiplier is

        layer_decay^(L + 1 - d) * (head_lr_multiplier if the path matches head_pattern else 1)

    where a `layer_decay` of None means 1. Howard & Ruder 2018, "ULMFiT", section 3.2; Clark et al.
    2020, "ELECTRA", appendix B.
    """
    depths, num_layers = layer_depths(params)

    def multiplier(path: str, leaf: Any) -> float:
        decay = 1.0 if layer_decay is None else layer_decay ** (num_layers + 1 - depths[path])
        return decay * (head_lr_multiplier if re.search(head_pattern, path) else 1.0)

    return map_paths(multiplier, params)


# Gradual unfreezing -------------------------------------------------------------------------------


def unfreeze_steps(params: PyTree, every: int) -> PyTree:
    """Returns the number of the update at which each parameter is unfrozen (ULMFiT, section 3.3).

    Updates are numbered from 0. The trainable parameters of the greatest depth, usually those above
    the layers, are unfrozen at update 0. Then one more layer is unfrozen every `every` updates,
    from the top down, and the embeddings last. Layers without trainable parameters are skipped.
    """
    depths, _ = layer_depths(params)
    order = {d: i for i, d in enumerate(sorted(set(depths.values()), reverse=True))}
    return map_paths(lambda path, leaf: order[depths[path]] * every, params)


class FrozenState(NamedTuple):
    """State of `frozen_until` and `gradual_unfreezing`."""

    count: jax.Array  # int32[], updates so far
    inner: Any  # state of the inner transformation


def frozen_until(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
    """Applies `inner` from update `start` on. Earlier updates are zero and do not change its state.

    The moments of `inner` and their bias correction therefore start with the first gradient that
    is used. `optax.conditionally_mask` does the same, but its state has other paths in checkpoints.
    """
    def init(params: PyTree) -> FrozenState:
        return FrozenState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: PyTree, state: FrozenState, params: PyTree | None = None):
        is_active = state.count >= start
        updates, inner_state = inner.update(updates, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(is_active, u, jnp.zeros_like(u)), updates)
        inner_state = jax.tree.map(
            lambda new, old: jnp.where(is_active, new, old), inner_state, state.inner)
        return updates, FrozenState(state.count + 1, inner_state)

    return optax.GradientTransformation(init, update)


def gradual_unfreezing(
    inner: optax.GradientTransformation, every: int, clip_norm: float | None
) -> optax.GradientTransformation:
    """Unfreezes one more layer, from the top down, every `every` updates (ULMFiT, section 3.3).

    Update t, counted from 0, of a parameter that is unfrozen at update s (`unfreeze_steps`) is

        0                             if t < s
        inner(clip(g_t, clip_norm))   if t >= s

    The global norm does not include the gradients of parameters that are still frozen, and None
    does not clip. Each group of parameters that is unfrozen together has its own state of `inner`,
    such as Adam. All steps run the same compiled program.
    """
    def partitioned(params: PyTree) -> optax.GradientTransformation:
        steps = unfreeze_steps(params, every)
        groups = {f"frozen_until_{n}": frozen_until(inner, n)
                  for n in sorted(set(jax.tree.leaves(steps)))}
        return optax.partition(groups, jax.tree.map("frozen_until_{}".format, steps))

    def init(params: PyTree) -> FrozenState:
        return FrozenState(jnp.zeros((), jnp.int32), partitioned(params).init(params))

    def update(updates: PyTree, state: FrozenState, params: PyTree | None = None):
        is_unfrozen = jax.tree.map(
            lambda start: state.count >= start, unfreeze_steps(updates, every))
        updates = jax.tree.map(
            lambda u, active: jnp.where(active, u, jnp.zeros_like(u)), updates, is_unfrozen)
        if clip_norm is not None:
            updates, _ = clip_by_global_norm(clip_norm).update(updates, optax.EmptyState())
        updates, inner_state = partitioned(updates).update(updates, state.inner, params)
        return updates, FrozenState(state.count + 1, inner_state)

    return optax.GradientTransformation(init, update)


# Decay toward the pre-trained parameters ----------------------------------------------------------


class L2SPState(NamedTuple):
    """State of `l2_sp`."""

    anchor: PyTree  # the initial parameters; 0 for new parameters


def l2_sp(
    rate: float, new_rate: float, mask: Callable[[PyTree], PyTree], new_pattern: str = NEW_PARAMS
) -> optax.GradientTransformation:
    """Adds decay toward the pre-trained parameters (L2-SP).

    With the parameters p, and the pre-trained parameters p0 that `init` received,

        u <- u + rate (p - p0)    for pre-trained parameters
        u <- u + new_rate p       for new parameters, where mask(params) is true

    Li et al. 2018, "Explicit Inductive Bias for Transfer Learning", equation 5. The decay is
    decoupled as in AdamW: place this transformation after the moments and before the learning rate.
    It includes biases and norms, because they all have a pre-trained value. New parameters are
    those whose path matches `new_pattern`, and the pooler of an encoder-decoder.
    """
    def is_new(params: PyTree) -> PyTree:
        pooler = r"|^pooler/" if {"encoder", "decoder"} <= set(params) else ""
        return map_paths(lambda path, leaf: bool(re.search(new_pattern + pooler, path)), params)

    def init(params: PyTree) -> L2SPState:
        return L2SPState(jax.tree.map(
            lambda p, new: jnp.zeros_like(p) if new else jnp.copy(p), params, is_new(params)))

    def update(updates: PyTree, state: L2SPState, params: PyTree):
        rates = jax.tree.map(lambda new, decays: new_rate * decays if new else rate,
                             is_new(params), mask(params))
        return jax.tree.map(lambda u, p, a, r: u + r * (p - a), updates, params, state.anchor,
                            rates), state

    return optax.GradientTransformation(init, update)


# Exponential moving average of the parameters -----------------------------------------------------


class EmaState(NamedTuple):
    """State of `params_ema`."""

    average: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Tracks an exponential moving average of the parameters (Polyak averaging).

    With the parameters p_t after update t, the average is

        a_0 = p_0,   a_t = decay a_{t-1} + (1 - decay) p_t

    The average starts at the initial parameters, so it needs no bias correction. The updates are
    unchanged. Place this transformation last in a chain, and get the average with `get_ema_params`.
    """
    def init(params: PyTree) -> EmaState:
        return EmaState(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: EmaState, params: PyTree):
        new_params = optax.apply_updates(params, updates)
        return updates, EmaState(
            jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, new_params))

    return optax.GradientTransformation(init, update)


def get_ema_params(opt_state: PyTree) -> PyTree | None:
    """Returns the parameter average in the state of an optimizer with `params_ema`, else None.

    Frozen parameters are None in the average.
    """
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, EmaState))
             if isinstance(s, EmaState)]
    return found[0].average if found else None


# Clipping -----------------------------------------------------------------------------------------


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales down gradients whose norm over all leaves is above `max_norm`.

        g <- g min(max_norm / ||g||, 1)

    Pascanu et al. 2013, "On the difficulty of training recurrent neural networks", algorithm 1.

    Equal to `optax.clip_by_global_norm`, but all gradients are multiplied by one factor. XLA fuses
    this multiplication into each use of the gradients. For Optax's division it stores a clipped
    copy of all gradients, which for GPT-2 on a CPU takes 2 % of the step's time and 0.15 GB.
    """
    def clip(updates: PyTree, params: PyTree | None) -> PyTree:
        factor = jnp.minimum(max_norm / optax.tree.norm(updates), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

    return optax.stateless(clip)
