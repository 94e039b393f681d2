"""What to do about a step whose loss is not a number, or far above what it was.

A step is bad if its loss or gradient is not finite, or if its loss is more than `spike` standard
deviations above the mean of the last `window` good ones. Its batch is written beside the
checkpoints, and the policy says what follows:

  stop       the run ends, with nothing saved since the last good checkpoint
  skip       the step changes nothing but the count of steps (so it is decided on the device)
  roll back  the last checkpoint comes back, and training goes on with the batches that follow the
             bad one (Chowdhery et al. 2022, "PaLM", section 5.1)
  record     it is only written down

What counts as a spike at step n depends on the losses up to step n - 2 alone, because the device
never waits for the host; so a run that resumes judges as one that was never stopped.
"""

import collections
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.tree import PyTree, flatten_paths

ACTIONS = ("stop", "skip", "rollback", "record")
MIN_HISTORY = 10  # losses before anything counts as a spike


class AnomalyPolicy(NamedTuple):
    """See the top of this file."""

    not_finite: str = "stop"  # one of `ACTIONS` but record
    on_spike: str = "record"  # one of `ACTIONS`
    spike: float | None = None  # standard deviations; None: nothing is a spike
    window: int = 100
    patience: int = 5  # more bad steps in a row, or more times rolled back: stop

    def check(self) -> None:
        """Raises a ValueError that names what is out of range."""
        for name, allowed in (("not_finite", ACTIONS[:3]), ("on_spike", ACTIONS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose from "
                                 f"{', '.join(allowed)}")
        if self.spike is not None and not 0 < self.spike < math.inf:
            raise ValueError(f"spike is {self.spike}; give standard deviations above 0")
        if self.window < MIN_HISTORY or self.patience < 1:
            raise ValueError(f"window is {self.window} and patience {self.patience}; give at least "
                             f"{MIN_HISTORY} and 1")

    @property
    def skips(self) -> bool:
        return self.not_finite == "skip" or (self.spike is not None and self.on_spike == "skip")


STOP = AnomalyPolicy()


class BadStepError(FloatingPointError):
    """The run stopped at a bad step. Has `step` and `batch`."""

    def __init__(self, message: str, step: int, batch: PyTree):
        super().__init__(message)
        self.step, self.batch = step, batch


class NonFiniteLossError(BadStepError):
    """The loss or the gradient is infinite or not a number."""


class SpikingLossError(BadStepError):
    """The loss is far above what it was."""


class Anomaly(NamedTuple):
    """What is wrong with a step, and what to do about it."""

    what: str
    action: str  # one of `ACTIONS`
    error: type[BadStepError]


def skip_bad_updates(train_step: Callable, policy: AnomalyPolicy) -> Callable:
    """`guarded(state, batch, rng, limit)`: the step, or where `policy` skips it, only its count.

    `limit` is the greatest loss that is no spike. The metric "skipped" is 1 or 0.
    """

    def guarded(state, batch, rng, limit):
        after, metrics = train_step(state, batch, rng)
        good = jnp.bool_(True)
        if policy.not_finite == "skip":
            good &= jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])
        if policy.spike is not None and policy.on_spike == "skip":
            good &= ~(metrics["loss"] > limit)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
        return kept._replace(step=after.step), metrics | {"skipped": 1 - good.astype(jnp.float32)}

    return guarded


class AnomalyDetector:
    """The losses so far, and what they say of a step. JSON by `get_state`."""

    def __init__(self, policy: AnomalyPolicy):
        policy.check()
        self.policy = policy
        self._good: collections.deque = collections.deque(maxlen=policy.window + 2)
        self._in_a_row = self._rolled_back = 0

    def limit(self, step: int) -> float:
        """The greatest loss that is no spike at this step."""
        losses = [loss for n, loss in self._good if n <= step - 2][-self.policy.window:]
        if self.policy.spike is None or len(losses) < MIN_HISTORY:
            return math.inf
        return statistics.fmean(losses) + self.policy.spike * statistics.pstdev(losses)

    def judge(self, step: int, metrics: dict[str, float]) -> Anomaly | None:
        """What is wrong with a step, which is also remembered; None if it is good."""
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(metrics.get(name, 0.0))]
        limit = self.limit(step)
        if not bad and not metrics["loss"] > limit:
            self._good.append((step, metrics["loss"]))
            self._in_a_row = 0
            return None
        self._in_a_row += 1
        if bad:
            found = Anomaly(f"{bad[0]} is {metrics[bad[0]]} at step {step}", self.policy.not_finite,
                        NonFiniteLossError)
        else:
            found = Anomaly(f"loss is {metrics['loss']:.4g} at step {step}, above {limit:.4g}, which "
                        f"is {self.policy.spike:g} deviations over the mean of the last "
                        f"{self.policy.window}", self.policy.on_spike, SpikingLossError)
        if found.action == "rollback":
            self._rolled_back += 1
        if (found.action != "record"
                and max(self._in_a_row, self._rolled_back) > self.policy.patience):
            found = found._replace(action="stop", what=(
                f"{found.what} (bad step {self._in_a_row} in a row; {self._rolled_back} times "
                "rolled back)"))
        return found

    def forget(self, after: int) -> None:
        """The losses of steps that are to be done again."""
        kept = [pair for pair in self._good if pair[0] <= after]
        self._good.clear()
        self._good.extend(kept)

    def get_state(self) -> dict[str, Any]:
        return {"good": [list(pair) for pair in self._good], "in_a_row": self._in_a_row,
                "rolled_back": self._rolled_back}

    def set_state(self, state: dict[str, Any]) -> None:
        self._good.clear()
        self._good.extend((int(n), float(loss)) for n, loss in state["good"])
        self._in_a_row, self._rolled_back = state["in_a_row"], state["rolled_back"]


def write_batch(folder: str | Path | None, step: int, batch: PyTree, kind: str = "bad") -> str:
    """Writes a batch, this process's rows of it; says where it is."""
    if folder is None:
        return f"it was batch {step} of the run"
    host = f"_host{jax.process_index()}" if jax.process_count() > 1 else ""
    file = Path(folder) / f"{kind}_batch_step{step}{host}.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{path: np.asarray(x) for path, x in flatten_paths(batch).items()})
    return f"its batch is in {file}"
