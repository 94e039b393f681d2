"""Curves of a run: one plot per metric, because losses and scores have different scales."""

from collections.abc import Callable, Mapping, Sequence

from transformer_jax.report import markup, plots
from transformer_jax.report.summary import display_name

SIZE = (5.2, 3.2)  # inches
# Columns of the history that are not plotted: no metrics of the model, or constant.
_HIDDEN = {"step", "seconds", "compilations", "seconds_per_step", "host_share",
           "data_wait_fraction", "skipped"}
_LOSSES = ("loss", "nll", "nats")


def curve_figures(
    rows: Sequence[Mapping[str, float]], before: Mapping[str, float] | None = None
) -> list[markup.Html]:
    """Returns a plot of each metric by step, with the training and the held-out curve together.

    Args:
        rows: rows of the history; held-out metrics have the prefix "eval_".
        before: held-out metrics before the first step.
    """
    names = {name.removeprefix("eval_") for row in rows for name in row} - _HIDDEN
    if _is_same(rows, "loss", "nll"):
        names -= {"nll"}
    return [markup.plot(_draw(series), f"{display_name(name)}{_unit(name)}")
            for name in sorted(names, key=_order)
            if (series := _series(rows, name, (before or {}).get(name)))]


def _series(rows: Sequence[Mapping], name: str, before: float | None) -> dict[str, tuple]:
    """Returns the label, steps and values of the training and the held-out curve of a metric."""
    training = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    held_out = [(row["step"], row[f"eval_{name}"]) for row in rows
                if row.get(f"eval_{name}") is not None]
    if before is not None and held_out:
        held_out = [(0, before), *held_out]
    found = {"training": training, "held-out": held_out}
    if max(map(len, found.values())) < 2:  # no curve
        return {}
    return {label: tuple(zip(*points)) for label, points in found.items() if points}


def _draw(series: dict[str, tuple]) -> Callable:
    return lambda path: plots.curves(path, series, ylabel="", size=SIZE)


def _unit(name: str) -> str:
    return " (nats)" if name.endswith(_LOSSES) else ""


def _order(name: str) -> tuple:
    """Sort key: the loss, its terms, accuracies, other scores, gradient norm and throughput."""
    kinds = (name == "loss", name.endswith(_LOSSES), "accuracy" in name)
    rank = next((i for i, found in enumerate(kinds) if found), 3)
    return rank + 2 * (name in ("grad_norm", "tokens_per_second")), name


def _is_same(rows: Sequence[Mapping], first: str, second: str) -> bool:
    """Whether two metrics are equal wherever the second is recorded."""
    return all(row[prefix + second] == row.get(prefix + first)
               for row in rows for prefix in ("", "eval_") if prefix + second in row)
