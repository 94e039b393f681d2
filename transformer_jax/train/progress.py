"""One line that says how training goes: a live bar on a terminal, plain lines anywhere else."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

Report = Callable[[int, dict[str, float], float | None], None]


def duration(seconds: float) -> str:
    """75 -> "1:15", 3700 -> "1:01:40"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _describe(row: dict[str, float], left: float | None) -> str:
    """For example: loss 2.313  1,024 tokens/s  0:42 left."""
    parts = [
        f"{name.replace('_', ' ')} {value:.4g}"
        for name, value in row.items()
        if name == "loss" or name.startswith("eval_")
    ]
    if "tokens_per_second" in row:
        parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    elif "seconds_per_step" in row:
        parts.append(f"{row['seconds_per_step']:.3g} s/step")
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


@contextlib.contextmanager
def progress(num_steps: int, start: int = 0, quiet: bool = False) -> Iterator[Report]:
    """Yields `report(step, row, seconds_left)`, which shows the numbers of a logged row.

    A terminal gets a bar that is redrawn in place. A file, a pipe or a notebook gets a line for
    every report. `quiet` shows nothing.
    """
    console = Console()
    if quiet:
        yield lambda step, row, left: None
    elif console.is_terminal:
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        with Progress(*columns, console=console) as bar:
            task = bar.add_task("compiling", total=num_steps, completed=start)
            yield lambda step, row, left: bar.update(
                task, completed=step, description=_describe(row, left)
            )
    else:
        yield lambda step, row, left: print(
            f"step {step}/{num_steps}  {_describe(row, left)}", flush=True
        )
