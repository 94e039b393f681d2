"""Plots of runs, models and plans. Each plot function saves one PNG and returns its path.

Matplotlib is imported when the first plot is drawn, and used without a display or pyplot.
"""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 130


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of the given size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(figure: "Figure", path: str | Path) -> Path:
    """Saves a figure, cropped to its content, and returns the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        # Characters of tokens that are missing in the font are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(path, dpi=DPI, bbox_inches="tight")
    return path


def curves(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str = "",
    xlabel: str = "step",
    ylabel: str = "loss (nats)",
    size: tuple[float, float] = (7, 4),
) -> Path:
    """Plots lines over a common x axis: label -> (x, y).

    Lines with "held-out" in the label, and short lines, get markers. `size` is in inches.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = curves(f"{folder}/loss.png", {"training": ([1, 2, 3], [5.0, 4.2, 4.0])})
        ...     path.is_file()
        True
    """
    figure = new_figure(*size)
    axes = figure.subplots()
    for label, (x, y) in series.items():
        held_out = "held-out" in label
        axes.plot(x, y, label=label, marker="o" if held_out or len(x) < 3 else None, markersize=4,
                  linewidth=1.6 if held_out else 1.0, alpha=1.0 if held_out else 0.7)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.25)
    if len(series) > 1:
        axes.legend(frameon=False)
    return save(figure, path)


def positions(path: str | Path, tables: Mapping[str, np.ndarray]) -> Path:
    """Plots position embeddings, title -> `[max_length, D]`: a column per position, a row per
    dimension.
    """
    figure = new_figure(6.5 * len(tables), 4.4)
    for axes, (title, table) in zip(np.atleast_1d(figure.subplots(1, len(tables))), tables.items()):
        limit = np.abs(table).max()
        image = axes.imshow(np.asarray(table).T, aspect="auto", cmap="RdBu", vmin=-limit,
                            vmax=limit, interpolation="nearest")
        axes.set(title=title, xlabel="position", ylabel="dimension")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return save(figure, path)


def attention(
    path: str | Path,
    maps: Mapping[str, np.ndarray],
    tokens: Sequence[str],
    sources: Sequence[str] | None = None,
    *,
    title: str = "",
    cell_size: float = 0.24,
) -> Path:
    """Plots attention weights, title -> `[T, S]`: row t has the weights of query token t over the
    keys.

    `tokens` are the T query tokens, and `sources` the S key tokens of cross-attention, None for
    self-attention. `cell_size` is the width and height of one weight in inches.
    """
    keys = tokens if sources is None else sources
    width, height = (max(4.0, cell_size * len(words) + 1.6) for words in (keys, tokens))
    figure = new_figure(width * len(maps), height + 0.5)
    figure.suptitle(title)
    for axes, (name, weights) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items()):
        axes.imshow(np.asarray(weights), cmap="viridis", vmin=0)
        axes.set_xticks(range(len(keys)), keys, rotation=90, fontsize=7)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
        axes.set(title=name, xlabel="key", ylabel="query")
    return save(figure, path)


def label_efficiency(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]],
    *,
    title: str,
    chance: float | None = None,
    ylabel: str = "accuracy (%)",
) -> Path:
    """Plots a score over the number of labeled examples: one panel per model, one line per spec.

    `panels` has model -> trainable spec -> (numbers of examples, mean scores, standard deviations
    over seeds, drawn as bands), scores as fractions of 1. Lines with "scratch" in the label are
    dashed. `chance` is the score of the majority class, drawn as a dotted line.
    """
    figure = new_figure(5.2 * len(panels) + 1.2, 4.2)
    figure.suptitle(title)
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    specs = list(dict.fromkeys(spec for lines in panels.values() for spec in lines))
    for axes, (name, lines) in zip(grid, panels.items()):
        for spec, (labels, mean, deviation) in lines.items():
            mean, deviation = 100 * np.asarray(mean), 100 * np.nan_to_num(deviation)
            color = f"C{specs.index(spec) % 10}"
            axes.plot(labels, mean, label=spec, color=color, marker="o", markersize=4,
                      linestyle="--" if "scratch" in spec else "-")
            axes.fill_between(labels, mean - deviation, mean + deviation, color=color, alpha=0.15,
                              linewidth=0)
        if chance is not None:
            axes.axhline(100 * chance, color="grey", linestyle=":", label="majority class")
        axes.set_xscale("log", base=2)
        ticks = sorted({n for labels, *_ in lines.values() for n in labels})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=90 if len(ticks) > 8 else 0)
        axes.set_xticks([], minor=True)
        axes.set(title=name, xlabel="labeled examples")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel(ylabel)
    grid[-1].legend(*_unique_legend(grid), frameon=False, fontsize=8, loc="center left",
                    bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def _unique_legend(grid: Sequence) -> tuple[list, list[str]]:
    """Returns the handles and labels of all panels, each label once."""
    found = {label: handle for axes in grid
             for handle, label in zip(*axes.get_legend_handles_labels())}
    return list(found.values()), list(found)


def confusion(
    path: str | Path, table: np.ndarray, names: Sequence[str], *, title: str
) -> Path:
    """Plots a confusion matrix of counts `[C, C]`, with a row for each true class, shaded by
    fraction.

    With more than 8 classes, percentages are shown only on the diagonal, and zeros are omitted.
    """
    table = np.asarray(table)
    C = len(names)
    fraction = table / np.maximum(table.sum(1, keepdims=True), 1)
    longest = max(map(len, names))
    is_rotated = longest * C > 40
    margin = 0.09 * longest
    has_few_classes = C <= 8
    cell = (0.9, 0.62) if has_few_classes else (0.5, 0.4)
    cell_width = max(cell[0], 0 if is_rotated else 0.1 * longest)
    figure = new_figure(2.0 + margin + cell_width * C, 1.4 + margin * is_rotated + cell[1] * C)
    axes = figure.subplots()
    image = axes.imshow(fraction, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, j in np.ndindex(C, C):
        text = f"{table[i, j]:,}" if has_few_classes or table[i, j] else ""
        text += f"\n{100 * fraction[i, j]:.0f} %" if has_few_classes or i == j else ""
        axes.text(j, i, text, ha="center", va="center", fontsize=10 if has_few_classes else 8,
                  color="white" if fraction[i, j] > 0.5 else "black")
    axes.set_xticks(range(C), names, rotation=90 if is_rotated else 0)
    axes.set_yticks(range(C), names)
    axes.tick_params(length=0)
    correct = f"{100 * np.trace(table) / max(table.sum(), 1):.1f} % correct"
    axes.set(title=f"{title}\n{correct} of {table.sum():,}", xlabel="predicted class",
             ylabel="true class")
    bar = figure.colorbar(image, ax=axes, aspect=32, pad=0.02,
                          format=lambda x, _: f"{100 * x:.0f} %")
    bar.set_label("fraction of the true class")
    bar.outline.set_visible(False)
    return save(figure, path)


def calibration(path: str | Path, found: Mapping[str, np.ndarray], *, title: str) -> Path:
    """Plots a reliability diagram of the result of `metrics.calibration`: accuracy and number of
    examples by predicted probability.
    """
    accuracy, count = np.asarray(found["accuracy"], float), np.asarray(found["count"])
    bins = len(count)
    edges = np.arange(bins) / bins
    figure = new_figure(5, 5.6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.bar(edges, np.nan_to_num(accuracy), width=1 / bins, align="edge", edgecolor="white",
             label="observed")
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", label="perfect calibration")
    axes.set(title=f"{title}\nexpected calibration error {100 * found['ece']:.1f} %",
             ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    below.bar(edges, count, width=1 / bins, align="edge", edgecolor="white", color="grey")
    below.set(xlabel="probability of the predicted class", ylabel="examples")
    return save(figure, path)


def trainable_specs(
    path: str | Path,
    found: Mapping[str, tuple[float, float, float]],
    *,
    title: str,
    ylabel: str,
) -> Path:
    """Plots a score over the fraction of trainable parameters, one point per trainable spec.

    `found` has spec -> (fraction of trainable parameters, mean score, standard deviation).
    """
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    for k, (fraction, mean, deviation) in enumerate(found.values()):
        axes.errorbar(100 * fraction, mean, np.nan_to_num(deviation), marker="o", capsize=4,
                      color=f"C{k % 10}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12, y=0.15)
    axes.set(title=title, xlabel="trainable parameters (% of all)", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    figure.draw_without_rendering()  # computes the layout, on which label positions depend
    label(axes, {name: (100 * fraction, mean) for name, (fraction, mean, _) in found.items()},
          [(100 * fraction, mean + sign * np.nan_to_num(deviation))
           for fraction, mean, deviation in found.values() for sign in np.linspace(-1, 1, 9)])
    return save(figure, path)


def label(axes, points: Mapping[str, tuple[float, float]], ink: Sequence[tuple]) -> None:
    """Labels points, label -> (x, y), without overlaps; the layout of the figure must be computed.

    Each label gets the first position near its point that lies within the axes and overlaps neither
    another label nor `ink`, points (x, y) of the plot; if there is none, the one with the fewest
    overlaps.
    """
    ink = axes.transData.transform(ink)
    taken: list = []
    for name, point in points.items():
        tried = []
        for distance, (dx, dy) in itertools.product(
                (8, 22), itertools.product((1, -1, 0), (0, 1, -1))):
            text = axes.annotate(
                name, point, (distance * dx, distance * dy), textcoords="offset points",
                fontsize=9, ha=("center", "left", "right")[dx], va="center",
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5,
                            "shrinkB": 3} if distance > 8 else None)
            box = text.get_window_extent().padded(2)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            num_overlaps = (sum(box.overlaps(other) for other in taken)
                            + int(box.count_contains(ink)) + (not inside))
            tried.append((num_overlaps, len(tried), text, box))
            if not num_overlaps:
                break
        *_, best, box = min(tried, key=lambda candidate: candidate[:2])
        taken.append(box)
        for *_, text, _ in tried:
            if text is not best:
                text.remove()


def costs(path: str | Path, found: Mapping[str, Mapping[str, float]], *, title: str) -> Path:
    """Plots bars of costs, spec -> kind -> cost relative to the first spec, with the values above
    them.
    """
    kinds = list(next(iter(found.values())))
    figure = new_figure(2 + 1.25 * len(found), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        values = [row[kind] for row in found.values()]
        bars = axes.bar(np.arange(len(found)) + (k - (len(kinds) - 1) / 2) * width, values, width,
                        label=kind)
        axes.bar_label(bars, [f"{x:.2f}" if x >= 0.005 else f"{x:.1g}" for x in values],
                       fontsize=7, padding=2)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(title=title, ylabel=f"relative to {next(iter(found))}")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return save(figure, path)


def plans(path: str | Path, found: Mapping[str, Mapping[str, float]], *, limit: float,
          title: str) -> Path:
    """Plots the memory and the roofline times of training plans, one row per plan.

    `found` has, by plan, "state" and "temporary" in GiB of one device, and "compute", "hbm" and
    "interconnect" in milliseconds of a step; `limit` is the memory of one device in GiB.
    """
    figure = new_figure(12, 1.6 + 0.5 * len(found))
    left, right = figure.subplots(1, 2, sharey=True)
    rows, start = np.arange(len(found)), np.zeros(len(found))
    for kind in ("state", "temporary"):
        sizes = np.array([row[kind] for row in found.values()])
        left.barh(rows, sizes, left=start, label=kind, height=0.6)
        start = start + sizes
    left.axvline(limit, color="black", linestyle="--", linewidth=1, label="device memory")
    for k, kind in enumerate(("compute", "hbm", "interconnect")):
        right.barh(rows + 0.2 * (k - 1), [row[kind] for row in found.values()], label=kind,
                   height=0.2)
    left.set_yticks(rows, list(found))
    left.invert_yaxis()
    left.set(xlabel="memory of one device (GiB)", title=title)
    right.set(xlabel="step time limited by one resource alone (ms)")
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="x")
        axes.legend(frameon=False, fontsize=8)
    return save(figure, path)
