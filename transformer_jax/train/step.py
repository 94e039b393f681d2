"""The training step, a pure function: (state, batch, rng) -> (state, metrics).

A loss is `loss_fn(params, batch, rng) -> (sum, weight, metrics)`. `sum` and `weight` are scalars,
or dicts with one entry per term of the loss; the loss is

    L = sum over terms k of  (total sum_k) / (total weight_k),   0 for a term of weight 0

with totals over microbatches, devices and hosts. Dividing once, by the total, is what makes
microbatches, `jax.pmap` and sharding agree exactly with one large batch even if the weights are
uneven: the mean of means is another number. `metrics` holds (sum, weight) pairs, reduced alike.
Weights never depend on the parameters.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from transformer_jax import sharding, tree
from transformer_jax.tree import PyTree

LossFn = Callable[[PyTree, PyTree, Any], tuple[Any, Any, dict[str, tuple[Any, Any]]]]


class TrainState(NamedTuple):
    """All that a step changes."""

    step: jax.Array  # int32[], the number of updates so far
    params: PyTree
    opt_state: PyTree  # of what trains only


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, trainable: PyTree | None = None
) -> TrainState:
    """The state before the first update.

    It is pure, so that a whole state can be born sharded or be described without memory:

        make = lambda key: init_state(init_params(key), optimizer)
        state = sharding.init_sharded(make, key, mesh)
        abstract = jax.eval_shape(make, key)

    Args:
      params: nested dict of arrays. They are copied: a jitted step may then donate the state
        without deleting the caller's parameters.
      trainable: a mask of booleans over `params` (None: everything trains). What does not train
        gets no optimizer state.
    """
    params = jax.tree.map(jnp.copy, params)
    ours = params if trainable is None else tree.partition(params, trainable)[0]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(ours))


def _terms(value: Any) -> dict[str, Any]:
    """A loss of one term as a dict, like a loss of several."""
    return value if isinstance(value, dict) else {"": value}


def _mean(total: Any, weight: Any) -> Any:
    """total / weight, and 0 where the weight is 0, without a NaN in value or gradient."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0.0)


def _measure(loss_fn: LossFn, params: PyTree, batch: PyTree, rng: Any) -> tuple[dict, dict, dict]:
    """`loss_fn` with its terms as dicts and every number a float array, whatever it returned."""
    sums, weights, metrics = loss_fn(params, batch, rng)
    totals = (_terms(sums), _terms(weights), metrics)
    return jax.tree.map(lambda x: jnp.asarray(x, float), totals)


def _microbatches(batch: PyTree, parts: int) -> PyTree:
    """[B, ...] as [parts, B / parts, ...], row i in part i % parts.

    Dealing rows out in turn keeps a sharded batch where it is: every device has a share of every
    part. Cutting it into consecutive blocks would move rows between devices.
    """

    def deal(path: str, rows: jax.Array) -> jax.Array:
        if rows.shape[0] % parts:
            raise ValueError(
                f"batch entry {path!r} has {rows.shape[0]} rows, not a multiple of accumulate = "
                f"{parts}; change one of them"
            )
        return jnp.reshape(rows, (-1, parts, *rows.shape[1:])).swapaxes(0, 1)

    return tree.map_paths(deal, batch)


def _means(sums: dict, weights: dict, metrics: dict, mean: Callable = _mean) -> dict[str, Any]:
    """The totals as numbers to report: "loss", "<term>_loss" when several, and every metric."""
    terms = {name: mean(sums[name], weights[name]) for name in sums}
    report = {name: mean(total, weight) for name, (total, weight) in metrics.items()}
    if len(terms) > 1:
        report |= {f"{name}_loss": value for name, value in terms.items()}
    return report | {"loss": sum(terms.values())}


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    trainable: PyTree | None = None,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """The step for a loss: differentiate what trains, update it, count.

    The step is pure and not jitted. `jax.jit` it, with the batch sharded over a mesh or not; or
    give `axis_name` and use it under `jax.pmap` or `jax.shard_map`, each device with its own rows.

    Only the trainable subtree is differentiated, so frozen leaves come back bit for bit, have no
    optimizer state, cost no weight gradient and are out of every norm.

    Randomness is `fold_in(rng, state.step)`, then the device's index under `axis_name`, then the
    microbatch's index: pass the same rng at every step. None means no dropout.

    Args:
      loss_fn: see the top of this file.
      optimizer: sees only what trains (gradients, parameters and state), with None in the gaps.
      trainable: a mask of booleans over the parameters; None trains everything.
      accumulate: split the batch into this many microbatches, one after another, which need memory
        for one only. The gradients' buffer is as large as what trains.
      axis_name: the mapped axis over which totals are summed.

    Returns:
      `train_step(state, batch, rng) -> (state, metrics)`. The metrics are divided totals: "loss",
      "grad_norm" (of what trains, before clipping), "<term>_loss" for each term when the loss has
      several, and each metric of `loss_fn`; all for the parameters before the update.

    Raises:
      ValueError: `accumulate` is below 1, nothing trains, or (when the step is traced) the rows of
        a batch are not a multiple of `accumulate`.
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; use at least 1 microbatch")
    if trainable is not None and not any(jax.tree.leaves(trainable)):
        raise ValueError("the mask `trainable` selects nothing; choose at least one parameter")

    def total(values: PyTree) -> PyTree:
        return values if axis_name is None else jax.lax.psum(values, axis_name)

    def local(values: PyTree) -> PyTree:
        """Marks values as differing by device, so that their gradients are not yet summed."""
        return values if axis_name is None else jax.lax.pcast(values, axis_name, to="varying")

    def gradients(ours: PyTree, rest: PyTree, batch: PyTree, rng: Any, weights: dict | None):
        """(d L / d ours, (sums, weights, metrics)) of these rows, not yet summed over devices.

        `weights` are the totals to divide by, or None where these rows are the device's all.
        """

        def objective(ours: PyTree) -> tuple[jax.Array, tuple]:
            sums, own, metrics = _measure(loss_fn, tree.combine(ours, rest), batch, rng)
            divisor = jax.lax.stop_gradient(total(own)) if weights is None else weights
            return sum(_mean(sums[name], divisor[name]) for name in sums), (sums, own, metrics)

        return jax.grad(objective, has_aux=True)(ours)

    def accumulated(ours: PyTree, rest: PyTree, batch: PyTree, rng: Any):
        """The same, summed over microbatches.

        The weights have to be known before any gradient is. One call on all rows gives them; its
        sums are not used, so XLA drops that forward pass and keeps the counting.
        """
        weights = total(_measure(loss_fn, tree.combine(ours, rest), batch, rng)[1])
        micro = _microbatches(batch, accumulate)

        def add(so_far: PyTree, item: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
            index, rows = item
            key = None if rng is None else jax.random.fold_in(rng, index)
            found = gradients(ours, rest, rows, key, weights)
            return jax.tree.map(jnp.add, so_far, found), None

        first = jax.tree.map(lambda rows: rows[0], micro)
        shapes = jax.eval_shape(gradients, ours, rest, first, rng, weights)
        zeros = local(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
        return jax.lax.scan(add, zeros, (jnp.arange(accumulate), micro))[0]

    def train_step(state: TrainState, batch: PyTree, rng: Any):
        if rng is not None:
            rng = jax.random.fold_in(rng, state.step)
            if axis_name is not None:
                rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        mask = jax.tree.map(lambda _: True, state.params) if trainable is None else trainable
        ours, rest = tree.partition(state.params, mask)
        if accumulate == 1:
            found = gradients(local(ours), rest, batch, rng, None)
        else:
            found = accumulated(local(ours), rest, batch, rng)
        grads, (sums, weights, metrics) = total(found)
        updates, opt_state = optimizer.update(grads, state.opt_state, ours)
        params = tree.combine(optax.apply_updates(ours, updates), rest)
        report = _means(sums, weights, metrics) | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), report

    return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[PyTree, PyTree], tuple[dict, dict, dict]]:
    """`eval_step(params, batch) -> (sums, weights, metrics)`: the totals of one batch, no dropout.

    Each is a dict (a loss of one term has the key ""), metrics of (sum, weight) pairs. They are not
    divided: add them over all batches first, as `evaluate` does.
    """
    return lambda params, batch: _measure(loss_fn, params, batch, None)


def evaluate(
    eval_step: Callable[[PyTree, PyTree], tuple[dict, dict, dict]],
    params: PyTree,
    batches: Iterable[PyTree],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """The loss and metrics over all batches, divided once: keys as in `make_train_step`.

    Totals are summed in float64 on the host, so neither the batch size nor padding rows (of weight
    zero) change the result. `eval_step` is jitted here, and compiled once for all calls with it.

    Raises:
      ValueError: there are no batches.
    """
    compiled = jax.jit(eval_step)
    totals: PyTree = None
    pending: PyTree = None  # computed while the host prepares the next batch

    def add(found: PyTree) -> PyTree:
        found = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(found))
        return found if totals is None else jax.tree.map(np.add, totals, found)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for batch in batches:
            found = compiled(params, batch if mesh is None else sharding.shard_batch(batch, mesh))
            if pending is not None:
                totals = add(pending)
            pending = found
    if pending is None:
        raise ValueError("there are 0 batches to evaluate; give at least one")
    return _means(
        *add(pending), mean=lambda total, weight: float(total / weight) if weight else 0.0
    )
