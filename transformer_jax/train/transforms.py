"""Optax transformations for fine-tuning.

Layer-wise learning rates, gradual unfreezing, decay toward the pre-trained parameters, an
exponential moving average of the parameters, and gradient clipping.

Each transformation receives the tree of trainable parameters, with None in place of frozen ones,
and selects parameters by their paths. `optimizers.make_optimizer` combines the transformations.

The field names of the state tuples, and the group labels of `gradual_unfreezing`, are parts of the
paths in saved checkpoints: do not rename them.
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
_LABEL_PREFIX = "frozen_until_"


# Layer depth and layer-wise learning rates --------------------------------------------------------


def _all_paths(params: PyTree) -> list[str]:
    """Returns all paths, including those of frozen parameters, whose layers are counted too."""
    def is_placeholder(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    return [path_string(keys) for keys, _ in
            jax.tree_util.tree_leaves_with_path(params, is_leaf=is_placeholder)]


def layer_depths(params: PyTree) -> tuple[dict[str, int], int]:
    """Returns the depth of each parameter by path, and the number of layers L.

    The depth is 0 for embeddings and prompts, i + 1 in layer i (its PEFT parameters included), and
    L + 1 for parameters above the layers, such as heads, and for the embeddings of added tokens.

    In an encoder-decoder, the layers of the decoder are numbered after those of the encoder, and
    the final norm of the encoder has the depth of its last layer. Frozen parameters (None) have no
    depth, but their layers are counted.

    Raises:
        ValueError: the layers are stacked in one array.

    Example:
        >>> params = {"token_embed": {"embedding": 0}, "classifier": {"kernel": 0},
        ...           "encoder": {"layer_0": {"mlp": {"kernel": 0}}, "layer_1": {"mlp": None}}}
        >>> depths, num_layers = layer_depths(params)
        >>> num_layers, depths["encoder/layer_0/mlp/kernel"], depths["classifier/kernel"]
        (2, 1, 3)
    """
    paths = _all_paths(params)
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
    params: PyTree,
    layer_decay: float | None,
    head_lr_multiplier: float,
    head_pattern: str = HEAD_PARAMS,
) -> PyTree:
    """Returns the learning-rate multiplier of each parameter (discriminative fine-tuning).

    With the depth d of a parameter and L layers (`layer_depths`), the multiplier is

        layer_decay^(L + 1 - d) * (head_lr_multiplier if the path matches head_pattern else 1)

    References: Howard & Ruder 2018, "ULMFiT", section 3.2; Clark et al. 2020, "ELECTRA",
    appendix B.

    Args:
        params: the trainable parameters.
        layer_decay: ratio of the learning rates of a layer and the layer above it; None means 1.
        head_lr_multiplier: additional factor for the head.
        head_pattern: a regular expression that is searched in the paths and matches the head.

    Example:
        >>> layerwise_lr_multipliers(
        ...     {"token_embed": {"embedding": 0}, "classifier": {"kernel": 0}}, 0.5, 10.0)
        {'classifier': {'kernel': 10.0}, 'token_embed': {'embedding': 0.5}}
    """
    depths, num_layers = layer_depths(params)

    def multiplier(path: str, leaf: Any) -> float:
        decay = 1.0 if layer_decay is None else layer_decay ** (num_layers + 1 - depths[path])
        return decay * (head_lr_multiplier if re.search(head_pattern, path) else 1.0)

    return map_paths(multiplier, params)


def scale_by_path(factors: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Multiplies each update u by its own factor f: u <- f u.

    Args:
        factors: `factors(updates)` returns a tree of numbers with the structure of the updates.
    """

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        return jax.tree.map(lambda u, f: u * f, updates, factors(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# Gradual unfreezing -------------------------------------------------------------------------------


def unfreeze_steps(params: PyTree, every: int) -> PyTree:
    """Returns the number of the update at which each parameter is unfrozen (ULMFiT, section 3.3).

    Updates are numbered from 0. The trainable parameters of the greatest depth, usually those above
    the layers, are unfrozen at update 0. Then one more layer is unfrozen every `every` updates,
    from the top down, and the embeddings last. Layers without trainable parameters are skipped.

    Example:
        >>> unfreeze_steps(
        ...     {"token_embed": {"embedding": 0}, "classifier": {"kernel": 0}}, every=100)
        {'classifier': {'kernel': 0}, 'token_embed': {'embedding': 100}}
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
    is used.
    """

    def init(params: PyTree) -> FrozenState:
        return FrozenState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: PyTree, state: FrozenState, params: PyTree | None = None):
        is_active = state.count >= start
        new_updates, new_state = inner.update(updates, state.inner, params)
        new_updates = jax.tree.map(
            lambda u: jnp.where(is_active, u, jnp.zeros_like(u)), new_updates)
        new_state = jax.tree.map(
            lambda new, old: jnp.where(is_active, new, old), new_state, state.inner)
        return new_updates, FrozenState(state.count + 1, new_state)

    return optax.GradientTransformation(init, update)


def gradual_unfreezing(
    inner: optax.GradientTransformation, every: int, clip_norm: float | None
) -> optax.GradientTransformation:
    """Unfreezes one more layer, from the top down, every `every` updates (ULMFiT, section 3.3).

    Update t, counted from 0, of a parameter that is unfrozen at update s (`unfreeze_steps`) is

        0                             if t < s
        inner(clip(g_t, clip_norm))   if t >= s

    The global norm does not include the gradients of parameters that are still frozen. Each group
    of parameters that is unfrozen together has its own state of `inner`. All steps run the same
    compiled program.

    Args:
        inner: the transformation of the unfrozen parameters, such as Adam.
        every: the number of updates after which the next layer is unfrozen.
        clip_norm: the global norm that gradients are clipped to; None does not clip.
    """

    def group_labels(params: PyTree) -> PyTree:
        return map_paths(lambda path, start: f"{_LABEL_PREFIX}{start}",
                         unfreeze_steps(params, every))

    def partitioned(params: PyTree) -> optax.GradientTransformation:
        labels = group_labels(params)
        names = sorted(set(jax.tree.leaves(labels)))
        return optax.partition(
            {name: frozen_until(inner, int(name.removeprefix(_LABEL_PREFIX))) for name in names},
            labels)

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

    Args:
        rate: decay rate of pre-trained parameters, including biases and norms, because they all
            have a pre-trained value.
        new_rate: decay rate of new parameters.
        mask: `mask(params)` returns a tree of booleans, True for the new parameters that decay.
        new_pattern: a regular expression that is searched in the paths and matches new parameters.
            The pooler of an encoder-decoder is new as well.
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

    Args:
        decay: in (0, 1).

    Example:
        >>> optimizer = optax.chain(optax.sgd(1.0), params_ema(0.75))
        >>> params = {"w": jnp.zeros(())}
        >>> _, opt_state = optimizer.update({"w": jnp.ones(())}, optimizer.init(params), params)
        >>> float(get_ema_params(opt_state)["w"])
        -0.25
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

    Example:
        >>> clip = clip_by_global_norm(1.0)
        >>> grads, _ = clip.update({"w": jnp.array([3.0, 4.0])}, clip.init(None))
        >>> round(float(optax.tree.norm(grads)), 3)
        1.0
    """

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(max_norm / optax.tree.norm(updates), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
