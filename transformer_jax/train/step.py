"""The train step, a pure function `(state, batch, rng) -> (state, metrics)`.

A loss function is `loss_fn(params, batch, rng) -> (sum, weight, metrics)`. `sum` and `weight` are
scalars, or dicts with one entry per term of the loss. The loss is

    L = sum over the terms k of  (total sum_k) / (total weight_k),   0 for a term of weight 0

where a total is taken over microbatches, devices and hosts. Dividing once, by the total weight,
makes microbatches, `jax.pmap` and sharding agree with one large batch even if the weights are
unequal; a mean of the microbatches' means would be a different number. `metrics` is a dict of (sum,
weight) pairs that are reduced in the same way. Weights must not depend on the parameters.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import monitoring
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from transformer_jax import distributed, sharding, tree
from transformer_jax.tree import PyTree

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
_GIB = 2**30
LossFn = Callable[[PyTree, PyTree, Any], tuple[Any, Any, dict[str, tuple[Any, Any]]]]


class TrainState(NamedTuple):
    """Everything that a train step changes."""

    step: jax.Array  # int32[], the number of updates so far
    params: PyTree
    opt_state: PyTree  # of the trainable parameters only


def init_state(
    params: PyTree, optimizer: optax.GradientTransformation, trainable: PyTree | None = None
) -> TrainState:
    """Returns the state before the first update.

    This function is pure, so a state can be initialized directly with its shardings
    (`sharding.init_sharded`), or as abstract arrays without memory (`jax.eval_shape`). `params` are
    copied, so that a jitted step may donate the state without deleting the caller's parameters.
    Parameters where the boolean mask `trainable` is False have no optimizer state.

    Example:
        >>> params = {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3)}
        >>> mask = {"kernel": False, "bias": True}
        >>> state = init_state(params, optax.sgd(0.1, momentum=0.9), mask)
        >>> [x.shape for x in jax.tree.leaves(state.opt_state)]
        [(3,)]
    """
    params = jax.tree.map(jnp.copy, params)
    trainable_params = params if trainable is None else tree.partition(params, trainable)[0]
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable_params))


def _safe_divide(total: Any, weight: Any) -> Any:
    """total / weight, or 0 if the weight is 0; value and gradient are never NaN."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0.0)


def loss_and_metrics(
    loss_fn: LossFn, params: PyTree, batch: PyTree, rng: Any
) -> tuple[dict, dict, dict]:
    """Calls `loss_fn`, and returns (sums, weights, metrics) as dicts of float arrays.

    A scalar sum and weight become a single term with the key "".
    """
    sums, weights, metrics = loss_fn(params, batch, rng)
    if not isinstance(sums, dict):
        sums, weights = {"": sums}, {"": weights}
    return jax.tree.map(lambda x: jnp.asarray(x, float), (sums, weights, metrics))


def _split_microbatches(batch: PyTree, num_microbatches: int) -> PyTree:
    """Reshapes [B, ...] to [num_microbatches, B / num_microbatches, ...].

    Row i is in microbatch i % num_microbatches, so that each device holds the same number of rows
    of every microbatch of a sharded batch. Blocks of rows would be moved between devices.
    """
    def split(path: str, rows: jax.Array) -> jax.Array:
        if rows.shape[0] % num_microbatches:
            raise ValueError(
                f"batch entry {path!r} has {rows.shape[0]} rows, not a multiple of accumulate = "
                f"{num_microbatches}; change the batch size or accumulate")
        return jnp.reshape(rows, (-1, num_microbatches, *rows.shape[1:])).swapaxes(0, 1)

    return tree.map_paths(split, batch)


def _divide_totals(
    sums: dict, weights: dict, metrics: dict, divide: Callable = _safe_divide
) -> dict[str, Any]:
    """Divides totals by weights: "loss", "<term>_loss" if there are several terms, and metrics."""
    terms = {name: divide(sums[name], weights[name]) for name in sums}
    result = {name: divide(total, weight) for name, (total, weight) in metrics.items()}
    if len(terms) > 1:
        result |= {f"{name}_loss": value for name, value in terms.items()}
    return result | {"loss": sum(terms.values())}


def _sum_over_devices(values: PyTree, axis_name: str | None) -> PyTree:
    return values if axis_name is None else jax.lax.psum(values, axis_name)


def _to_varying(values: PyTree, axis_name: str | None) -> PyTree:
    """Marks values as varying over devices, so that JAX does not sum their gradients."""
    return values if axis_name is None else jax.lax.pcast(values, axis_name, to="varying")


def _compute_grads(
    loss_fn: LossFn, axis_name: str | None, trainable_params: PyTree, frozen_params: PyTree,
    batch: PyTree, rng: Any, weights: dict | None = None,
):
    """Returns (grads, (sums, weights, metrics)) of the rows of `batch`, not summed over devices.

    `weights` are the total weights to divide by; by default those of `batch`, summed over devices.
    """
    def objective(trainable_params: PyTree) -> tuple[jax.Array, tuple]:
        params = tree.combine(trainable_params, frozen_params)
        sums, batch_weights, metrics = loss_and_metrics(loss_fn, params, batch, rng)
        divisor = (jax.lax.stop_gradient(_sum_over_devices(batch_weights, axis_name))
                   if weights is None else weights)
        loss = sum(_safe_divide(sums[name], divisor[name]) for name in sums)
        return loss, (sums, batch_weights, metrics)

    return jax.grad(objective, has_aux=True)(trainable_params)


def _accumulate_grads(
    num_microbatches: int, loss_fn: LossFn, axis_name: str | None, trainable_params: PyTree,
    frozen_params: PyTree, batch: PyTree, rng: Any,
):
    """Like `_compute_grads`, but computed one microbatch at a time and summed.

    The total weights must be known before the first gradient, so `loss_fn` is called once on all
    rows. Its sums are not used, so XLA removes that forward pass except for the weights.
    """
    params = tree.combine(trainable_params, frozen_params)
    weights = _sum_over_devices(loss_and_metrics(loss_fn, params, batch, rng)[1], axis_name)
    microbatches = _split_microbatches(batch, num_microbatches)
    compute_grads = functools.partial(_compute_grads, loss_fn, axis_name)

    def add(total: PyTree, item: tuple[jax.Array, PyTree]) -> tuple[PyTree, None]:
        index, rows = item
        key = None if rng is None else jax.random.fold_in(rng, index)
        result = compute_grads(trainable_params, frozen_params, rows, key, weights)
        return jax.tree.map(jnp.add, total, result), None

    first = jax.tree.map(lambda rows: rows[0], microbatches)
    shapes = jax.eval_shape(compute_grads, trainable_params, frozen_params, first, rng, weights)
    zeros = _to_varying(jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), axis_name)
    return jax.lax.scan(add, zeros, (jnp.arange(num_microbatches), microbatches))[0]


def make_train_step(
    loss_fn: LossFn, optimizer: optax.GradientTransformation, trainable: PyTree | None = None,
    accumulate: int = 1, axis_name: str | None = None,
) -> Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a train step that computes the gradient of a loss and updates the parameters.

    The step is pure and not jitted. Use it under `jax.jit`, with the batch sharded over a mesh or
    not; or pass `axis_name` and use it under `jax.pmap` or `jax.shard_map`, with different rows of
    the batch on each device.

    Only the trainable subtree is differentiated. Frozen parameters are therefore returned
    unchanged bit for bit, need no gradient computation and are not part of the gradient norm.

    The random key of a step is `fold_in(rng, state.step)`, so pass the same `rng` at every step.
    The indices of the device (`axis_name`) and of the microbatch are folded in as well.

    Args:
        loss_fn: returns (sum, weight, metrics); see the module docstring.
        optimizer: gets the trainable parameters only, with None in place of frozen ones.
        trainable: a boolean mask with the structure of the parameters; None trains all of them.
        accumulate: number of microbatches of a batch. Only one's activations are in memory; the
            gradients are accumulated in a buffer of the size of the trainable parameters.
        axis_name: the axis of `jax.pmap` or `jax.shard_map` over which totals are summed.

    Returns:
        `train_step(state, batch, rng) -> (state, metrics)`. `batch` is a tree of arrays [B, ...],
        and `rng=None` disables dropout. The metrics are computed with the parameters before the
        update: "loss", "grad_norm" (of the trainable parameters, before clipping), "<term>_loss"
        for each term if the loss has several, and each metric of `loss_fn`.

    Raises:
        ValueError: `accumulate` is below 1 or (when the step is traced) does not divide the rows
            of a batch, or `trainable` selects no parameter.

    Example:
        >>> def loss_fn(params, batch, rng):
        ...     errors = (batch["x"] @ params["kernel"] - batch["y"]) ** 2
        ...     return errors.sum(), errors.size, {}
        >>> optimizer = optax.adam(1e-3)
        >>> train_step = jax.jit(make_train_step(loss_fn, optimizer))
        >>> state = init_state({"kernel": jnp.zeros((3, 1))}, optimizer)
        >>> state, metrics = train_step(state, {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 1))}, None)
        >>> int(state.step), float(metrics["loss"])
        (1, 1.0)
    """
    if accumulate < 1:
        raise ValueError(f"accumulate is {accumulate}; it must be at least 1 microbatch")
    if trainable is not None and not any(jax.tree.leaves(trainable)):
        raise ValueError("the mask `trainable` selects no parameter; select at least one")
    compute_grads = (_compute_grads if accumulate == 1
                     else functools.partial(_accumulate_grads, accumulate))

    def train_step(state: TrainState, batch: PyTree, rng: Any):
        if rng is not None:
            rng = jax.random.fold_in(rng, state.step)
            if axis_name is not None:
                rng = jax.random.fold_in(rng, jax.lax.axis_index(axis_name))
        mask = jax.tree.map(lambda _: True, state.params) if trainable is None else trainable
        trainable_params, frozen_params = tree.partition(state.params, mask)
        result = compute_grads(loss_fn, axis_name, _to_varying(trainable_params, axis_name),
                               frozen_params, batch, rng)
        grads, (sums, weights, metrics) = _sum_over_devices(result, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, trainable_params)
        params = tree.combine(optax.apply_updates(trainable_params, updates), frozen_params)
        metrics = _divide_totals(sums, weights, metrics) | {"grad_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(loss_fn: LossFn) -> Callable[[PyTree, PyTree], tuple[dict, dict, dict]]:
    """Makes `eval_step(params, batch) -> (sums, weights, metrics)`, which has no dropout.

    `sums` and `weights` have one entry per term of the loss (the key "" if there is a single term),
    and `metrics` has (sum, weight) pairs. Add all of them over the batches before dividing, as
    `evaluate` does.
    """
    return lambda params, batch: loss_and_metrics(loss_fn, params, batch, None)


def evaluate(
    eval_step: Callable[[PyTree, PyTree], tuple[dict, dict, dict]], params: PyTree,
    batches: Iterable[PyTree], mesh: Mesh | None = None,
) -> dict[str, float]:
    """Computes the loss and the metrics over all batches, which are sharded over `mesh`.

    Totals are summed in float64 on the host and divided once, so neither the batch size nor padding
    rows (of weight 0) change the result. `eval_step`, from `make_eval_step`, is compiled once for
    all calls with the same function.

    Returns:
        "loss", "<term>_loss" for each term if there are several, and the metrics of the loss.

    Raises:
        ValueError: there are no batches.

    Example:
        >>> def loss_fn(params, batch, rng):
        ...     return (params["scale"] * batch["x"]).sum(), batch["x"].size, {}
        >>> batches = [{"x": jnp.ones(3)}, {"x": 3 * jnp.ones(1)}]
        >>> evaluate(make_eval_step(loss_fn), {"scale": jnp.float32(2.0)}, batches)
        {'loss': 3.0}
    """
    compiled = jax.jit(eval_step)
    totals: PyTree = None
    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        results = (compiled(params, batch if mesh is None else sharding.shard_batch(batch, mesh))
                   for batch in batches)
        # In pairs, because the next batch is prepared while the devices compute this result.
        for result, _ in itertools.pairwise(itertools.chain(results, [None])):
            result = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(result))
            totals = result if totals is None else jax.tree.map(np.add, totals, result)
    if totals is None:
        raise ValueError("there are no batches to evaluate; pass at least one")
    return _divide_totals(
        *totals, divide=lambda total, weight: float(total / weight) if weight else 0.0)


# Compilation and memory ---------------------------------------------------------------------------


class CompiledStep:
    """Compiles `train_step(state, batch, rng, ...)`, with the state donated.

    Each new batch shape is compiled at its first call, which raises ValueError if a step needs more
    memory than is free. On a mesh, the returned state has the shardings of `state`, the initial
    state; without this constraint, XLA could choose others.
    """

    def __init__(self, train_step: Callable, state: PyTree, mesh: Mesh | None):
        options = {}
        if mesh is not None:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            options = {"out_shardings": (shardings, NamedSharding(mesh, P()))}
        self._step = jax.jit(train_step, donate_argnums=0, **options)
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, state: PyTree, batch: PyTree, *args) -> tuple[PyTree, dict[str, jax.Array]]:
        leaves, structure = jax.tree.flatten(batch)
        key = (structure, tuple((x.shape, x.dtype) for x in leaves))
        if key not in self._compiled:
            compiled = self._step.lower(state, batch, *args).compile()
            distributed.malloc_trim()
            check_memory(compiled.memory_analysis(), free_memory())
            self._compiled[key] = compiled
        return self._compiled[key](state, batch, *args)


def check_memory(analysis: Any, free: int | None) -> None:
    """Raises ValueError if a compiled step needs more memory than is free.

    `analysis` is `compiled.memory_analysis()`, which is None on some backends, and `free` is in
    bytes. The arguments of the step are not counted, because they are in memory already.
    """
    if analysis is None or free is None:
        return
    needed = analysis.temp_size_in_bytes + max(
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    if needed > free:
        raise ValueError(
            f"a step needs {needed / _GIB:.2f} GiB in addition to the "
            f"{analysis.argument_size_in_bytes / _GIB:.2f} GiB of parameters, optimizer state and "
            f"batch, and {free / _GIB:.2f} GiB are free; use a smaller batch_size, more "
            "microbatches (accumulate), remat='full', a 16-bit dtype, or more devices (mesh.fsdp)")


class CompilationCounter(contextlib.AbstractContextManager):
    """Counts XLA compilations, and programs loaded from the persistent compilation cache.

    JAX silently recompiles a function for arguments of new shapes; this counter detects it.
    `count` and `seconds` are totals from the creation of the counter until `close`, or the end of
    the `with` block.
    """

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, seconds: float, **_) -> None:
        if event == _COMPILE_EVENT:
            self.count += 1
            self.seconds += seconds

    def close(self) -> None:
        """Stops counting."""
        monitoring.unregister_event_duration_listener(self._on_event)

    def __exit__(self, *_) -> None:
        self.close()


def _proc_bytes(file: str, field: str) -> int | None:
    """Returns a field, in bytes, of a file such as /proc/meminfo; None where there is none."""
    try:
        with open(file) as lines:
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))
    except (OSError, StopIteration, IndexError):
        return None


def peak_memory() -> int | None:
    """Returns the peak bytes in use on the first device, or of this process on a CPU, if known."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use", _proc_bytes("/proc/self/status", "VmHWM:"))


def memory_limit() -> int:
    """Returns the bytes that JAX can allocate on the first device, on a CPU `free_memory()`.

    2**63 if the platform does not report it.
    """
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] if "bytes_limit" in stats else free_memory() or 2**63


def free_memory() -> int | None:
    """Returns the free memory of the first local device in bytes; None if it is not reported.

    The free memory of a host is divided equally among its CPU devices.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    free = _proc_bytes("/proc/meminfo", "MemAvailable:")
    return None if free is None else free // jax.local_device_count()
