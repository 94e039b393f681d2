"""Callbacks of the training loop: history, progress, TensorBoard, profiler, early stopping.

A callback of `loop.fit` is a function that receives each row of the history, or a `Callback`.

Example:
    A callback of your own, which stops the run at a target loss:

    >>> class StopAtLoss(Callback):
    ...     def __init__(self, loss):
    ...         self.loss = loss
    ...     def on_step(self, run, result):
    ...         if result.metrics["loss"] < self.loss:
    ...             run.stop(f"the loss of step {result.step} is below {self.loss}")
    >>> import itertools, jax.numpy as jnp, numpy as np, optax
    >>> from transformer_jax.train import fit, init_state, make_train_step
    >>> def loss_fn(params, batch, rng):
    ...     return ((params["w"] - batch["x"]) ** 2).sum(), batch["x"].size, {}
    >>> optimizer = optax.sgd(0.1)
    >>> state, history = fit(
    ...     init_state({"w": jnp.zeros(())}, optimizer), make_train_step(loss_fn, optimizer),
    ...     itertools.repeat({"x": np.ones(8)}), rng=None, num_steps=100,
    ...     callbacks=[Logging(every=4), StopAtLoss(0.1)])
    >>> int(state.step), [row["step"] for row in history]
    (8, [4, 8])
"""

import abc
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich import progress as rich_progress
from rich.console import Console

from transformer_jax import sharding
from transformer_jax.train.anomalies import Anomaly
from transformer_jax.train.checkpointing import Checkpointer, check_best, restore
from transformer_jax.train.step import CompilationCounter, TrainState
from transformer_jax.tree import PyTree

HistoryRow = dict[str, float]


class StepResult(NamedTuple):
    """A completed step, with its metrics on the host."""

    step: int  # counted from 1: the number of updates up to and including this step
    batch: PyTree
    metrics: dict[str, float]
    anomaly: Anomaly | None = None


class Run:
    """The progress of a call of `loop.fit`, as its callbacks see it.

    Attributes:
        num_steps: the total number of updates.
        start: the number of updates before this call.
        step: the number of the last step that was dispatched to the devices; in `on_batch`, of the
            step that is dispatched next.
        state: the train state after the last dispatched step. The next step donates it: copy what
            you keep.
        mesh: the device mesh, or None.
        checkpoint: the `Checkpointer`; its directory is None if no checkpoints are saved.
        history: the rows so far.
        data_wait_seconds: an upper bound of the time in which the devices were idle while the last
            batch was fetched.
        stop_reason: why the run stops after the current step; None if it continues.
        save_requested: whether a checkpoint is saved after the current evaluation.
    """

    def __init__(self, num_steps: int, mesh: Mesh | None, checkpoint: Checkpointer,
                 callbacks: Sequence["Callback | Callable[[HistoryRow], Any]"]):
        self.num_steps, self.mesh, self.checkpoint = num_steps, mesh, checkpoint
        self.start, self.step, self.state = 0, 0, None
        self.history: list[HistoryRow] = []
        self.data_wait_seconds = 0.0
        self.stop_reason: str | None = None
        self.save_requested = False
        self.callbacks = [c if isinstance(c, Callback) else _RowFunction(c) for c in callbacks]
        self._created, self._paused = time.perf_counter(), 0.0

    def reset(self, state: TrainState) -> None:
        """Sets the current state and its step."""
        self.state, self.step = state, int(state.step)

    def begin(self, state: TrainState) -> None:
        """Sets the state before the first step of this call.

        Raises:
            ValueError: it has received more than `num_steps` updates.
        """
        self.reset(state)
        self.start = self.step
        if self.start > self.num_steps:
            raise ValueError(
                f"the state has received {self.start} updates, more than num_steps = "
                f"{self.num_steps}; increase num_steps, or choose another checkpoint directory")

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Context manager in which the mesh is set and the callbacks are called.

        At the end, it waits until the last checkpoint is complete.
        """
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
        """Whether an evaluation or a checkpoint is due after the current step.

        Args:
            action: an object with the attribute `every`. None is due at the end of the run only, as
                is every other action with `every` = 0.
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

    def stateful_callbacks(self) -> dict[str, "Callback"]:
        """Returns the callbacks by the name under which checkpoints store their state."""
        found: dict[str, Callback] = {}
        for callback in self.callbacks:
            name = type(callback).__name__
            count = sum(type(c) is type(callback) for c in found.values())
            found[f"{name}_{count + 1}" if count else name] = callback
        return found


class Callback:
    """Base class of callbacks. Override the hooks that you need; they do nothing by default."""

    def on_start(self, run: Run) -> None:
        """Called before the first step, after a checkpoint was restored."""

    def on_batch(self, run: Run) -> None:
        """Called when a batch was fetched, before step number `run.step` is dispatched."""

    def on_step(self, run: Run, result: StepResult) -> None:
        """Called when the metrics of a step are known; the next step may be running already."""

    def on_row(self, run: Run, row: HistoryRow) -> None:
        """Called with each row of the history; metrics of evaluations are named "eval_<name>"."""

    def on_end(self, run: Run) -> None:
        """Called after the last step, and also if the run ends with an exception."""

    def get_state(self) -> Any:
        """Returns JSON values that checkpoints store; None if there are none."""

    def set_state(self, state: Any) -> None:
        """Restores a state from `get_state`, before `on_start`."""


class _RowFunction(Callback):
    """Calls a function with each row of the history."""

    def __init__(self, fn: Callable[[HistoryRow], Any]):
        self.fn = fn

    def on_row(self, run: Run, row: HistoryRow) -> None:
        self.fn(row)



class Logging(Callback):
    """Adds rows with the metrics of a step, the throughput and the data wait to the history.

    A row has "step", the metrics of the step, the number of "compilations" since the start of the
    call, and averages since the previous row, without the time of the first step, evaluations and
    saving: "seconds_per_step", "data_wait_fraction" (an upper bound of the fraction of the time in
    which the devices waited for a batch) and, if the number of tokens is known,
    "tokens_per_second". Anomalous steps and step `num_steps` always have a row.

    Args:
        every: number of steps between rows.
        tokens_per_batch: number of tokens in a global batch. By default, the size of the batch
            entry "tokens", if there is one, times the number of data shards.
    """

    def __init__(self, every: int = 10, tokens_per_batch: int | None = None):
        if every < 1:
            raise ValueError(f"log_every is {every}; it must be at least 1")
        self.every, self.tokens_per_batch = every, tokens_per_batch

    def on_start(self, run: Run) -> None:
        self._compilations = CompilationCounter()
        # The first step is not measured, because it includes compilation.
        self._last_time: float | None = None
        self._seconds, self._num_steps, self._wait_seconds = 0.0, 0, 0.0

    def on_batch(self, run: Run) -> None:
        if self._last_time is not None:
            self._wait_seconds += run.data_wait_seconds

    def on_step(self, run: Run, result: StepResult) -> None:
        now = run.clock()
        if self._last_time is not None:
            self._seconds += now - self._last_time
            self._num_steps += 1
        self._last_time = now
        if result.anomaly is None and result.step % self.every and result.step != run.num_steps:
            return
        row = {"step": result.step, "loss": result.metrics["loss"], **result.metrics,
               "compilations": self._compilations.count}
        if self._num_steps:
            row["data_wait_fraction"] = min(self._wait_seconds / self._seconds, 1.0)
            row["seconds_per_step"] = seconds = self._seconds / self._num_steps
            if tokens := self.tokens_per_batch or _count_tokens(result.batch, run.mesh):
                row["tokens_per_second"] = tokens / seconds
            self._seconds, self._num_steps, self._wait_seconds = 0.0, 0, 0.0
        run.log(row)

    def on_end(self, run: Run) -> None:
        self._compilations.close()


def _count_tokens(batch: PyTree, mesh: Mesh | None) -> int:
    tokens = batch.get("tokens") if isinstance(batch, dict) else None
    return 0 if tokens is None else np.size(tokens) * sharding.process_data_shard(mesh).count


class Progress(Callback):
    """Shows rows of the history: a progress bar on a terminal, plain lines elsewhere."""

    def on_start(self, run: Run) -> None:
        self._bar, self._seconds_per_step = None, 0.0
        if jax.process_index() > 0:
            return
        if run.start:
            print(f"starting at step {run.start} of {run.num_steps}", flush=True)
        console = Console()
        if console.is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.MofNCompleteColumn(), rich_progress.BarColumn(bar_width=24),
                rich_progress.TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("compiling", total=run.num_steps, completed=run.start)
            self._bar.start()

    def on_row(self, run: Run, row: HistoryRow) -> None:
        self._seconds_per_step = row.get("seconds_per_step", self._seconds_per_step)
        text = _format_row(row, self._seconds_per_step * (run.num_steps - row["step"]))
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif jax.process_index() == 0:
            print(f"step {row['step']}/{run.num_steps}  {text}", flush=True)

    def on_end(self, run: Run) -> None:
        if self._bar is not None:
            self._bar.stop()
        if run.stop_reason and jax.process_index() == 0:
            print(f"stopped at step {run.step} of {run.num_steps}: {run.stop_reason}", flush=True)


def _format_row(row: HistoryRow, seconds_left: float) -> str:
    """Formats metrics for display, for example "loss 2.313  1,024 tokens/s  0:42 left"."""
    parts = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in row.items()
             if name == "loss" or name.startswith("eval_")]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    elif "seconds_per_step" in row:
        parts.append(f"{row['seconds_per_step']:.3g} s/step")
    return "  ".join([*parts, f"{format_duration(seconds_left)} left"] if seconds_left else parts)


def format_duration(seconds: float) -> str:
    """Formats seconds as "minutes:seconds" or "hours:minutes:seconds".

    Example:
        >>> format_duration(75), format_duration(3700)
        ('1:15', '1:01:40')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class TensorBoard(Callback):
    """Writes the history as TensorBoard events, with the tags "train/<name>" and "eval/<name>".

    Args:
        writer: a folder, or an object with `add_scalar(tag, value, step)`, such as a
            `tensorboardX.SummaryWriter`, which the caller closes.
    """

    def __init__(self, writer: Any):
        self._target = writer

    def on_start(self, run: Run) -> None:
        self._writer = self._target
        if isinstance(self._target, str | Path) and jax.process_index() == 0:
            from tensorboardX import SummaryWriter  # imports PyTorch where it is installed

            self._writer = SummaryWriter(str(self._target))

    def on_row(self, run: Run, row: HistoryRow) -> None:
        if jax.process_index() > 0:
            return
        for name, value in row.items():
            if name not in ("step", "seconds"):
                kind = "eval" if name.startswith("eval_") else "train"
                self._writer.add_scalar(f"{kind}/{name.removeprefix('eval_')}", value, row["step"])

    def on_end(self, run: Run) -> None:
        if self._writer is not self._target:
            self._writer.close()


class HistoryFile(Callback):
    """Writes each row of the history as a line of a JSON Lines file.

    A resumed run appends to the file, after deleting the rows of the steps that it repeats.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def on_start(self, run: Run) -> None:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            self.path.write_text("".join(
                line for line in lines if json.loads(line)["step"] <= run.start))

    def on_row(self, run: Run, row: HistoryRow) -> None:
        if jax.process_index() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class Profiler(Callback):
    """Writes a profiler trace of some steps, for TensorBoard or Perfetto.

    The trace starts with the third step of the call; operations are named after modules.

    Args:
        folder: folder of the trace.
        num_steps: the number of steps.
    """

    def __init__(self, folder: str | Path, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"num_steps of the profile is {num_steps}; it must be at least 1")
        self.folder, self.num_steps = folder, num_steps

    def on_start(self, run: Run) -> None:
        self._is_active, self._is_started = False, False

    def on_batch(self, run: Run) -> None:
        if self._is_active and run.step == run.start + 3 + self.num_steps:
            self._stop(run)
        if not self._is_started and run.step == min(run.start + 3, run.num_steps):
            with run.pause():
                jax.profiler.start_trace(self.folder)
            self._is_active = self._is_started = True

    def on_end(self, run: Run) -> None:
        if self._is_active:
            self._stop(run)

    def _stop(self, run: Run) -> None:
        with run.pause():
            jax.block_until_ready(run.state.step)
            jax.profiler.stop_trace()
        self._is_active = False


class _BestMetric(Callback, abc.ABC):
    """Tracks the best value of an evaluation metric.

    Args:
        metric: the name of a metric of the evaluation.
        mode: "min" or "max".
    """

    def __init__(self, metric: str, mode: str = "min"):
        check_best(mode, "mode")
        self.metric, self.mode = metric, mode
        self.value: float | None = None  # the best value so far
        self.step: int | None = None  # the step of that evaluation
        self.num_evaluations = 0  # since then

    def on_row(self, run: Run, row: HistoryRow) -> None:
        names = [name.removeprefix("eval_") for name in row if name.startswith("eval_")]
        if not names:
            return
        if self.metric not in names:
            raise ValueError(f"{type(self).__name__}: the evaluation has no metric "
                             f"{self.metric!r}; choose from {', '.join(names)}")
        value = row[f"eval_{self.metric}"]
        self.num_evaluations += 1
        if not math.isnan(value) and (self.value is None or self.is_better(value)):
            self.value, self.step, self.num_evaluations = value, row["step"], 0
        self.on_evaluation(run)

    def is_better(self, value: float) -> bool:
        return value < self.value if self.mode == "min" else value > self.value

    @abc.abstractmethod
    def on_evaluation(self, run: Run) -> None:
        """Called after each evaluation, when the best value is up to date."""

    def get_state(self) -> dict[str, Any]:
        return {"value": self.value, "step": self.step, "num_evaluations": self.num_evaluations}

    def set_state(self, state: dict[str, Any]) -> None:
        self.value, self.step = state["value"], state["step"]
        self.num_evaluations = state["num_evaluations"]


class EarlyStopping(_BestMetric):
    """Stops the run when an evaluation metric has not improved for `patience` evaluations.

    Args:
        metric: the name of a metric of the evaluation.
        mode: "min" or "max".
        patience: number of evaluations.
    """

    def __init__(self, metric: str, mode: str = "min", patience: int = 3):
        super().__init__(metric, mode)
        if patience < 1:
            raise ValueError(f"patience is {patience}; it must be at least 1 evaluation")
        self.patience = patience

    def on_start(self, run: Run) -> None:
        self.on_evaluation(run)  # a run that was stopped before stays stopped

    def on_evaluation(self, run: Run) -> None:
        if self.num_evaluations >= self.patience:
            run.stop(self.reason)

    @property
    def reason(self) -> str:
        """Why the run is stopped."""
        return ((f"eval_{self.metric} was never a number" if self.step is None else
                 f"eval_{self.metric} has not improved since step {self.step}")
                + f" ({self.num_evaluations} evaluations)")


class KeepBest(_BestMetric):
    """Keeps the parameters of the best evaluation; of equal ones, the last.

    If the run saves no checkpoints, a copy of the parameters is held in device memory. Otherwise
    each improvement is saved as a checkpoint; pass keep_best=(metric, mode) to the `Checkpointer`,
    so that it keeps the best one.

    Args:
        metric: the name of a metric of the evaluation.
        mode: "min" or "max".
        select: `select(state)` returns what is kept; by default the parameters.
    """

    def __init__(self, metric: str, mode: str = "min",
                 select: Callable[[TrainState], PyTree] = lambda state: state.params):
        super().__init__(metric, mode)
        self.select, self._copy, self._checkpoint = select, None, Checkpointer(None)

    def on_start(self, run: Run) -> None:
        self._checkpoint = run.checkpoint

    def is_better(self, value: float) -> bool:
        return value == self.value or super().is_better(value)

    def on_evaluation(self, run: Run) -> None:
        if self.num_evaluations:
            return
        if not run.checkpoint.is_active:
            self._copy = jax.tree.map(jnp.copy, self.select(run.state))
        else:
            run.save_requested = True

    def best(self, state: TrainState) -> PyTree:
        """Returns what was selected at the best evaluation.

        Args:
            state: the final state of the run, which is used if there was no evaluation.
        """
        if self.step is None or self.step == int(state.step):
            return self.select(state)
        if not self._checkpoint.is_active:
            return self._copy
        return self.select(restore(self._checkpoint.directory, state, self.step).state)
