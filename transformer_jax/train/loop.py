"""The training loop: runs a train step on batches, and evaluates, saves and calls callbacks.

The metrics of a step are read while the next step runs, so that the devices do not wait for the
host.

Example:
    >>> import itertools, jax.numpy as jnp, numpy as np, optax
    >>> from transformer_jax.train import Evaluation, Logging, fit, init_state, make_train_step
    >>> def loss_fn(params, batch, rng):
    ...     return ((params["w"] - batch["x"]) ** 2).sum(), batch["x"].size, {}
    >>> optimizer = optax.sgd(0.1)
    >>> state, history = fit(
    ...     init_state({"w": jnp.zeros(())}, optimizer), make_train_step(loss_fn, optimizer),
    ...     itertools.repeat({"x": np.ones(8)}), rng=None, num_steps=20,
    ...     evaluation=Evaluation(lambda params: {"w": params["w"]}), callbacks=[Logging(every=10)])
    >>> int(state.step), [row["step"] for row in history], round(history[-1]["eval_w"], 3)
    (20, [10, 20, 20], 0.988)
"""

import contextlib
import dataclasses
import operator
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from jax.sharding import Mesh

from transformer_jax import sharding
from transformer_jax.train.anomalies import (
    DEFAULT_POLICY,
    AnomalyDetector,
    AnomalyPolicy,
    Preempted,
    catch_signals,
    handle,
    save_batch,
    skip_bad_updates,
)
from transformer_jax.train.callbacks import (
    Callback,
    HistoryRow,
    Logging,
    Progress,
    RowFunction,
    StepResult,
)
from transformer_jax.train.checkpoint_files import abstract_array
from transformer_jax.train.checkpointing import Checkpointer, Stateful
from transformer_jax.train.step import CompiledStep, TrainState
from transformer_jax.tree import PyTree

TrainStep = Callable[[TrainState, PyTree, Any], tuple[TrainState, dict[str, jax.Array]]]


class Batches(Stateful, Protocol):
    """An endless iterator of batches, such as Grain's; its state is needed for checkpoints only."""

    def __next__(self) -> PyTree: ...


class Evaluation(NamedTuple):
    """An evaluation during the run, skipped if a signal ends the run, to save the checkpoint soon.

    Attributes:
        fn: `fn(params) -> {name: number}`. Its metrics are logged as "eval_<name>".
        every: number of updates between evaluations; 0 evaluates at the end only.
        select: `select(state)` returns the argument of `fn`; by default the parameters.
    """

    fn: Callable[[PyTree], dict[str, float]]
    every: int = 0
    select: Callable[[TrainState], PyTree] = operator.attrgetter("params")


@dataclasses.dataclass(eq=False)
class Run:
    """The progress of a call of `fit`, as its callbacks see it."""

    num_steps: int  # the total number of updates
    mesh: Mesh | None
    checkpoint: Checkpointer  # its directory is None if no checkpoints are saved
    callbacks: Sequence[Callback | Callable[[HistoryRow], Any]]
    start: int = 0  # the number of updates before this call
    step: int = 0  # the last step that was dispatched to the devices; in `on_batch`, the next one
    state: TrainState | None = None  # after `step`. The next step donates it: copy what you keep
    history: list[HistoryRow] = dataclasses.field(default_factory=list)
    data_wait_seconds: float = 0.0  # upper bound of the devices' wait for the last batch
    stop_reason: str | None = None  # why the run stops after the current step
    save_requested: bool = False  # whether a checkpoint is saved after the current evaluation

    def __post_init__(self) -> None:
        self.callbacks = [c if isinstance(c, Callback) else RowFunction(c) for c in self.callbacks]
        self._created, self._paused = time.perf_counter(), 0.0

    def reset(self, state: TrainState) -> None:
        """Sets the current state and its step."""
        self.state, self.step = state, int(state.step)

    def begin(self, state: TrainState) -> None:
        """Sets the state before the first step; ValueError if it has more than `num_steps`."""
        self.reset(state)
        self.start = self.step
        if self.start > self.num_steps:
            raise ValueError(
                f"the state has received {self.start} updates, more than num_steps = "
                f"{self.num_steps}; increase num_steps, or choose another checkpoint directory")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Sets the mesh and starts the callbacks; at the end, waits for the last checkpoint."""
        with contextlib.ExitStack() as stack:
            if self.mesh is not None:
                stack.enter_context(jax.set_mesh(self.mesh))
            stack.callback(self.checkpoint.wait)
            for callback in self.callbacks:
                callback.on_start(self)
                stack.callback(callback.on_end, self)
            yield

    @property
    def is_last(self) -> bool:
        """Whether no step follows the current one."""
        return self.step >= self.num_steps or self.stop_reason is not None

    def is_due(self, action: Any | None) -> bool:
        """Whether an `Evaluation` or a `Checkpointer` is due after the current step.

        At the end of the run always; for None, or if its `every` is 0, at the end only.
        """
        every = 0 if action is None else action.every
        return self.is_last or (every > 0 and self.step % every == 0)

    def log(self, row: HistoryRow) -> None:
        """Adds a row with "step" and metrics to the history, and passes it to the callbacks."""
        row["seconds"] = time.perf_counter() - self._created
        self.history.append(row)
        self.call("on_row", row)

    def stop(self, reason: str) -> None:
        """Ends the run after the current step, with a last evaluation and checkpoint.

        With several processes, all of them must call it at the same step.
        """
        self.stop_reason = reason

    def clock(self) -> float:
        """Returns the seconds since the start of the call, without pauses."""
        return time.perf_counter() - self._created - self._paused

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager whose duration is not part of the time of a step."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - start

    def call(self, hook: str, *args: Any) -> None:
        """Calls a hook of all callbacks."""
        for callback in self.callbacks:
            getattr(callback, hook)(self, *args)

    def stateful_callbacks(self) -> dict[str, Callback]:
        """Returns the callbacks by the name under which checkpoints store their state."""
        found: dict[str, Callback] = {}
        for callback in self.callbacks:
            name = type(callback).__name__
            count = sum(type(c) is type(callback) for c in found.values())
            found[f"{name}_{count + 1}" if count else name] = callback
        return found


class DelayedMetrics:
    """Holds the metrics of the step that the devices run, and reads them one step later."""

    def __init__(self) -> None:
        self._in_flight: tuple[int, PyTree, dict[str, jax.Array]] | None = None

    def push(self, step: int, batch: PyTree, metrics: dict[str, jax.Array]) -> StepResult | None:
        """Adds a dispatched step, and returns the result of the previous one if there is one."""
        result = self.pop()
        self._in_flight = step, batch, metrics
        return result

    def pop(self) -> StepResult | None:
        """Waits for the step in flight and returns its result; None if there is no such step."""
        if self._in_flight is None:
            return None
        (step, batch, metrics), self._in_flight = self._in_flight, None
        return StepResult(step, batch, {k: float(x) for k, x in jax.device_get(metrics).items()})

    @property
    def devices_are_idle(self) -> bool:
        """Whether no step is in flight, or that step has finished."""
        return self._in_flight is None or self._in_flight[2]["loss"].is_ready()


def fit(
    state: TrainState, train_step: TrainStep, batches: Batches, *, rng: jax.Array | None,
    num_steps: int, mesh: Mesh | None = None, evaluation: Evaluation | None = None,
    checkpoint: Checkpointer | None = None, anomalies: AnomalyPolicy = DEFAULT_POLICY,
    callbacks: Sequence[Callback | Callable[[HistoryRow], Any]] | None = None,
) -> tuple[TrainState, list[HistoryRow]]:
    """Trains until the state has received `num_steps` updates, and resumes interrupted runs.

    With a checkpoint directory, a run resumes from its last checkpoint that is not corrupted, and
    the result equals that of an uninterrupted run bit for bit. On SIGTERM (in a single process also
    on SIGINT), a checkpoint is saved and the run stops. The module docstring has an example.

    Args:
        state: from `init_state`. It is donated: use the returned state afterwards.
        train_step: from `make_train_step`; it is jitted here, once.
        batches: an iterator of batches of NumPy arrays [B, ...]. With several processes, each
            process passes the rows of its data shard (`sharding.process_data_shard`).
        rng: the random key of the run; each step folds its number into it. None: no randomness.
        num_steps: total number of updates, including those made before the run was resumed.
        mesh: shards the parameters by `sharding.RULES` and the batches over the mesh.
        callbacks: functions that receive each row of the history, and callbacks of
            `train.callbacks`; by default `Logging()` and `Progress()`.

    Returns:
        The state after the last update, and the history of this call: the rows of `Logging`, and
        for each evaluation a row with "step", "seconds" since the start of the call and metrics.

    Raises:
        Preempted: a signal was received, and a checkpoint was saved. A subclass of SystemExit.
        BadStepError: a step is anomalous and the action is "stop", or it is "rollback" and there is
            no checkpoint yet, or `patience` is exceeded. No later checkpoint was saved.
        ValueError: an argument is out of range, the batches end early, a step needs more memory
            than is free, or the checkpoint is of another run.
        OSError: a checkpoint could not be saved, or another run uses the directory.
    """
    callbacks = [Logging(), Progress()] if callbacks is None else callbacks
    run = Run(num_steps, mesh, checkpoint or Checkpointer(None), callbacks)
    detector, delayed = AnomalyDetector(anomalies), DelayedMetrics()
    _check_arguments(run, batches, evaluation, anomalies)
    stateful = {"batches": batches, "health": detector, **run.stateful_callbacks()}
    with run.checkpoint.lock():
        state, rng = run.checkpoint.restore(_place(state, mesh), rng, stateful)
        run.begin(state)
        like = jax.tree.map(abstract_array, state)
        step_fn = CompiledStep(skip_bad_updates(train_step, anomalies), state, mesh)
        with run.active(), catch_signals(run.checkpoint.is_active) as should_stop:
            while not run.is_last:
                run.step += 1
                batch, placed = _next_batch(run, batches, delayed)
                run.state, metrics = step_fn(run.state, placed, rng, *detector.step_args(run.step))
                bad = _finish(run, detector, delayed.push(run.step, batch, metrics))
                run.checkpoint.check()
                signal = None if run.is_last else should_stop(run.step)
                if bad is None and (signal or run.is_due(evaluation) or run.is_due(run.checkpoint)):
                    bad = _finish(run, detector, delayed.pop())
                if bad is not None:
                    delayed.pop()
                    _roll_back(run, detector, like, bad)
                    continue
                with run.pause():
                    scores = {} if signal else _evaluate(run, evaluation)
                    if signal or run.save_requested or run.is_due(run.checkpoint):
                        run.checkpoint.save(run.state, rng, stateful, scores)
                        run.save_requested = False
                if signal:
                    _exit(run, signal)
    return run.state, run.history


def _check_arguments(run: Run, batches: Batches, evaluation: Evaluation | None,
                     policy: AnomalyPolicy) -> None:
    """Raises ValueError if an argument of `fit` is out of range."""
    for name, value in (("num_steps", run.num_steps),
                        ("eval_every", evaluation.every if evaluation else 0)):
        if value < 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")
    if not run.checkpoint.is_active and "rollback" in (policy.not_finite, policy.on_spike):
        raise ValueError("the action rollback needs checkpoints; pass a Checkpointer with a "
                         "directory, or choose another action")
    if run.checkpoint.is_active and not hasattr(batches, "get_state"):
        raise ValueError(
            f"batches is a {type(batches).__name__} without get_state, so a run could not resume "
            "from a checkpoint; pass a Grain iterator, or save no checkpoints")


def _next_batch(run: Run, batches: Batches, delayed: DelayedMetrics) -> tuple[PyTree, PyTree]:
    """Returns the next batch, on the host and on the mesh."""
    start = time.perf_counter()
    try:
        batch = next(batches)
    except StopIteration:
        raise ValueError(f"the batches ended after step {run.step - 1} of {run.num_steps}; repeat "
                         f"the data, or reduce num_steps to {run.step - 1}") from None
    placed = batch if run.mesh is None else sharding.shard_batch(batch, run.mesh)
    run.data_wait_seconds = time.perf_counter() - start if delayed.devices_are_idle else 0.0
    run.call("on_batch")
    return batch, placed


def _finish(run: Run, detector: AnomalyDetector, result: StepResult | None) -> StepResult | None:
    """Handles the metrics of a step; returns the result if the run must be rolled back."""
    if result is None:
        return None
    if (anomaly := detector.update(result.step, result.metrics)) is not None:
        handle(anomaly, result.step, result.batch, run.checkpoint.directory)
    run.call("on_step", result._replace(anomaly=anomaly))
    return result if anomaly is not None and anomaly.action == "rollback" else None


def _roll_back(run: Run, detector: AnomalyDetector, like: TrainState, bad: StepResult) -> None:
    """Restores the last checkpoint; the run continues with the next batch."""
    with run.pause():
        run.reset(_place(run.checkpoint.roll_back(like, bad.step), run.mesh))
        detector.rewind(run.step)
        run.log({"step": run.step, "rolled_back": 1.0})


def _evaluate(run: Run, evaluation: Evaluation | None) -> dict[str, float]:
    """Runs and logs the evaluation, and returns its metrics; none if it is not due."""
    if evaluation is None or not run.is_due(evaluation):
        return {}
    found = evaluation.fn(evaluation.select(run.state))
    scores = {name: float(value) for name, value in found.items()}
    run.log({"step": run.step, **{f"eval_{name}": value for name, value in scores.items()}})
    return scores


def _exit(run: Run, signal: str) -> None:
    """Ends a run whose checkpoint is being saved after a signal."""
    run.checkpoint.wait()
    print(f"{signal} at step {run.step} of {run.num_steps}: saved a checkpoint in "
          f"{run.checkpoint.directory}; run the same command again to resume", flush=True)
    raise Preempted(signal, run.step)


def replay_step(
    state: TrainState, train_step: TrainStep, batches: Batches, *, step: int,
    rng: jax.Array | None, checkpoint: Checkpointer, mesh: Mesh | None = None,
    anomalies: AnomalyPolicy = DEFAULT_POLICY,
) -> tuple[TrainState, HistoryRow]:
    """Repeats a step of a run, for debugging: from the last checkpoint before it, or the beginning.

    The arguments are those of `fit` (another mesh is allowed) and `step`, the number of the step,
    counted from 1. Nothing is evaluated, and no checkpoint is changed. The batch of the step is
    saved in the checkpoint directory as "replayed_batch_step<step>.npz". Anomalous updates are
    skipped if the policy says so; otherwise anomalies are only printed.

    Returns:
        The state after the step, and its metrics with "step".

    Raises:
        ValueError: `step` is below 1, `checkpoint` has no directory, or as in `fit`.
    """
    if step < 1:
        raise ValueError(f"step is {step}; it must be at least 1, the first step of a run")
    if not checkpoint.is_active:
        raise ValueError("replay_step needs checkpoints; pass a Checkpointer with a directory")
    run = Run(step, mesh, checkpoint, ())
    detector, delayed = AnomalyDetector(anomalies), DelayedMetrics()
    _check_arguments(run, batches, None, anomalies)
    stateful = {"batches": batches, "health": detector}
    state, rng = checkpoint.restore(_place(state, mesh), rng, stateful, before=step)
    run.begin(state)
    step_fn = CompiledStep(skip_bad_updates(train_step, anomalies), state, mesh)
    with run.active():
        while not run.is_last:
            run.step += 1
            batch, placed = _next_batch(run, batches, delayed)
            run.state, metrics = step_fn(run.state, placed, rng, *detector.step_args(run.step))
            delayed.push(run.step, batch, metrics)
            metrics = delayed.pop().metrics
            if (anomaly := detector.update(run.step, metrics)) is not None:
                print(anomaly.message, flush=True)
    print(save_batch(checkpoint.directory, step, batch, "replayed"), flush=True)
    return run.state, {"step": step, "loss": metrics["loss"], **metrics}


def _place(state: TrainState, mesh: Mesh | None) -> TrainState:
    """Places a state like the output of a train step, so that the second step is not recompiled.

    Without a mesh, arrays from a checkpoint are committed to their device and new arrays are not,
    but all outputs of a step are committed if one of its inputs is.
    """
    if mesh is not None:
        return jax.device_put(state, sharding.param_shardings(state, mesh))
    arrays = [x for x in jax.tree.leaves(state) if isinstance(x, jax.Array)]
    devices = {device for x in arrays for device in x.devices()}
    return jax.device_put(state, *devices) if len(devices) == 1 else state
