"""Progress reports of a training run: a progress bar on a terminal, plain lines elsewhere."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

# (step, metrics of a history row, estimated seconds left or None) -> None
ReportFn = Callable[[int, dict[str, float], float | None], None]


def format_duration(seconds: float) -> str:
    """Formats seconds as "minutes:seconds" or "hours:minutes:seconds".

    Example:
        >>> format_duration(75), format_duration(3700)
        ('1:15', '1:01:40')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _format_row(row: dict[str, float], seconds_left: float | None) -> str:
    """Formats metrics for display, for example "loss 2.313  1,024 tokens/s  0:42 left"."""
    parts = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in row.items()
        if name == "loss" or name.startswith("eval_")
    ]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    elif "seconds_per_step" in row:
        parts.append(f"{row['seconds_per_step']:.3g} s/step")
    if seconds_left is not None:
        parts.append(f"{format_duration(seconds_left)} left")
    return "  ".join(parts)


@contextlib.contextmanager
def progress(num_steps: int, start: int = 0, quiet: bool = False) -> Iterator[ReportFn]:
    """Context manager that yields a function `report(step, row, seconds_left)`.

    `report` displays the metrics of a history row. On a terminal, it updates a progress bar. If the
    output is a file, a pipe or a notebook, it prints one line.

    Args:
        num_steps: the total number of steps of the run.
        start: the number of steps that are already completed.
        quiet: whether to display nothing.

    Example:
        >>> with progress(num_steps=20) as report:
        ...     report(10, {"loss": 2.5}, 75.0)
        step 10/20  loss 2.5  1:15 left
    """
    console = Console()
    if quiet:
        yield lambda step, row, seconds_left: None
    elif console.is_terminal:
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling", total=num_steps, completed=start)
            yield lambda step, row, seconds_left: bar.update(
                task, completed=step, description=_format_row(row, seconds_left)
            )
    else:
        yield lambda step, row, seconds_left: print(
            f"step {step}/{num_steps}  {_format_row(row, seconds_left)}", flush=True
        )
