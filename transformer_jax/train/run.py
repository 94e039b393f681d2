"""The protocol of callbacks: `Run`, which the training loop passes to them, and `Callback`."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from transformer_jax.train.anomalies import Anomaly
from transformer_jax.train.checkpointer import Checkpointer
from transformer_jax.train.step import TrainState
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
