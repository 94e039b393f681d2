"""Figures of the studies: panels of lines, bars, points and images, and loss surfaces.

A panel has a `width` in inches and a method `draw(axes)`; `save_panels` draws panels in a grid.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transformer_jax.report import plots


class Line(NamedTuple):
    """A line, with an optional band of ± `spread` around it."""

    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] | None = None
    color: str | None = None
    dashed: bool = False
    markers: bool = False


class Lines(NamedTuple):
    """A panel of lines by label; `vertical` is (x, label) of a dotted vertical line."""

    lines: Mapping[str, Line]
    xlabel: str = "step"
    ylabel: str = "loss (nats)"
    xscale: str = "linear"
    yscale: str = "linear"
    ylim: tuple[float, float] | None = None
    vertical: tuple[float, str] | None = None
    width: float = 5.2

    def draw(self, axes) -> None:
        for k, (label, line) in enumerate(self.lines.items()):
            color = line.color or f"C{k % 10}"
            axes.plot(line.x, line.y, label=label, color=color,
                      marker="o" if line.markers else None, markersize=4,
                      linestyle="--" if line.dashed else "-")
            if line.spread is not None:
                y, spread = np.asarray(line.y), np.nan_to_num(np.asarray(line.spread))
                axes.fill_between(line.x, y - spread, y + spread, color=color, alpha=0.15,
                                  linewidth=0)
        if self.vertical:
            axes.axvline(self.vertical[0], color="gray", linestyle=":", label=self.vertical[1])
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel, xscale=self.xscale, yscale=self.yscale)
        ticks = sorted({int(x) for line in self.lines.values() if line.markers for x in line.x})
        if self.xscale == "log" and ticks:
            axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
            axes.set_xticks([], minor=True)
        if self.ylim:
            axes.set_ylim(*self.ylim)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False, fontsize=8)


class Bars(NamedTuple):
    """A panel of grouped bars: label -> heights and half lengths of the error bars, one per group.

    `chance` is the chance accuracy of each group, and `format` that of the value above each bar.
    """

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
        centers = np.arange(len(self.groups))
        for k, (label, values) in enumerate(self.values.items()):
            x = centers + (k - (len(self.values) - 1) / 2) * width
            spread = None if self.spread is None else np.nan_to_num(self.spread[label])
            bars = axes.bar(x, values, width, yerr=spread, label=label, capsize=2,
                            color=self.colors and self.colors[label], error_kw={"linewidth": 0.8})
            axes.bar_label(bars, [self.format.format(value) for value in values], fontsize=7,
                           padding=2)
        for i, chance in enumerate(() if self.chance is None else self.chance):
            axes.plot([i - 0.46, i + 0.46], [chance] * 2, color="black", linestyle=":",
                      linewidth=1, label=None if i else "chance")
        rotate = sum(map(len, self.groups)) > 12 * self.width
        axes.set_xticks(centers, self.groups, rotation=35 if rotate else 0,
                        ha="right" if rotate else "center")
        axes.set(ylabel=self.ylabel)
        # Space for the legend above the bars.
        axes.margins(y=0.1 + 0.06 * (len(self.values) if len(self.values) < 4 else 3))
        axes.grid(alpha=0.25, axis="y")
        axes.set_axisbelow(True)
        if len(self.values) > 1 or self.chance is not None:
            axes.legend(frameon=False, fontsize=8, ncols=1 if len(self.values) < 4 else 2)


class Points(NamedTuple):
    """A panel of groups of points: name of a group -> (points [n, 2], n labels of the points)."""

    groups: Mapping[str, tuple[np.ndarray, Sequence[str]]]
    xlabel: str = ""
    ylabel: str = ""
    width: float = 5.6

    def draw(self, axes) -> None:
        for k, (group, (points, texts)) in enumerate(self.groups.items()):
            axes.scatter(*np.asarray(points).T, s=10, color=f"C{k % 10}", label=group)
            for point, text in zip(points, texts):
                axes.annotate(text, point, (3, 2), textcoords="offset points", fontsize=7,
                              color=f"C{k % 10}")
        axes.set(xticks=[], yticks=[], xlabel=self.xlabel, ylabel=self.ylabel)
        axes.margins(0.1)
        axes.legend(frameon=False, fontsize=8)


class NamedPoints(NamedTuple):
    """A panel of points with error bars: name -> (x, y, half length of the error bar)."""

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

    def draw_names(self, axes) -> None:
        """Draws the names without overlap; call it after the layout of the figure is computed."""
        error_bars = [(x, y + sign * np.nan_to_num(spread)) for x, y, spread in self.points.values()
                      for sign in np.linspace(-1, 1, 9)]
        plots.label(axes, {name: (x, y) for name, (x, y, _) in self.points.items()}, error_bars)


class Image(NamedTuple):
    """A heat map of a matrix [rows, columns]; if it has negative values, 0 is white."""

    values: np.ndarray
    xlabel: str = ""
    ylabel: str = ""
    width: float = 4.4

    def draw(self, axes) -> None:
        has_negative = np.min(self.values) < 0
        limit = np.abs(self.values).max()
        image = axes.imshow(self.values, aspect="auto", interpolation="nearest",
                            cmap="RdBu" if has_negative else "viridis",
                            vmin=-limit if has_negative else 0, vmax=limit)
        axes.set(xlabel=self.xlabel, ylabel=self.ylabel)
        axes.figure.colorbar(image, ax=axes, shrink=0.8)


def save_panels(
    path: Path, panels: Mapping[str, Any], *, title: str, num_columns: int = 3
) -> Path:
    """Saves a figure of panels (title -> panel) in a grid with up to `num_columns` in a row."""
    values = list(panels.values())
    num_columns = min(num_columns, len(values))
    num_rows = -(-len(values) // num_columns)
    widths = [max(panel.width for panel in values[i::num_columns]) for i in range(num_columns)]
    figure = plots.new_figure(sum(widths), 4.1 * num_rows + 0.3 * (1 + title.count("\n")))
    figure.suptitle(title)
    grid = figure.subplots(num_rows, num_columns, squeeze=False, width_ratios=widths).ravel()
    for axes, (name, panel) in zip(grid, panels.items()):
        panel.draw(axes)
        axes.set_title(name)
    for axes in grid[len(values):]:
        axes.set_axis_off()
    figure.draw_without_rendering()  # computes the layout
    for axes, panel in zip(grid, values):
        if isinstance(panel, NamedPoints):
            panel.draw_names(axes)
    return plots.save(figure, path)


def save_surfaces(
    path: Path, landscapes: Mapping[str, np.ndarray], span: float, *, title: str, limit: float
) -> Path:
    """Saves surface plots of losses [g, g] on a grid from -span to span, all on the same scale.

    Losses above `limit` are clipped to it.
    """
    figure = plots.new_figure(5.4 * len(landscapes), 5.0)
    figure.suptitle(title)
    lowest = min(float(np.nanmin(losses)) for losses in landscapes.values())
    for k, (name, losses) in enumerate(landscapes.items()):
        axes = figure.add_subplot(1, len(landscapes), k + 1, projection="3d")
        coordinates = np.linspace(-span, span, len(losses))
        clipped = np.minimum(np.nan_to_num(losses, nan=limit, posinf=limit), limit)
        axes.plot_surface(*np.meshgrid(coordinates, coordinates), clipped, cmap="viridis",
                          vmin=lowest, vmax=limit, linewidth=0.1, edgecolor="black",
                          rcount=len(coordinates), ccount=len(coordinates))
        axes.set(title=name, xlabel="direction 1", ylabel="direction 2", zlim=(lowest - 0.1, limit))
        axes.set_zlabel("loss (nats)")
        axes.view_init(28, -60)
    return plots.save(figure, path)
