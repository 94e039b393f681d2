"""Pictures of what people would rather look at than read. Each function writes one PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DPI = 130


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)  # no display, no pyplot state
    return figure


def _save(figure: Figure, path: str | Path) -> Path:
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
    figure = _figure(7, 4)
    axes = figure.subplots()
    for label, (x, y) in series.items():
        held_out = "held-out" in label
        axes.plot(x, y, label=label, marker="o" if held_out else None, markersize=4,
                  linewidth=1.6 if held_out else 1.0, alpha=1.0 if held_out else 0.7)
    axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    return _save(figure, path)


def positions(path: str | Path, tables: Mapping[str, np.ndarray]) -> Path:
    """Position encodings `[positions, dimensions]`: a column per position, a row per dimension."""
    figure = _figure(6.5 * len(tables), 4.4)
    for axes, (title, table) in zip(np.atleast_1d(figure.subplots(1, len(tables))), tables.items()):
        limit = np.abs(table).max()
        image = axes.imshow(np.asarray(table).T, aspect="auto", cmap="RdBu", vmin=-limit,
                            vmax=limit, interpolation="nearest")
        axes.set(title=title, xlabel="position", ylabel="dimension")
        figure.colorbar(image, ax=axes, shrink=0.8)
    return _save(figure, path)


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
    figure = _figure(width * len(maps), height + 0.5)
    figure.suptitle(title)
    for axes, (name, weights) in zip(np.atleast_1d(figure.subplots(1, len(maps))), maps.items()):
        axes.imshow(np.asarray(weights), cmap="viridis", vmin=0)
        axes.set_xticks(range(len(seen)), seen, rotation=90, fontsize=7)
        axes.set_yticks(range(len(tokens)), tokens, fontsize=7)
        axes.set(title=name, xlabel="sees (key)", ylabel="token (query)")
    return _save(figure, path)


def label_efficiency(
    path: str | Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float], Sequence[float]]]],
    *,
    title: str,
    chance: float,
) -> Path:
    """Accuracy over the number of labels, a panel a model and a line a recipe.

    Args:
        panels: `{model: {recipe: (labels, mean accuracy, standard deviation)}}`, in shares of 1.
        chance: accuracy of the commonest class, drawn as a dotted line.
    """
    figure = _figure(5.2 * len(panels), 4.2)
    figure.suptitle(title)
    grid = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for axes, (name, lines) in zip(grid, panels.items()):
        for recipe, (labels, mean, deviation) in lines.items():
            axes.errorbar(labels, 100 * np.asarray(mean), 100 * np.asarray(deviation),
                          label=recipe, marker="o", markersize=4, capsize=3)
        axes.axhline(100 * chance, color="grey", linestyle=":", label="commonest class")
        axes.set_xscale("log", base=2)
        axes.set_xticks(next(iter(lines.values()))[0],
                        [str(n) for n in next(iter(lines.values()))[0]])
        axes.set(title=name, xlabel="labelled examples", ylabel="accuracy (%)")
        axes.grid(alpha=0.25)
    grid[0].legend(frameon=False, fontsize=8)
    return _save(figure, path)


def confusion(
    path: str | Path, table: np.ndarray, names: Sequence[str], *, title: str
) -> Path:
    """Counts `[C, C]`, true classes down and predicted ones across, shaded by their share of the
    row."""
    table = np.asarray(table)
    C = len(names)
    share = table / np.maximum(table.sum(1, keepdims=True), 1)
    longest = max(map(len, names))
    figure = _figure(2.2 + 0.09 * longest + 0.62 * C, 1.6 + 0.09 * longest + 0.5 * C)
    axes = figure.subplots()
    axes.imshow(share, vmin=0, vmax=1, cmap="Blues", aspect="auto")
    for i in range(C):
        for j in range(C):
            below = f"\n{100 * share[i, j]:.0f} %" if C <= 8 else ""
            axes.text(j, i, f"{table[i, j]:,}{below}", ha="center", va="center",
                      fontsize=9 if C <= 8 else 6,
                      color="white" if share[i, j] > 0.6 else "black")
    axes.set_xticks(range(C), names, rotation=90 if longest * C > 40 else 0)
    axes.set_yticks(range(C), names)
    axes.set(title=title, xlabel="predicted", ylabel="true")
    return _save(figure, path)


def calibration(path: str | Path, found: Mapping[str, np.ndarray], *, title: str) -> Path:
    """The reliability diagram of `evaluate.calibration`: how often the chosen class is right, by
    the probability it was given, and how many examples are in each bin."""
    accuracy, count = np.asarray(found["accuracy"]), np.asarray(found["count"])
    bins = len(count)
    edges = np.arange(bins) / bins
    figure = _figure(5, 5.6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    axes.bar(edges, np.nan_to_num(accuracy), width=1 / bins, align="edge", edgecolor="white",
             label="observed")
    axes.plot([0, 1], [0, 1], color="grey", linestyle=":", label="perfectly calibrated")
    axes.set(title=f"{title}\nexpected calibration error {100 * found['ece']:.1f} %",
             ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(frameon=False, loc="upper left")
    below.bar(edges, count, width=1 / bins, align="edge", edgecolor="white", color="grey")
    below.set(xlabel="probability of the chosen class", ylabel="examples")
    return _save(figure, path)


def recipes(
    path: str | Path,
    found: Mapping[str, tuple[float, float, float]],
    *,
    title: str,
    ylabel: str,
) -> Path:
    """What training ever fewer parameters costs: `{recipe: (share trained, mean score, standard
    deviation)}`, shares on a log axis."""
    figure = _figure(7, 4.2)
    axes = figure.subplots()
    for k, (recipe, (share, mean, deviation)) in enumerate(found.items()):
        axes.errorbar(100 * share, mean, np.nan_to_num(deviation), marker="o", capsize=4,
                      color=f"C{k % 10}")
        axes.annotate(recipe, (100 * share, mean), xytext=(7, 5), textcoords="offset points",
                      color=f"C{k % 10}", fontsize=9)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.margins(x=0.18, y=0.15)
    axes.set(title=title, xlabel="share of the parameters that trains (%)", ylabel=ylabel)
    axes.grid(alpha=0.25)
    return _save(figure, path)


def costs(path: str | Path, found: Mapping[str, Mapping[str, float]], *, title: str) -> Path:
    """Bars of relative costs: `{recipe: {what: share}}`, with the share above each bar."""
    kinds = list(next(iter(found.values())))
    figure = _figure(2 + 1.25 * len(found), 4.2)
    axes = figure.subplots()
    width = 0.8 / len(kinds)
    for k, kind in enumerate(kinds):
        shares = [row[kind] for row in found.values()]
        bars = axes.bar(np.arange(len(found)) + (k - (len(kinds) - 1) / 2) * width, shares, width,
                        label=kind)
        axes.bar_label(bars, [f"{x:.2f}" if x >= 0.005 else f"{x:.0e}" for x in shares],
                       fontsize=7, padding=2)
    axes.set_xticks(range(len(found)), list(found))
    axes.set(title=title, ylabel=f"relative to {next(iter(found))}")
    axes.margins(y=0.12)
    axes.legend(frameon=False)
    return _save(figure, path)
