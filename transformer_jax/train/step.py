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
    (`sharding.init_sharded`), or as abstract arrays without memory (`jax.eval_shape`).

    Args:
        params: nested dicts of arrays. They are copied, so that a jitted step may donate the state
            without deleting the caller's parameters.
        optimizer: an Optax transformation, for example from `optimizers.make_optimizer`.
        trainable: a boolean mask with the structure of `params`; None trains all parameters. Frozen
            parameters have no optimizer state.

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


def _as_terms(value: Any) -> dict[str, Any]:
    """Returns a dict of the terms of a loss; a scalar becomes a single term with the key ""."""
    return value if isinstance(value, dict) else {"": value}


def _safe_divide(total: Any, weight: Any) -> Any:
    """total / weight, or 0 if the weight is 0; value and gradient are never NaN."""
    return jnp.where(weight > 0, total / jnp.where(weight > 0, weight, 1), 0.0)


def loss_and_metrics(
    loss_fn: LossFn, params: PyTree, batch: PyTree, rng: Any
) -> tuple[dict, dict, dict]:
    """Calls `loss_fn`, and returns (sums, weights, metrics) as dicts of float arrays."""
    sums, weights, metrics = loss_fn(params, batch, rng)
    totals = (_as_terms(sums), _as_terms(weights), metrics)
    return jax.tree.map(lambda x: jnp.asarray(x, float), totals)


def _split_microbatches(batch: PyTree, num_microbatches: int) -> PyTree:
    """Reshapes [B, ...] to [num_microbatches, B / num_microbatches, ...].

    A strided split: row i is in microbatch i % num_microbatches. Each device then holds the same
    number of rows of every microbatch of a sharded batch. Consecutive blocks of rows would have to
    be moved between devices.
    """

    def split(path: str, rows: jax.Array) -> jax.Array:
        if rows.shape[0] % num_microbatches:
            raise ValueError(
                f"batch entry {path!r} has {rows.shape[0]} rows, not a multiple of accumulate = "
                f"{num_microbatches}; change the batch size or accumulate"
            )
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

    `weights` are the total weights to divide by. None computes them from `batch`, which must then
    contain all rows of the device.
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
    rows. The sums that it returns are not used, so XLA removes that forward pass and keeps only the
    computation of the weights.
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
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    trainable: PyTree | None = None,
    accumulate: int = 1,
    axis_name: str | None = None,
) -> Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes a train step that computes the gradient of a loss and updates the parameters.

    The step is pure and not jitted. Use it under `jax.jit`, with the batch sharded over a mesh or
    not; or pass `axis_name` and use it under `jax.pmap` or `jax.shard_map`, with different rows of
    the batch on each device.

    Only the trainable subtree is differentiated. Frozen parameters are therefore returned
    unchanged bit for bit, have no optimizer state, need no gradient computation and are not part of
    the gradient norm.

    The random key of a step is `fold_in(rng, state.step)`, so pass the same `rng` at every step.
    The index of the device (with `axis_name`) and the index of the microbatch (with `accumulate`
    above 1) are folded in as well.

    Args:
        loss_fn: `loss_fn(params, batch, rng) -> (sum, weight, metrics)`; see the module docstring.
        optimizer: an Optax transformation. Its gradients, parameters and state are those of the
            trainable parameters only, with None in place of frozen parameters.
        trainable: a boolean mask with the structure of the parameters; None trains all of them.
        accumulate: number of microbatches that a batch is split into. They are processed one after
            another, so only the activations of one of them are in memory. The gradients are
            accumulated in a buffer of the size of the trainable parameters.
        axis_name: the axis of `jax.pmap` or `jax.shard_map` over which totals are summed.

    Returns:
        `train_step(state, batch, rng) -> (state, metrics)`. `batch` is a tree of arrays [B, ...],
        and `rng=None` disables dropout. The metrics are computed with the parameters before the
        update: "loss", "grad_norm" (of the trainable parameters, before clipping), "<term>_loss"
        for each term if the loss has several, and each metric of `loss_fn`.

    Raises:
        ValueError: `accumulate` is below 1, `trainable` selects no parameter, or (when the step is
            traced) the number of rows of a batch is not a multiple of `accumulate`.

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
    """Makes a function that computes the loss sums and weights of one batch, without dropout.

    Args:
        loss_fn: as in `make_train_step`.

    Returns:
        `eval_step(params, batch) -> (sums, weights, metrics)`. `sums` and `weights` have one entry
        per term of the loss (the key "" if there is a single term), and `metrics` has (sum, weight)
        pairs. Add all of them over the batches before dividing, as `evaluate` does.
    """
    return lambda params, batch: loss_and_metrics(loss_fn, params, batch, None)


def evaluate(
    eval_step: Callable[[PyTree, PyTree], tuple[dict, dict, dict]],
    params: PyTree,
    batches: Iterable[PyTree],
    mesh: jax.sharding.Mesh | None = None,
) -> dict[str, float]:
    """Computes the loss and the metrics over all batches.

    Totals are summed in float64 on the host and divided once, so neither the batch size nor padding
    rows (of weight 0) change the result.

    Args:
        eval_step: from `make_eval_step`. It is jitted here, and compiled once for all calls with
            the same function.
        params: the parameters.
        batches: at least one batch.
        mesh: shards the batches over the mesh.

    Returns:
        "loss", "<term>_loss" for each term if the loss has several, and each metric of the loss
        function.

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
    pending: PyTree = None  # result that is computed while the host prepares the next batch

    def add(result: PyTree) -> PyTree:
        result = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(result))
        return result if totals is None else jax.tree.map(np.add, totals, result)

    with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        for batch in batches:
            result = compiled(params, batch if mesh is None else sharding.shard_batch(batch, mesh))
            if pending is not None:
                totals = add(pending)
            pending = result
    if pending is None:
        raise ValueError("there are no batches to evaluate; pass at least one")
    return _divide_totals(
        *add(pending), divide=lambda total, weight: float(total / weight) if weight else 0.0
    )


_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
GIB = 2**30


class CompiledStep:
    """Compiles `train_step(state, batch, rng, ...)`, with the state donated.

    Each new batch shape is compiled at its first call. On a mesh, the returned state has the
    shardings of `state`; without this constraint, XLA could choose other shardings.

    Args:
        train_step: a function that returns (state, metrics).
        state: the initial state, for its shardings.
        mesh: the device mesh; None if the state is on one device.

    Raises:
        ValueError: a step needs more memory than is free. Raised by the call that compiles it.

    Example:
        >>> import jax.numpy as jnp
        >>> def train_step(state, batch, rng):
        ...     return state + batch["x"].sum(), {"loss": jnp.float32(0.0)}
        >>> step = CompiledStep(train_step, jnp.float32(0.0), mesh=None)
        >>> state, metrics = step(jnp.float32(0.0), {"x": jnp.ones(3)}, None)
        >>> float(state)
        3.0
    """

    def __init__(self, train_step: Callable, state: PyTree, mesh: Mesh | None):
        options = {}
        if mesh is not None:
            shardings = jax.tree.map(lambda x: x.sharding, state)
            options = {"out_shardings": (shardings, NamedSharding(mesh, P()))}
        self._step = jax.jit(train_step, donate_argnums=0, **options)
        self._compiled: dict[Any, Callable] = {}

    def __call__(self, state: PyTree, batch: PyTree, *args) -> tuple[PyTree, dict[str, jax.Array]]:
        """Runs one step, and compiles it first if the shape of the batch is new."""
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

    Args:
        analysis: from `compiled.memory_analysis()`, or None if the backend does not provide one.
            The arguments of the step are not counted, because they are in memory already.
        free: free memory in bytes, or None if unknown.
    """
    if analysis is None or free is None:
        return
    needed = analysis.temp_size_in_bytes + max(
        analysis.output_size_in_bytes - analysis.alias_size_in_bytes, 0)
    if needed > free:
        raise ValueError(
            f"a step needs {needed / GIB:.2f} GiB in addition to the "
            f"{analysis.argument_size_in_bytes / GIB:.2f} GiB of parameters, optimizer state and "
            f"batch, and {free / GIB:.2f} GiB are free; use a smaller batch_size, more "
            "microbatches (accumulate), remat='full', a 16-bit dtype, or more devices (mesh.fsdp)")


class CompilationCounter:
    """Counts XLA compilations, and programs loaded from the persistent compilation cache.

    JAX silently recompiles a function for arguments of new shapes; this counter detects it.
    Counting starts when the counter is created, and ends with `close` or the `with` block.

    Attributes:
        count: the number of compilations so far.
        seconds: the total compilation time.

    Example:
        >>> import jax.numpy as jnp
        >>> double, x = jax.jit(lambda x: 2 * x), jnp.ones(3)
        >>> with CompilationCounter() as compilations:
        ...     _ = double(x), double(x)
        >>> compilations.count
        1
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

    def __enter__(self) -> "CompilationCounter":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def peak_memory() -> int | None:
    """Returns the peak memory use of the first device in bytes.

    On a CPU, it is the peak memory use of this process. None if the platform does not report it.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    try:
        with open("/proc/self/status") as status:
            found = [line.split()[1] for line in status if line.startswith("VmHWM:")]
        return int(found[0]) * 1024
    except (OSError, IndexError):
        return None


def memory_limit() -> int:
    """Returns the bytes that JAX can allocate on the first device.

    On a CPU, it is `free_memory()`. 2**63 if the platform does not report it.
    """
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"]
    return free_memory() or 2**63


def free_memory() -> int | None:
    """Returns the free memory of the first local device in bytes.

    The free memory of a host is divided equally among its CPU devices. None if the platform does
    not report it.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    try:
        with open("/proc/meminfo") as lines:
            free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return 1024 * free // jax.local_device_count()
