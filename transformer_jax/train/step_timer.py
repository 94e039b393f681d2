"""Timer of train steps: seconds per step, and the fraction of time spent waiting for data."""

import time


class StepTimer:
    """Measures the mean time per step in intervals of several steps.

    The first step is not measured, because it includes compilation. `skip_elapsed` excludes the
    time of evaluation and saving.

    Attributes:
        mean_seconds: seconds per step over the last completed interval.
        data_wait_seconds: seconds in the current interval that devices waited for a batch. The
            caller adds to it.

    Example:
        >>> timer = StepTimer()
        >>> timer.step_done()  # the step that compiles
        >>> timer.end_interval() is None
        True
        >>> timer.step_done()
        >>> seconds_per_step, data_wait_fraction = timer.end_interval()
        >>> data_wait_fraction
        0.0
    """

    def __init__(self) -> None:
        self.mean_seconds = 0.0
        self.data_wait_seconds = 0.0
        self._total_seconds, self._num_steps = 0.0, 0
        self._last_time: float | None = None  # None until the first step is completed

    @property
    def is_running(self) -> bool:
        """Whether the first step is completed, so that further steps are measured."""
        return self._last_time is not None

    def step_done(self) -> None:
        """Records the end of a step."""
        now = time.perf_counter()
        if self._last_time is not None:
            self._total_seconds += now - self._last_time
            self._num_steps += 1
        self._last_time = now

    def skip_elapsed(self) -> None:
        """Excludes the time since the last step, for instance after an evaluation."""
        self._last_time = time.perf_counter()

    def end_interval(self) -> tuple[float, float] | None:
        """Ends the current interval and starts the next one.

        Returns:
            (seconds per step, upper bound of the fraction of that time in which devices waited for
            a batch), or None if no step was measured.
        """
        if not self._num_steps:
            return None
        self.mean_seconds = self._total_seconds / self._num_steps
        data_wait_fraction = min(self.data_wait_seconds / self._total_seconds, 1.0)
        self._total_seconds, self._num_steps, self.data_wait_seconds = 0.0, 0, 0.0
        return self.mean_seconds, data_wait_fraction
