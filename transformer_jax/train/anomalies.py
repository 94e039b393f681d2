"""Events that interrupt a run: non-finite losses, loss spikes, and signals (preemption).

A step is anomalous if its loss or gradient norm is not finite, or if its loss is a spike: more than
`AnomalyPolicy.spike` standard deviations above the mean of the last `AnomalyPolicy.window` normal
losses. The batch of an anomalous step is saved in the checkpoint directory, and the policy selects
one of these actions:

    stop      raise an error, without saving another checkpoint
    skip      discard the update (on the device) and increment only the step counter
    rollback  restore the last checkpoint and continue with the batches after the anomalous one
              (Chowdhery et al. 2022, "PaLM", section 5.1)
    record    only log the step and save its batch

The spike threshold of step n depends only on the losses up to step n - 2, because the loss of step
n - 1 is still being computed when step n is dispatched to the devices. A resumed run therefore
makes the same decisions as an uninterrupted one.
"""

import collections
import contextlib
import math
import signal
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.tree import PyTree, flatten_paths

EXIT_STATUS = 75  # EX_TEMPFAIL of sysexits.h: running the same command later resumes the run
ACTIONS = ("stop", "skip", "rollback", "record")
MIN_HISTORY = 10  # minimum number of normal losses from which a spike threshold is computed


class AnomalyPolicy(NamedTuple):
    """The actions taken on non-finite losses and on loss spikes."""

    not_finite: str = "stop"  # action on a non-finite loss or gradient: stop, skip or rollback
    on_spike: str = "record"  # action on a loss spike: stop, skip, rollback or record
    spike: float | None = None  # threshold in standard deviations; None disables spike detection
    window: int = 100  # number of normal losses in the mean and the standard deviation
    patience: int = 5  # stop above this many consecutive anomalous steps, or rollbacks in total

    def check(self) -> None:
        """Raises ValueError if a field is out of range."""
        for name, allowed in (("not_finite", ACTIONS[:3]), ("on_spike", ACTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from "
                                 f"{', '.join(allowed)}")
        if self.spike is not None and not 0 < self.spike < math.inf:
            raise ValueError(f"spike is {self.spike}; it must be a finite number of standard "
                             "deviations above 0")
        if self.window < MIN_HISTORY or self.patience < 1:
            raise ValueError(f"window is {self.window} and patience is {self.patience}; they must "
                             f"be at least {MIN_HISTORY} and 1")

    @property
    def skips(self) -> bool:
        """Whether the action on non-finite losses or on loss spikes is "skip"."""
        return self.not_finite == "skip" or (self.spike is not None and self.on_spike == "skip")


DEFAULT_POLICY = AnomalyPolicy()


class BadStepError(FloatingPointError):
    """Training stopped at the anomalous step `step`, counted from 1, with the batch `batch`.

    `batch` is None if a rollback failed because no checkpoint was saved yet.
    """

    def __init__(self, message: str, step: int, batch: PyTree):
        super().__init__(message)
        self.step, self.batch = step, batch


class NonFiniteLossError(BadStepError):
    """The loss or the gradient norm is infinite or NaN."""


class LossSpikeError(BadStepError):
    """The loss is above the spike threshold."""


class Anomaly(NamedTuple):
    """An anomalous step and the action to take."""

    message: str
    action: str  # one of `ACTIONS`
    error_type: type[BadStepError]


def skip_bad_updates(train_step: Callable, policy: AnomalyPolicy) -> Callable:
    """Wraps a train step so that it discards the updates on which the action of `policy` is "skip".

    Returns `guarded_step(state, batch, rng, spike_threshold) -> (state, metrics)`, or `train_step`
    itself if `policy` skips none (`AnomalyDetector.step_args` are the arguments after `rng`). A
    discarded step increments only `state.step`. The added metric "skipped" is 1 for it, else 0.
    Similar to `optax.apply_if_finite`, but for the whole train state, and also for loss spikes.
    """
    if not policy.skips:
        return train_step

    def guarded_step(state, batch, rng, spike_threshold):
        new_state, metrics = train_step(state, batch, rng)
        is_good = jnp.bool_(True)
        if policy.not_finite == "skip":
            is_good &= jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if policy.spike is not None and policy.on_spike == "skip":
            is_good &= ~(metrics["loss"] > spike_threshold)
        kept = jax.tree.map(lambda new, old: jnp.where(is_good, new, old), new_state, state)
        return (kept._replace(step=new_state.step),
                metrics | {"skipped": 1 - is_good.astype(jnp.float32)})

    return guarded_step


class AnomalyDetector:
    """Detects anomalous steps from the losses so far, and selects the action of the policy.

    Its state is JSON (`get_state`, `set_state`), so that checkpoints can store it.
    """

    def __init__(self, policy: AnomalyPolicy):
        policy.check()
        self.policy = policy
        # (step, loss) of normal steps. Two more than the window, because the threshold of step n
        # leaves out the losses after step n - 2.
        self._normal_losses: collections.deque = collections.deque(maxlen=policy.window + 2)
        self._num_consecutive = self._num_rollbacks = 0

    def spike_threshold(self, step: int) -> float:
        """Returns the loss above which `step` is a spike; inf below `MIN_HISTORY` losses."""
        losses = [loss for n, loss in self._normal_losses if n <= step - 2][-self.policy.window:]
        if self.policy.spike is None or len(losses) < MIN_HISTORY:
            return math.inf
        return statistics.fmean(losses) + self.policy.spike * statistics.pstdev(losses)

    def step_args(self, step: int) -> tuple[np.float32, ...]:
        """Returns the arguments that a step from `skip_bad_updates` takes after `rng`."""
        return (np.float32(self.spike_threshold(step)),) if self.policy.skips else ()

    def update(self, step: int, metrics: dict[str, float]) -> Anomaly | None:
        """Adds the metrics of a step, counted from 1; returns None if the step is normal."""
        non_finite = [name for name in ("loss", "grad_norm")
                      if not math.isfinite(metrics.get(name, 0.0))]
        threshold = self.spike_threshold(step)
        if not non_finite and not metrics["loss"] > threshold:
            self._normal_losses.append((step, metrics["loss"]))
            self._num_consecutive = 0
            return None
        self._num_consecutive += 1
        if non_finite:
            anomaly = Anomaly(f"{non_finite[0]} is {metrics[non_finite[0]]} at step {step}",
                              self.policy.not_finite, NonFiniteLossError)
        else:
            anomaly = Anomaly(
                f"loss is {metrics['loss']:.4g} at step {step}, above the spike threshold "
                f"{threshold:.4g} ({self.policy.spike:g} standard deviations above the mean of the "
                f"last {self.policy.window} losses)", self.policy.on_spike, LossSpikeError)
        if anomaly.action == "rollback":
            self._num_rollbacks += 1
        if (anomaly.action != "record"
                and max(self._num_consecutive, self._num_rollbacks) > self.policy.patience):
            anomaly = anomaly._replace(action="stop", message=(
                f"{anomaly.message} ({self._num_consecutive} consecutive anomalous steps and "
                f"{self._num_rollbacks} rollbacks, with patience {self.policy.patience})"))
        return anomaly

    def rewind(self, step: int) -> None:
        """Drops the losses after `step`, because these steps are repeated after a rollback."""
        while self._normal_losses and self._normal_losses[-1][0] > step:
            self._normal_losses.pop()

    # The keys are part of the checkpoint format.
    def get_state(self) -> dict[str, Any]:
        return {"good": [list(pair) for pair in self._normal_losses],
                "in_a_row": self._num_consecutive, "rolled_back": self._num_rollbacks}

    def set_state(self, state: dict[str, Any]) -> None:
        self._normal_losses.clear()
        self._normal_losses.extend((int(n), float(loss)) for n, loss in state["good"])
        self._num_consecutive, self._num_rollbacks = state["in_a_row"], state["rolled_back"]


def save_batch(folder: str | Path | None, step: int, batch: PyTree, kind: str = "bad") -> str:
    """Saves a batch as `<kind>_batch_step<step>.npz`; with several processes, one file for each.

    Returns a clause for messages that states where the batch is. `folder=None` saves nothing.
    """
    if folder is None:
        return f"the batch was number {step} of the run"
    host = f"_host{jax.process_index()}" if jax.process_count() > 1 else ""
    file = Path(folder) / f"{kind}_batch_step{step}{host}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{path: np.asarray(x) for path, x in flatten_paths(batch).items()})
    return f"the batch is saved in {file}"


def handle(anomaly: Anomaly, step: int, batch: PyTree, folder: str | Path | None) -> None:
    """Saves the batch of an anomalous step, then raises its error ("stop") or prints the action."""
    location = save_batch(folder, step, batch)
    if anomaly.action == "stop":
        raise anomaly.error_type(
            f"{anomaly.message}; {location}; no checkpoint was saved after this step. Lower the "
            "learning rate, or inspect the batch", step, batch)
    print(f"{anomaly.message}: {anomaly.action}; {location}", flush=True)


# Preemption: on a signal, a run finishes its step, saves it and exits -----------------------------


class Preempted(SystemExit):
    """Raised after a run has received SIGTERM or SIGINT and saved a checkpoint of `step`.

    If it is not caught, the process exits with `EXIT_STATUS`, so that a scheduler can distinguish a
    preemption from a failure.
    """

    def __init__(self, signal_name: str, step: int):
        super().__init__(EXIT_STATUS)
        self.signal_name, self.step = signal_name, step


@contextlib.contextmanager
def catch_signals(active: bool = True) -> Iterator[Callable[[int], str | None]]:
    """Catches SIGTERM and SIGINT, and yields `should_stop(step)`: the name of the signal or None.

    A second signal has its usual effect, because the previous handlers are restored after the first
    one. With several processes, a scheduler may send the signal to only some of them; JAX's
    coordination service, which catches SIGTERM only, then makes all stop at the same step. In a
    single process outside the main thread, Python cannot handle signals, and none is caught.
    """
    if not active or (jax.process_count() == 1
                      and threading.current_thread() is not threading.main_thread()):
        yield lambda step: None
        return
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils  # slow to import

        yield lambda step: (
            "SIGTERM" if multihost_utils.reached_preemption_sync_point(step) else None)
        return
    received: list[str] = []

    def restore_handlers() -> None:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)

    def on_signal(number, frame) -> None:
        received.append(signal.Signals(number).name)
        restore_handlers()

    previous_handlers = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous_handlers[number] = signal.signal(number, on_signal)
    try:
        yield lambda step: received[0] if received else None
    finally:
        restore_handlers()
