"""The report of a run: one HTML page that needs no other files.

A summary of the run is followed by curves, predictions, figures, samples and attention maps of the
model, all results and all settings.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformer_jax import tree
from transformer_jax.errors import USER_ERRORS
from transformer_jax.pretrained import LoadedRun, is_run, load_run
from transformer_jax.report import markup, plots
from transformer_jax.report.outputs import (
    DEFAULT_TEXT,
    attention_figures,
    prediction_table,
    records_table,
    sample,
)
from transformer_jax.report.summary import (
    RunFiles,
    display_name,
    flatten,
    load_outputs,
    load_run_files,
    summary,
)

CURVE_SIZE = (5.2, 3.2)  # inches
# Columns of the history that are not plotted: they are constant, or no metrics of the model.
_HIDDEN = {"step", "seconds", "compilations", "seconds_per_step", "host_share",
           "data_wait_fraction", "skipped"}
_LOSSES = ("loss", "nll", "nats")


def write_report(
    folder: str | Path, out: str | Path | None = None, text: str | None = None
) -> Path:
    """Writes the report of a run and returns its path.

    Supports runs of all recipes, finished or not, including those written by older versions.

    Args:
        folder: the folder of the run.
        out: the HTML file; report.html in the folder if None.
        text: input text for the sample and the attention maps. If None, the first source text of a
            translation run, or `outputs.DEFAULT_TEXT` for other runs.

    Raises:
        FileNotFoundError: the folder has neither results nor events.
        ValueError: results.json or config.json is damaged.
    """
    folder = Path(folder)
    run = load_run_files(folder)
    model, note = _load_model(folder)
    name = folder.resolve().name
    parts = [f"<h1>{markup.escape(name)}</h1>",
             *summary(run, None if model is None else tree.count(model.params)),
             *_sections(run, model, text)]
    if note:
        parts.append(f'<p class="note">{markup.escape(note)}</p>')
    out = folder / "report.html" if out is None else Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(markup.page(name, parts), encoding="utf-8")
    return out


def _load_model(folder: Path) -> tuple[LoadedRun | None, str]:
    """Returns the model of a run, or None with the reason why it cannot be loaded."""
    if not (is_run(folder) and (folder / "checkpoints").is_dir()):
        return None, ""
    try:
        return load_run(folder), ""
    except USER_ERRORS as error:
        return None, f"The model is not shown, because it cannot be loaded: {error}"


def _sections(run: RunFiles, model: LoadedRun | None, text: str | None) -> Iterator[str]:
    for name, rows in run.histories.items():
        before = run.metrics.get("held_out_before") if not name else None
        curves = curve_figures(rows, before if isinstance(before, Mapping) else None)
        yield markup.section(f"Curves: {name}" if name else "Curves", markup.figures(curves))
    for name, rows in _records(run.metrics):
        yield markup.section(name, records_table(rows))
    lines = load_outputs(run.folder)
    yield markup.section("Predictions", prediction_table(lines))
    yield markup.section("Figures", markup.figures(list(_saved_figures(run))))
    if model is not None:
        given = text or next((line["source"] for line in lines if "source" in line), DEFAULT_TEXT)
        yield markup.section("Sample", sample(model, given))
        yield markup.section("Attention, mean over heads",
                             markup.figures(attention_figures(model, given)))
    if run.results is not None:
        yield markup.section(
            "Details",
            markup.folded("All results", markup.key_value_table(flatten(run.metrics))),
            markup.folded("All settings", markup.key_value_table(
                flatten(run.config), markup.format_setting)),
            markup.folded("Versions", markup.key_value_table(run.results["versions"])))


def _records(metrics: Mapping[str, Any]) -> Iterator[tuple[str, list[dict]]]:
    """Yields (title, rows) of the tables in the results, except training histories."""
    for name, value in metrics.items():
        if isinstance(value, list) and value and isinstance(value[0], Mapping) and (
                "step" not in value[0]):
            yield name.replace("_", " ").capitalize(), value


def _saved_figures(run: RunFiles) -> Iterator[markup.Html]:
    """Yields the PNG files of the folder, except the loss if it is among the curves."""
    for path in sorted(run.folder.glob("*.png")):
        if path.stem == "loss" and run.histories:
            continue
        caption = re.sub(r"[_-]+", " ", path.stem)
        yield markup.figure(path.read_bytes(), caption)


# Curves -------------------------------------------------------------------------------------------


def curve_figures(
    rows: Sequence[Mapping[str, float]], before: Mapping[str, float] | None = None
) -> list[markup.Html]:
    """Returns a plot of each metric by step, with the training and the held-out curve together.

    Each metric has a plot of its own, because losses and scores have different scales.

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
    return lambda path: plots.curves(path, series, ylabel="", size=CURVE_SIZE)


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
