"""Pictures of what people would rather look at than read. Each function writes one PNG."""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 130


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no pyplot state
    return figure


def save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, bbox_inches="tight")  # long token names need room
    return path


def curves(
    path: str | Path,
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    title: str,
    xlabel: str = "step",
    ylabel: str = "loss (nats)",
) -> Path:
    """Lines over a common axis: `{label: (x, y)}`. Labels that contain "held-out" get markers."""
    figure = new_figure(7, 4)
    axes = figure.subplots()
    for label, (x, y) in series.items():
        held_out = "held-out" in label
        axes.plot(x, y, label=label, marker="o" if held_out else None, markersize=4,
                  linewidth=1.6 if held_out else 1.0, alpha=1.0 if held_out else 0.7)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return save(figure, path)


def positions(path: str | Path, tables: Mapping[str, np.ndarray]) -> Path:
    """Position encodings `[positions, dimensions]`: a column per position, a row per dimension."""
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
) -> Path:
    """Attention weights `[T, S]` side by side: row `t` shows where token `t` looks, in its own text
    or, in cross-attention, in `sources`."""
    seen = tokens if sources is None else sources
    width, height = (max(4.0, 0.24 * len(words) + 1.6) for words in (seen, tokens))
    figure = new_figure(width * len(maps), height + 0.5)
    figure.suptitle(title)
    for axes, (name, weights) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items()):
        axes.imshow(np.asarray(weights), cmap="viridis", vmin=0)
        axes.set_xticks(range(len(seen)), seen, rotation=90, fontsize=7)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
        axes.set(title=name, xlabel="sees (key)", ylabel="token (query)")
    return save(figure, path)


def label_efficiency(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]],
    *,
    title: str,
    chance: float | None = None,
    ylabel: str = "accuracy (%)",
) -> Path:
    """A score over the number of labels, a panel a model and a line a recipe with its deviation
    over seeds as a band. Labels that contain "scratch" are dashed.

    Args:
        panels: `{model: {recipe: (labels, mean score, standard deviation)}}`, in shares of 1.
        chance: score of the commonest class, drawn as a dotted line.
        ylabel: what the score is.
    """
    figure = new_figure(5.2 * len(panels) + 1.2, 4.2)
    figure.suptitle(title)
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    recipes = list(dict.fromkeys(recipe for lines in panels.values() for recipe in lines))
    for axes, (name, lines) in zip(grid, panels.items()):
        for recipe, (labels, mean, deviation) in lines.items():
            mean, deviation = 100 * np.asarray(mean), 100 * np.nan_to_num(deviation)
            color = f"C{recipes.index(recipe) % 10}"
            axes.plot(labels, mean, label=recipe, color=color, marker="o", markersize=4,
                      linestyle="--" if "scratch" in recipe else "-")
            axes.fill_between(labels, mean - deviation, mean + deviation, color=color, alpha=0.15,
                              linewidth=0)
        if chance is not None:
            axes.axhline(100 * chance, color="grey", linestyle=":", label="commonest class")
        axes.set_xscale("log", base=2)
        ticks = sorted({n for labels, *_ in lines.values() for n in labels})
        axes.set_xticks(ticks, [f"{n:,}" for n in ticks], rotation=90 if len(ticks) > 8 else 0)
        axes.set_xticks([], minor=True)
        axes.set(title=name, xlabel="labelled examples")
        axes.grid(alpha=0.25)
    grid[0].set_ylabel(ylabel)
    grid[-1].legend(*_legend(grid), frameon=False, fontsize=8, loc="center left",
                    bbox_to_anchor=(1, 0.5))
    return save(figure, path)


def _legend(grid: Sequence) -> tuple[list, list[str]]:
    """Every label of all panels once."""
    found = {label: handle for axes in grid
             for handle, label in zip(*axes.get_legend_handles_labels())}
    return list(found.values()), list(found)


def confusion(
    path: str | Path, table: np.ndarray, names: Sequence[str], *, title: str
) -> Path:
    """Counts `[C, C]`, true classes down and predicted ones across, shaded by their share of the
    row. Of more than 8 classes only the diagonal has its share in figures, and zeros are left out.
    """
    table = np.asarray(table)
    C = len(names)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    longest = max(map(len, names))
    upright = longest * C > 40
    margin = 0.09 * longest
    few = C <= 8
    cell = (0.9, 0.62) if few else (0.5, 0.4)
    wide = max(cell[0], 0 if upright else 0.1 * longest)
    figure = new_figure(2.0 + margin + wide * C, 1.4 + margin * upright + cell[1] * C)
    axes = figure.subplots()
    image = axes.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i, j in np.ndindex(C, C):
        figures = f"{table[i, j]:,}" if few or table[i, j] else ""
        figures += f"\n{100 * share[i, j]:.0f} %" if few or i == j else ""
        axes.text(j, i, figures, ha="center", va="center", fontsize=10 if few else 8,
                  color="white" if share[i, j] > 0.5 else "black")
    axes.set_xticks(range(C), names, rotation=90 if upright else 0)
    axes.set_yticks(range(C), names)
    axes.tick_params(length=0)
    right = f"{100 * np.trace(table) / max(table.sum(), 1):.1f} % right"
    axes.set(title=f"{title}\n{right} of {table.sum():,}", xlabel="predicted class",
             ylabel="true class")
    bar = figure.colorbar(image, ax=axes, aspect=32, pad=0.02,
                          format=lambda x, _: f"{100 * x:.0f} %")
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)
    return save(figure, path)


def calibration(path: str | Path, found: Mapping[str, np.ndarray], *, title: str) -> Path:
    """The reliability diagram of `evaluate.calibration`: how often the chosen class is right, by
    the probability it was given, and how many examples are in each bin."""
    accuracy, count = np.asarray(found["accuracy"]), np.asarray(found["count"])
    bins = len(count)
    edges = np.arange(bins) / bins
    figure = new_figure(5, 5.6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.bar(edges, np.nan_to_num(accuracy), width=1 / bins, align="edge", edgecolor="white",
             label="observed")
    axes.plot([0, 1], [0, 1], color="black", linestyle=":", label="perfectly calibrated")
    axes.set(title=f"{title}\nexpected calibration error {100 * found['ece']:.1f} %",
             ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    below.bar(edges, count, width=1 / bins, align="edge", edgecolor="white", color="grey")
    below.set(xlabel="probability of the chosen class", ylabel="examples")
    return save(figure, path)


def trainable_specs(
    path: str | Path,
    found: Mapping[str, tuple[float, float, float]],
    *,
    title: str,
    ylabel: str,
) -> Path:
    """What training ever fewer parameters costs: `{recipe: (share trained, mean score, standard
    deviation)}`, shares on a log axis."""
    figure = new_figure(7.5, 4.6)
    axes = figure.subplots()
    for k, (share, mean, deviation) in enumerate(found.values()):
        axes.errorbar(100 * share, mean, np.nan_to_num(deviation), marker="o", capsize=4,
                      color=f"C{k % 10}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.12, y=0.15)
    axes.set(title=title, xlabel="share of the parameters that trains (%)", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    figure.draw_without_rendering()  # the layout, which the labels' places depend on
    label(axes, {name: (100 * share, mean) for name, (share, mean, _) in found.items()},
           [(100 * share, mean + sign * np.nan_to_num(deviation))
            for share, mean, deviation in found.values() for sign in np.linspace(-1, 1, 9)])
    return save(figure, path)


def label(axes, points: Mapping[str, tuple[float, float]], ink: Sequence[tuple]) -> None:
    """Writes each name near its point, at the first place that hides no other name and no `ink`;
    where all places do, at the one that hides least."""
    ink = axes.transData.transform(ink)
    taken: list = []
    for name, point in points.items():
        tried = []
        for distance, (dx, dy) in itertools.product((8, 22), itertools.product((1, -1, 0),
                                                                               (0, 1, -1))):
            text = axes.annotate(
                name, point, (distance * dx, distance * dy), textcoords="offset points",
                fontsize=9, ha=("center", "left", "right")[dx], va="center",
                arrowprops={"arrowstyle": "-", "color": "grey", "linewidth": 0.5,
                            "shrinkB": 3} if distance > 8 else None)
            box = text.get_window_extent().padded(2)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            hidden = (sum(box.overlaps(other) for other in taken) + int(box.count_contains(ink))
                      + (not inside))
            tried.append((hidden, len(tried), text, box))
            if not hidden:
                break
        *_, best, box = min(tried, key=lambda place: place[:2])
        taken.append(box)
        for *_, text, _ in tried:
            if text is not best:
                text.remove()


def costs(path: str | Path, found: Mapping[str, Mapping[str, float]], *, title: str) -> Path:
    """Bars of relative costs: `{recipe: {what: share}}`, with the share above each bar."""
    kinds = list(next(iter(found.values())))
    figure = new_figure(2 + 1.25 * len(found), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        shares = [row[kind] for row in found.values()]
        bars = axes.bar(np.arange(len(found)) + (k - (len(kinds) - 1) / 2) * width, shares, width,
                        label=kind)
        axes.bar_label(bars, [f"{x:.2f}" if x >= 0.005 else f"{x:.1g}" for x in shares],
                       fontsize=7, padding=2)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(title=title, ylabel=f"relative to {next(iter(found))}")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return save(figure, path)


def plans(path: str | Path, found: Mapping[str, Mapping[str, float]], *, limit: float,
          title: str) -> Path:
    """Settings side by side, a row each: GiB of memory by kind under the device's limit, and the
    milliseconds of a step by what it needs. `{setting: {"state", "temporary" (GiB),
    "compute", "hbm", "interconnect" (ms)}}`."""
    figure = new_figure(12, 1.6 + 0.5 * len(found))
    left, right = figure.subplots(1, 2, sharey=True)
    rows, start = np.arange(len(found)), np.zeros(len(found))
    for kind in ("state", "temporary"):
        sizes = np.array([row[kind] for row in found.values()])
        left.barh(rows, sizes, left=start, label=kind, height=0.6)
        start = start + sizes
    left.axvline(limit, color="black", linestyle="--", linewidth=1, label="the device has")
    for k, kind in enumerate(("compute", "hbm", "interconnect")):
        right.barh(rows + 0.2 * (k - 1), [row[kind] for row in found.values()], label=kind,
                   height=0.2)
    left.set_yticks(rows, list(found))
    left.invert_yaxis()
    left.set(xlabel="GiB of one device", title=title)
    right.set(xlabel="ms of a step, each if nothing else took time")
    for axes in (left, right):
        axes.grid(alpha=0.25, axis="x")
        axes.legend(frameon=False, fontsize=8)
    return save(figure, path)
