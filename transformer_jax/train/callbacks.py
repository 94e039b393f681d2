"""Callbacks of the training loop: history, progress, TensorBoard, profiler, early stopping.

A callback of `loop.fit` is a function that receives each row of the history, or a `Callback`, for
example one that stops the run at a target loss:

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
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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

if TYPE_CHECKING:
    from transformer_jax.train.loop import Run

HistoryRow = dict[str, float]


class StepResult(NamedTuple):
    """A completed step, with its metrics on the host."""

    step: int  # counted from 1: the number of updates up to and including this step
    batch: PyTree
    metrics: dict[str, float]
    anomaly: Anomaly | None = None


class Callback:
    """Base class of callbacks. Override the hooks that you need; they do nothing by default."""

    def on_start(self, run: "Run") -> None:
        """Called before the first step, after a checkpoint was restored."""

    def on_batch(self, run: "Run") -> None:
        """Called when a batch was fetched, before step number `run.step` is dispatched."""

    def on_step(self, run: "Run", result: StepResult) -> None:
        """Called when the metrics of a step are known; the next step may be running already."""

    def on_row(self, run: "Run", row: HistoryRow) -> None:
        """Called with each row of the history; metrics of evaluations are named "eval_<name>"."""

    def on_end(self, run: "Run") -> None:
        """Called after the last step, and also if the run ends with an exception."""

    def get_state(self) -> Any:
        """Returns JSON values that checkpoints store; None if there are none."""

    def set_state(self, state: Any) -> None:
        """Restores a state from `get_state`, before `on_start`."""


class RowFunction(Callback):
    """Calls a function with each row of the history."""

    def __init__(self, fn: Callable[[HistoryRow], Any]):
        self.fn = fn

    def on_row(self, run: "Run", row: HistoryRow) -> None:
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

    def on_start(self, run: "Run") -> None:
        self._compilations = CompilationCounter()
        self._last_time: float | None = None  # the first step, which compiles, is not measured
        self._seconds, self._num_steps, self._wait_seconds = 0.0, 0, 0.0

    def on_batch(self, run: "Run") -> None:
        if self._last_time is not None:
            self._wait_seconds += run.data_wait_seconds

    def on_step(self, run: "Run", result: StepResult) -> None:
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

    def on_end(self, run: "Run") -> None:
        self._compilations.close()


def _count_tokens(batch: PyTree, mesh: Mesh | None) -> int:
    tokens = batch.get("tokens") if isinstance(batch, dict) else None
    return 0 if tokens is None else np.size(tokens) * sharding.process_data_shard(mesh).count


class Progress(Callback):
    """Shows rows of the history: a progress bar on a terminal, plain lines elsewhere."""

    def on_start(self, run: "Run") -> None:
        self._bar, self._seconds_per_step = None, 0.0
        if jax.process_index() > 0:
            return
        if run.start:
            print(f"starting at step {run.start} of {run.num_steps}", flush=True)
        if (console := Console()).is_terminal:
            self._bar = rich_progress.Progress(
                rich_progress.MofNCompleteColumn(), rich_progress.BarColumn(bar_width=24),
                rich_progress.TextColumn("{task.description}"), console=console)
            self._task = self._bar.add_task("compiling", total=run.num_steps, completed=run.start)
            self._bar.start()

    def on_row(self, run: "Run", row: HistoryRow) -> None:
        self._seconds_per_step = row.get("seconds_per_step", self._seconds_per_step)
        text = _format_row(row, self._seconds_per_step * (run.num_steps - row["step"]))
        if self._bar is not None:
            self._bar.update(self._task, completed=row["step"], description=text)
        elif jax.process_index() == 0:
            print(f"step {row['step']}/{run.num_steps}  {text}", flush=True)

    def on_end(self, run: "Run") -> None:
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
    """Formats seconds as "minutes:seconds" or "hours:minutes:seconds"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class TensorBoard(Callback):
    """Writes the history as TensorBoard events, with the tags "train/<name>" and "eval/<name>".

    `writer` is a folder, or an object with `add_scalar(tag, value, step)`, such as a
    `tensorboardX.SummaryWriter`, which the caller closes.
    """

    def __init__(self, writer: Any):
        self._target = self._writer = writer

    def on_start(self, run: "Run") -> None:
        if isinstance(self._target, str | Path) and jax.process_index() == 0:
            from tensorboardX import SummaryWriter  # imports PyTorch where it is installed

            self._writer = SummaryWriter(str(self._target))

    def on_row(self, run: "Run", row: HistoryRow) -> None:
        if jax.process_index() > 0:
            return
        for name, value in row.items():
            if name not in ("step", "seconds"):
                kind = "eval" if name.startswith("eval_") else "train"
                self._writer.add_scalar(f"{kind}/{name.removeprefix('eval_')}", value, row["step"])

    def on_end(self, run: "Run") -> None:
        if self._writer is not self._target:
            self._writer.close()


class HistoryFile(Callback):
    """Writes each row of the history as a line of a JSON Lines file.

    A resumed run appends to the file, after deleting the rows of the steps that it repeats.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def on_start(self, run: "Run") -> None:
        lines = self.path.read_text().splitlines(keepends=True) if self.path.is_file() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            self.path.write_text("".join(
                line for line in lines if json.loads(line)["step"] <= run.start))

    def on_row(self, run: "Run", row: HistoryRow) -> None:
        if jax.process_index() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")


class Profiler(Callback):
    """Writes a profiler trace of `num_steps` steps to a folder, for TensorBoard or Perfetto.

    The trace starts with the third step of the call; operations are named after modules.
    """

    def __init__(self, folder: str | Path, num_steps: int):
        if num_steps < 1:
            raise ValueError(f"num_steps of the profile is {num_steps}; it must be at least 1")
        self.folder, self.num_steps = folder, num_steps

    def on_start(self, run: "Run") -> None:
        self._end_step: int | None = None  # of the trace; None before it starts
        self._is_active = False

    def on_batch(self, run: "Run") -> None:
        if run.step == self._end_step:
            self.on_end(run)
        if self._end_step is None and run.step == min(run.start + 3, run.num_steps):
            with run.pause():
                jax.profiler.start_trace(self.folder)
            self._end_step, self._is_active = run.step + self.num_steps, True

    def on_end(self, run: "Run") -> None:
        if self._is_active:
            with run.pause():
                jax.block_until_ready(run.state.step)
                jax.profiler.stop_trace()
            self._is_active = False


class _BestMetric(Callback, abc.ABC):
    """Tracks the best value of an evaluation metric; `mode` is "min" or "max"."""

    def __init__(self, metric: str, mode: str = "min"):
        check_best(mode, "mode")
        self.metric, self.mode = metric, mode
        self.value: float | None = None  # the best value so far
        self.step: int | None = None  # the step of that evaluation
        self.num_evaluations = 0  # since then

    def on_row(self, run: "Run", row: HistoryRow) -> None:
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
    def on_evaluation(self, run: "Run") -> None:
        """Called after each evaluation, when the best value is up to date."""

    def get_state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("value", "step", "num_evaluations")}

    def set_state(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class EarlyStopping(_BestMetric):
    """Stops the run when an evaluation metric has not improved for `patience` evaluations.

    `metric` is its name without "eval_", and `mode` is "min" or "max".
    """

    def __init__(self, metric: str, mode: str = "min", patience: int = 3):
        super().__init__(metric, mode)
        if patience < 1:
            raise ValueError(f"patience is {patience}; it must be at least 1 evaluation")
        self.patience = patience

    def on_start(self, run: "Run") -> None:
        self.on_evaluation(run)  # a run that was stopped before stays stopped

    def on_evaluation(self, run: "Run") -> None:
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
        metric: the name of a metric of the evaluation, without "eval_".
        mode: "min" or "max".
        select: `select(state)` returns what is kept; by default the parameters.
    """

    def __init__(self, metric: str, mode: str = "min",
                 select: Callable[[TrainState], PyTree] = lambda state: state.params):
        super().__init__(metric, mode)
        self.select, self._copy, self._checkpoint = select, None, Checkpointer(None)

    def on_start(self, run: "Run") -> None:
        self._checkpoint = run.checkpoint

    def is_better(self, value: float) -> bool:
        return value == self.value or super().is_better(value)

    def on_evaluation(self, run: "Run") -> None:
        if self.num_evaluations:
            return
        if run.checkpoint.is_active:
            run.save_requested = True
        else:
            self._copy = jax.tree.map(jnp.copy, self.select(run.state))

    def best(self, state: TrainState) -> PyTree:
        """Returns what was selected at the best evaluation; without one, at `state`, the last."""
        if self.step is None or self.step == int(state.step):
            return self.select(state)
        if not self._checkpoint.is_active:
            return self._copy
        return self.select(restore(self._checkpoint.directory, state, self.step).state)
