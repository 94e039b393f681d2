"""How long steps take."""

import time


class StepTimer:
    """Seconds per step, without the step that compiles and without evaluating and saving."""

    def __init__(self) -> None:
        self.mean = 0.0  # of the last lap
        self.waited = 0.0  # in this lap
        self._seconds, self._steps = 0.0, 0
        self._since: float | None = None  # None: the first step is compiling

    @property
    def runs(self) -> bool:
        """Whether the first step is over."""
        return self._since is not None

    def tick(self) -> None:
        """A step is done."""
        now = time.perf_counter()
        if self._since is not None:
            self._seconds += now - self._since
            self._steps += 1
        self._since = now

    def restart(self) -> None:
        """Leaves out what happened since the last tick."""
        self._since = time.perf_counter()

    def lap(self) -> tuple[float, float] | None:
        """The mean since the last lap, and the share of it in which devices waited for the host, at
        most; None if no step was measured."""
        if not self._steps:
            return None
        self.mean, share = self._seconds / self._steps, min(self.waited / self._seconds, 1.0)
        self._seconds, self._steps, self.waited = 0.0, 0, 0.0
        return self.mean, share
