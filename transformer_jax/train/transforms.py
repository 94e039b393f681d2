"""How fast what trains: rates by depth, release from the top down, a pull toward the pre-trained
point, and an average of what trains.

Each is an Optax transformation on the tree that trains, with None in its gaps;
`optim.make_optimizer` puts them together. What they decide by is the path of a parameter.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from transformer_jax.tree import LAYERS, PyTree, flatten_paths, map_paths, path_string

NEW = r"(^|/)(classifier/|extra$)|(^|/)(lora_\w+|prefix_\w+|ia3_\w+|prompt)$|_adapter/"
HEAD = r"(^|/)classifier/"
_LAYER = re.compile(r"(?:^|/)(encoder|decoder)/layer_(\d+)/")
_STACKED = re.compile(rf"(^|/){LAYERS}/")
_BELOW = re.compile(r"_embed/|(^|/)embed_norm/|_embed_norm/|^prompt$")
_GROUP = "frozen_until_"


# Depth --------------------------------------------------------------------------------------------


def _with_gaps(params: PyTree) -> list[str]:
    """All paths, those of gaps too: what does not train still says how deep the model is."""
    def gap(node: Any) -> bool:
        return node is None or isinstance(node, optax.MaskedNode)

    return [path_string(keys)
            for keys, _ in jax.tree_util.tree_leaves_with_path(params, is_leaf=gap)]


def layer_depths(params: PyTree) -> tuple[dict[str, int], int]:
    """(path -> depth, number of layers L): 0 for embeddings and prompts, i + 1 inside layer i with
    its deltas, L + 1 above, and for rows of new tokens.

    The layers of an encoder-decoder count on: the decoder's stand above the encoder's, whose final
    norm is as deep as its last layer. Gaps (None) have no depth but count as layers.

    Raises:
      ValueError: the layers are stacked in one leaf.
    """
    everything = _with_gaps(params)
    if stacked := [path for path in everything if _STACKED.search(path)]:
        raise ValueError(f"{stacked[0]} holds all layers, which have one rate; train the "
                         "parameters that tree.unstack_layers makes")
    layers = [match for path in everything if (match := _LAYER.search(path))]
    size = {stack: 1 + max((int(m[2]) for m in layers if m[1] == stack), default=-1)
            for stack in ("encoder", "decoder")}
    below = {"encoder": 0, "decoder": size["encoder"]}
    total = sum(size.values())

    def depth(path: str) -> int:
        if match := _LAYER.search(path):
            return below[match[1]] + int(match[2]) + 1
        if path.startswith("encoder/") and size["decoder"]:
            return size["encoder"]
        # Rows of new tokens learn from the first step on, as a new head does.
        return 0 if _BELOW.search(path) and not path.endswith("/extra") else total + 1

    return {path: depth(path) for path in flatten_paths(params)}, total


def layerwise_lr_multipliers(params: PyTree, layer_decay: float | None, head_lr_multiplier: float, head: str = HEAD) -> PyTree:
    """The factor of every parameter's learning rate: `layer_decay` to the power of its distance
    from the top (Howard & Ruder 2018, "ULMFiT", section 3.2; Clark et al. 2020, "ELECTRA", appendix
    B), times `head_lr_multiplier` where the path has the regular expression `head`."""
    depth, layers = layer_depths(params)

    def rate(path: str, leaf: Any) -> float:
        decay = 1.0 if layer_decay is None else layer_decay ** (layers + 1 - depth[path])
        return decay * (head_lr_multiplier if re.search(head, path) else 1.0)

    return map_paths(rate, params)


def scale_by_path(factors: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    """Multiplies each update by the factor that `factors(updates)` has at its place."""

    def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
        return jax.tree.map(lambda u, f: u * f, updates, factors(updates)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


# Gradual unfreezing -------------------------------------------------------------------------------


def unfreeze_steps(params: PyTree, every: int) -> PyTree:
    """The update at which each parameter is released: 0 for the highest that train, which are the
    classifier and what else is above the layers; then a layer more every so many steps, from the
    top down, and the embeddings last (ULMFiT, section 3.3). Layers that do not train take no turn.
    """
    depth, _ = layer_depths(params)
    turns = {d: turn for turn, d in enumerate(sorted(set(depth.values()), reverse=True))}
    return map_paths(lambda path, leaf: turns[depth[path]] * every, params)


class FrozenState(NamedTuple):
    count: jax.Array  # int32[], updates so far
    inner: Any


def frozen_until(inner: optax.GradientTransformation, start: int) -> optax.GradientTransformation:
    """`inner` from update `start` on; before, no update and no change of its state, so that its
    moments and their bias correction begin with the first gradient that counts."""

    def init(params: PyTree) -> FrozenState:
        return FrozenState(jnp.zeros((), jnp.int32), inner.init(params))

    def update(updates: PyTree, state: FrozenState, params: PyTree | None = None):
        active = state.count >= start
        found, new = inner.update(updates, state.inner, params)
        found = jax.tree.map(lambda u: jnp.where(active, u, jnp.zeros_like(u)), found)
        new = jax.tree.map(lambda a, b: jnp.where(active, a, b), new, state.inner)
        return found, FrozenState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def gradual_unfreezing(
    inner: optax.GradientTransformation, every: int, clip_norm: float | None
) -> optax.GradientTransformation:
    """`inner`, with a state of its own for each group that is released together.

    What is still frozen is out of the norm that is clipped. One program serves all steps.
    """

    def groups(params: PyTree) -> PyTree:
        return map_paths(lambda path, start: f"{_GROUP}{start}", unfreeze_steps(params, every))

    def parted(params: PyTree) -> optax.GradientTransformation:
        labels = groups(params)
        names = sorted(set(jax.tree.leaves(labels)))
        return optax.partition(
            {name: frozen_until(inner, int(name.removeprefix(_GROUP))) for name in names}, labels)

    def init(params: PyTree) -> FrozenState:
        return FrozenState(jnp.zeros((), jnp.int32), parted(params).init(params))

    def update(updates: PyTree, state: FrozenState, params: PyTree | None = None):
        released = jax.tree.map(lambda start: state.count >= start, unfreeze_steps(updates, every))
        updates = jax.tree.map(lambda u, on: jnp.where(on, u, jnp.zeros_like(u)), updates, released)
        if clip_norm is not None:
            updates, _ = clip_by_global_norm(clip_norm).update(updates, optax.EmptyState())
        found, new = parted(updates).update(updates, state.inner, params)
        return found, FrozenState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


# The pre-trained point ----------------------------------------------------------------------------


class L2SPState(NamedTuple):
    anchor: PyTree  # the parameters at the first update; zero for new ones


def l2_sp(
    rate: float, new_rate: float, mask: Callable[[PyTree], PyTree], new: str = NEW
) -> optax.GradientTransformation:
    """Decay toward the pre-trained point, the parameters of `init`, and toward zero for new ones
    (Li et al. 2018, "Explicit Inductive Bias for Transfer Learning", L2-SP, equation 5). Decoupled,
    as AdamW's: it stands before the learning rate and after the moments.

    Args:
      rate: of what was pre-trained, biases and norms too: all of it has a point to go back to.
      new_rate: of new parameters, where `mask(params)` is true.
      new: a regular expression that new parameters have in their path. The pooler of an
        encoder-decoder is new besides.
    """

    def is_new(params: PyTree) -> PyTree:
        pooler = r"|^pooler/" if {"encoder", "decoder"} <= set(params) else ""
        return map_paths(lambda path, leaf: bool(re.search(new + pooler, path)), params)

    def init(params: PyTree) -> L2SPState:
        return L2SPState(jax.tree.map(
            lambda p, fresh: jnp.zeros_like(p) if fresh else jnp.copy(p), params, is_new(params)))

    def update(updates: PyTree, state: L2SPState, params: PyTree):
        strength = jax.tree.map(lambda fresh, decays: new_rate * decays if fresh else rate,
                                is_new(params), mask(params))
        return jax.tree.map(lambda u, p, a, r: u + r * (p - a), updates, params, state.anchor,
                            strength), state

    return optax.GradientTransformation(init, update)


# The average --------------------------------------------------------------------------------------


class EmaState(NamedTuple):
    average: PyTree


def params_ema(decay: float) -> optax.GradientTransformation:
    """Keeps an exponential moving average of the parameters after each update, which begins at the
    first ones (Polyak averaging; it needs no correction, being a mean of parameters throughout).
    Place it last. `ema_params` finds it."""

    def init(params: PyTree) -> EmaState:
        return EmaState(jax.tree.map(jnp.copy, params))

    def update(updates: PyTree, state: EmaState, params: PyTree):
        new = optax.apply_updates(params, updates)
        return updates, EmaState(
            jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), state.average, new))

    return optax.GradientTransformation(init, update)


def get_ema_params(opt_state: PyTree) -> PyTree | None:
    """The average in an optimizer's state, with its gaps; None if there is none."""
    found = [s for s in jax.tree.leaves(opt_state, is_leaf=lambda s: isinstance(s, EmaState))
             if isinstance(s, EmaState)]
    return found[0].average if found else None


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Gradients whose norm over all leaves is above `limit` scaled down to it (Pascanu et al. 2013,
    "On the difficulty of training recurrent neural networks", algorithm 1).

    As Optax's function of the same name, by one factor for all leaves: XLA fuses a product into
    each use, but Optax's division it computes once and stores, a copy of all gradients (GPT-2 on a
    CPU: 2 % of the step's time and 0.15 GB).
    """

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(limit / optax.tree.norm(updates), 1.0)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
