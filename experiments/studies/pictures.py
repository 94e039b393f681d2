"""Pictures of studies: panels of lines, bars, points and images, side by side; surfaces."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.report import plots


class Line(NamedTuple):
    """A line with a band of `spread` on both sides of it."""

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    color: str | None = None
    dashed: bool = False
    points: bool = False


class Lines(NamedTuple):
    """Lines by label. `mark` is a vertical line and what it says."""

    lines: Mapping[str, Line]
    xlabel: str = "step"
    ylabel: str = "loss (nats)"
    xscale: str = "linear"
    yscale: str = "linear"
    ylim: tuple[float, float] | None = None
    mark: tuple[float, str] | None = None
    width: float = 5.2

    def draw(self, axes) -> None:
        for k, (label, line) in enumerate(self.lines.items()):
            color = line.color or f"C{k % 10}"
            axes.plot(line.x, line.y, label=label, color=color, marker="o" if line.points else None,
                      markersize=4, linestyle="--" if line.dashed else "-")
            if line.spread is not None:
                y, spread = np.asarray(line.y), np.nan_to_num(np.asarray(line.spread))
                axes.fill_between(line.x, y - spread, y + spread, color=color, alpha=0.15,
                                  linewidth=0)
        if self.mark:
            axes.axvline(self.mark[0], color="grey", linestyle=":", label=self.mark[1])
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, xscale=self.xscale, yscale=self.yscale)
        if self.xscale == "log" and (x := {int(x) for line in self.lines.values() if line.points
                                           for x in line.x}):
            axes.set_xticks(sorted(x), [f"{n:,}" for n in sorted(x)])
            axes.set_xticks([], minor=True)
        if self.ylim:
            axes.set_ylim(*self.ylim)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)


class Bars(NamedTuple):
    """Groups of bars: `values[label][group]` with deviations. `chance`, by group, is drawn
    across."""

    values: Mapping[str, Sequence[float]]
    groups: Sequence[str]
    spread: Mapping[str, Sequence[float]] | None = None
    chance: Sequence[float] | None = None
    ylabel: str = "accuracy (%)"
    format: str = "{:.0f}"
    colors: Mapping[str, str] | None = None

    @property
    def width(self) -> float:
        return max(len(self.groups) * (0.4 * len(self.values) + 0.3) + 1.0, 4.2)

    def draw(self, axes) -> None:
        width = 0.84 / len(self.values)
        places = np.arange(len(self.groups))
        for k, (label, values) in enumerate(self.values.items()):
            at = places + (k - (len(self.values) - 1) / 2) * width
            spread = None if self.spread is None else np.nan_to_num(self.spread[label])
            bars = axes.bar(at, values, width, yerr=spread, label=label, capsize=2,
                            color=self.colors and self.colors[label], error_kw={"linewidth": 0.8})
            axes.bar_label(bars, [self.format.format(x) for x in values], fontsize=7, padding=2)
        for i, chance in enumerate(() if self.chance is None else self.chance):
            axes.plot([i - 0.46, i + 0.46], [chance] * 2, color="black", linestyle=":",
                      linewidth=1, label=None if i else "chance")
        turned = sum(map(len, self.groups)) > 12 * self.width
        axes.set_xticks(places, self.groups, rotation=35 if turned else 0,
                        ha="right" if turned else "center")
        axes.set(ylabel=self.ylabel)
        axes.margins(y=0.1 + 0.06 * (len(self.values) if len(self.values) < 4 else 3))  # a legend
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        if len(self.values) > 1 or self.chance is not None:
            axes.legend(frameon=False, fontsize=8, ncols=1 if len(self.values) < 4 else 2)


class Points(NamedTuple):
    """Named points of a plane, by group: (points [n, 2], names)."""

    groups: Mapping[str, tuple[np.ndarray, Sequence[str]]]
    xlabel: str = ""
    ylabel: str = ""
    width: float = 5.6

    def draw(self, axes) -> None:
        for k, (group, (points, names)) in enumerate(self.groups.items()):
            axes.scatter(*np.asarray(points).T, s=10, color=f"C{k % 10}", label=group)
            for point, name in zip(points, names):
                axes.annotate(name, point, (3, 2), textcoords="offset points", fontsize=7,
                              color=f"C{k % 10}")
        axes.set(xticks=[], yticks=[], xlabel=self.xlabel, ylabel=self.ylabel)
        axes.margins(0.1)
        axes.legend(frameon=False, fontsize=8)


class Named(NamedTuple):
    """Points with deviations and their names: `{name: (x, y, deviation of y)}`."""

    points: Mapping[str, tuple[float, float, float]]
    xlabel: str = ""
    ylabel: str = "accuracy (%)"
    xscale: str = "linear"
    width: float = 6.6

    def draw(self, axes) -> None:
        for k, (x, y, spread) in enumerate(self.points.values()):
            axes.errorbar(x, y, np.nan_to_num(spread), marker="o", markersize=4, capsize=3,
                          linewidth=0.8, color=f"C{k % 10}")
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, xscale=self.xscale)
        axes.margins(0.12)
        axes.grid(alpha=0.25)
        axes.set_axisbelow(True)

    def finish(self, axes) -> None:
        plots.label(axes, {name: (x, y) for name, (x, y, _) in self.points.items()},
                   [(x, y + sign * np.nan_to_num(spread)) for x, y, spread in self.points.values()
                    for sign in np.linspace(-1, 1, 9)])


class Image(NamedTuple):
    """A matrix [rows, columns] in colours, from -limit to limit if both signs are in it."""

    values: np.ndarray
    xlabel: str = ""
    ylabel: str = ""
    width: float = 4.4

    def draw(self, axes) -> None:
        signed = np.min(self.values) < 0
        limit = np.abs(self.values).max()
        image = axes.imshow(self.values, aspect="auto", interpolation="nearest",
                            cmap="RdBu" if signed else "viridis", vmin=-limit if signed else 0,
                            vmax=limit)
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.figure.colorbar(image, ax=axes, shrink=0.8)


def show(path: Path, panels: Mapping[str, Any], *, title: str, columns: int = 3) -> Path:
    """Panels by title, `columns` in a row."""
    kinds = list(panels.values())
    columns = min(columns, len(kinds))
    rows = -(-len(kinds) // columns)
    widths = [max(p.width for p in kinds[i::columns]) for i in range(columns)]
    figure = plots.new_figure(sum(widths), 4.1 * rows + 0.3 * (1 + title.count("\n")))
    figure.suptitle(title)
    grid = figure.subplots(rows, columns, squeeze=False, width_ratios=widths).ravel()
    for axes, (name, panel) in zip(grid, panels.items()):
        panel.draw(axes)
        axes.set_title(name)
    for axes in grid[len(kinds):]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # the layout, which the places of names depend on
    for axes, panel in zip(grid, kinds):
        if isinstance(panel, Named):
            panel.finish(axes)
    return plots.save(figure, path)


def surfaces(path: Path, found: Mapping[str, np.ndarray], span: float, *, title: str,
             limit: float) -> Path:
    """Losses over a plane, `[g, g]` for -span ... span in both directions, all on one scale; what
    is above `limit` is cut off there."""
    figure = plots.new_figure(5.4 * len(found), 5.0)
    figure.suptitle(title)
    least = min(float(np.nanmin(x)) for x in found.values())
    for k, (name, losses) in enumerate(found.items()):
        axes = figure.add_subplot(1, len(found), k + 1, projection="3d")
        at = np.linspace(-span, span, len(losses))
        plane = np.meshgrid(at, at)
        shown = np.minimum(np.nan_to_num(losses, nan=limit, posinf=limit), limit)
        axes.plot_surface(*plane, shown, cmap="viridis", vmin=least, vmax=limit, linewidth=0.1,
                          edgecolor="black", rcount=len(at), ccount=len(at))
        axes.set(title=name, xlabel="direction 1", ylabel="direction 2", zlim=(least - 0.1, limit))
        axes.set_zlabel("loss (nats)")
        axes.view_init(28, -60)
    return plots.save(figure, path)
