"""Plots: control curves, weight maps, training curves, reward-model reports, lengths, layer norms.

`grid` makes the panels of a picture, `plot` draws values with their intervals, and `save` writes the file.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lora_align.metrics.intervals import Estimate

INK, PALE, BROKEN, LINE = "#1f4e9c", "#b9c7e0", "#c2410c", "#bbbbbb"
COLOURS = "YlGnBu"
BOLD, THIN = 2.2, 1.2  # widths of lines

Grid = Sequence[Sequence[float]]  # [weights of the second preference, weights of the first]
Values = Sequence[float] | Sequence[Estimate]


def grid(
    count: int, size: tuple[float, float], columns: int = 4, margin: tuple[float, float] = (0.4, 0.0), **shared: Any
) -> tuple[Figure, list[Axes]]:
    """Return a picture and its panels, row by row.

    `size` is the size of a panel in inches; `shared` is passed to `subplots`.
    """
    columns = min(columns, count)
    rows = -(-count // columns)
    picture = Figure(figsize=(size[0] * columns + margin[0], size[1] * rows + margin[1]), layout="constrained")
    panels = list(picture.subplots(rows, columns, squeeze=False, **shared).flat)
    for panel in panels[count:]:
        panel.set_visible(False)
    for panel in panels[max(count - columns, 0) : count]:  # the lowest visible panel of each column
        panel.tick_params(labelbottom=True)
    return picture, panels[:count]


def plot(
    panel: Axes, x: Values, y: Values, colour: str = INK, *, width: float = 0.0, marker: str = "", size: float = 4.0,
    dashed: bool = False, label: str | None = None,
) -> None:  # fmt: skip
    """Draw y over x: as a line if `width` is given, else as points.

    The interval of an `Estimate` is a band around the line, or a bar at the point.
    """
    xs, ys = ([one.value if isinstance(one, Estimate) else one for one in values] for values in (x, y))
    style: dict[str, Any] = {"color": colour, "marker": marker, "markersize": size, "label": label}
    if not width:
        lengths_y, lengths_x = _interval_lengths(y), _interval_lengths(x)
        panel.errorbar(xs, ys, lengths_y, lengths_x, linestyle="", ecolor=PALE, elinewidth=1, **style)
        return
    panel.plot(xs, ys, linewidth=width, linestyle="--" if dashed else "-", **style)
    if estimates := [one for one in y if isinstance(one, Estimate)]:
        low, high = [one.low for one in estimates], [one.high for one in estimates]
        panel.fill_between(xs, low, high, color=colour, alpha=0.12, linewidth=0)


def plain(panel: Axes) -> None:
    """Remove the upper and the right edge of a panel, and set the sizes of its text."""
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.title.set_fontsize(10)
    for axis in (panel.xaxis, panel.yaxis):
        axis.label.set_fontsize(9)


def save(picture: Figure, file: Path) -> None:
    """Write a picture; the ending of the file's name gives the format."""
    picture.savefig(file, dpi=150)


def control_curves(
    file: Path,
    weights: Sequence[float],
    curves: Mapping[str, Sequence[Sequence[float]]],
    well_formed: Mapping[str, Sequence[float]],
    columns: int = 4,
) -> None:
    """Plot each preference's own score against its weight.

    `curves` has one row per seed; the rows are pale, their mean is bold. `well_formed` is a dashed line.
    """
    picture, panels = grid(len(curves), (2.35, 2.2), columns, (0.5, 0.35), sharex=True, sharey=True)
    for panel, (name, seeds) in zip(panels, curves.items(), strict=True):
        for seed in seeds if len(seeds) > 1 else ():
            plot(panel, weights, seed, PALE, width=1)
        mean = [sum(column) / len(column) for column in zip(*seeds, strict=True)]
        plot(panel, weights, mean, width=BOLD, marker="o", size=3.5, label="score on its own preference")
        plot(panel, weights, well_formed[name], BROKEN, width=1, dashed=True, label="share well-formed")
        panel.axvline(0, color="#dddddd", linewidth=1, zorder=0)
        panel.grid(axis="y", color="#eeeeee", linewidth=0.8)
        panel.set(title=name, ylim=(-0.02, 1.02))
        plain(panel)
    panels[0].legend(frameon=False, fontsize=7.5, loc="lower right")
    picture.supxlabel("weight", fontsize=9)
    save(picture, file)


def training_curves(file: Path, curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> None:
    """Plot figures, each a list of (step, value): as recorded in pale, smoothed in bold."""
    picture, panels = grid(len(curves), (3.6, 2.8), len(curves), (0.0, 0.0))
    for panel, (name, points) in zip(panels, curves.items(), strict=True):
        steps, values = zip(*points, strict=True)
        plot(panel, steps, values, PALE, width=1)
        plot(panel, steps, _smoothed(values), width=2)
        panel.set(xlabel="step", title=name)
        plain(panel)
    picture.suptitle(title, fontsize=11)
    save(picture, file)


def weight_map(
    file: Path, names: tuple[str, str], weights: tuple[Sequence[float], Sequence[float]], scores: Mapping[str, Grid]
) -> None:
    """Plot one heat map per score over the weights of two preferences. Scores within 0 and 1 use that scale."""
    picture, panels = grid(len(scores), (3.1, 3.3), len(scores), (0.0, 0.0))
    for panel, (score, cells) in zip(panels, scores.items(), strict=True):
        flat = [value for values in cells for value in values if not math.isnan(value)] or [0.0]
        low, high = (0.0, 1.0) if min(flat) >= 0 and max(flat) <= 1 else (min(flat), max(flat))
        panel.imshow(cells, origin="lower", cmap=COLOURS, vmin=low, vmax=high)
        for row, values in enumerate(cells):
            for column, value in enumerate(values):
                colour = "white" if value > low + 0.6 * (high - low) else "black"
                text = "" if math.isnan(value) else f"{value:.2f}"
                panel.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
        for set_ticks, values in zip((panel.set_xticks, panel.set_yticks), weights, strict=True):
            set_ticks(range(len(values)), [f"{weight:g}" for weight in values], fontsize=8)
        panel.set_xlabel(f"weight of {names[0]}", fontsize=9)
        panel.set_ylabel(f"weight of {names[1]}", fontsize=9)
        panel.set_title(score, fontsize=10, pad=8)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    save(picture, file)


def reward_report(file: Path, report: Mapping[str, Any]) -> None:
    """Plot the calibration of each head against ratings or pairs, and the rank correlation between heads."""
    heads = {
        name: figures for name, figures in report["heads"].items() if "calibration" in figures or "chances" in figures
    }
    picture, [*panels, last] = grid(len(heads) + 1, (2.5, 2.5), margin=(0.0, 0.0))
    for panel, (name, figures) in zip(panels, heads.items(), strict=True):
        rated = figures["rated"] > 1
        top = 100 if rated else 1
        predicted, observed = zip(*figures["calibration" if rated else "chances"], strict=True)
        plot(panel, [0, top], [0, top], LINE, width=1)
        plot(panel, predicted, observed, width=2, marker="o")
        labels = ("score", "mean rating") if rated else ("predicted chance of winning", "observed share of wins")
        panel.set(title=name, xlabel=labels[0], ylabel=labels[1])
        plain(panel)
    names = list(report["heads"])
    last.imshow(report["between"], cmap="RdBu_r", vmin=-1, vmax=1)
    last.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    last.set_yticks(range(len(names)), names, fontsize=7)
    last.set_title("rank correlation", fontsize=10)
    save(picture, file)


def lengths(file: Path, bins: Sequence[tuple[int, int, int]], max_length: int, title: str) -> None:
    """Plot a histogram of pair lengths in tokens, with a line where pairs are truncated."""
    picture, [panel] = grid(1, (6.4, 2.8), margin=(0.0, 0.0))
    lows, widths = [low for low, _, _ in bins], [high + 1 - low for low, high, _ in bins]
    panel.bar(lows, [count for _, _, count in bins], width=widths, align="edge", color=INK, edgecolor="white")
    if bins and max_length <= bins[-1][1]:
        panel.axvline(max_length, color=BROKEN, linestyle="--", label=f"max_length {max_length:,}")
        panel.legend(frameon=False, fontsize=8)
    panel.set(xlabel="tokens of a prompt with its longer answer", ylabel="pairs", title=title)
    plain(panel)
    save(picture, file)


def layer_maps(file: Path, places: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """Plot one heat map per update: its norm in every layer and kind of module."""
    kinds = list(dict.fromkeys(kind for norms in places.values() for kind in norms))
    by_layer = [layers for norms in places.values() for layers in norms.values()]
    layers = sorted({layer for norms in by_layer for layer in norms})
    largest = max((norm for norms in by_layer for norm in norms.values()), default=0.0)
    width, height = 0.22 * len(layers) + 1.6, 0.26 * len(kinds) + 0.75
    columns = max(1, int(11 / width))
    picture, panels = grid(len(places), (width, height), columns, (0.6, 0.3), sharex=True, sharey=True)
    for panel, (name, norms) in zip(panels, places.items(), strict=True):
        cells = [[norms.get(kind, {}).get(layer, math.nan) for layer in layers] for kind in kinds]
        shown = panel.imshow(cells, cmap=COLOURS, vmin=0, vmax=largest or 1, aspect="auto")
        panel.set_title(name, fontsize=10)
        step = -(-len(layers) // 16)
        panel.set_xticks(range(0, len(layers), step), ["–" if n < 0 else str(n) for n in layers[::step]], fontsize=7)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    picture.colorbar(shown, ax=panels, label="norm", shrink=0.8)
    picture.supxlabel("layer", fontsize=9)
    save(picture, file)


def _interval_lengths(values: Values) -> tuple[list[float], list[float]] | None:
    """Return how far intervals extend below and above their values; None for values without intervals."""
    estimates = [one for one in values if isinstance(one, Estimate)]
    below = [max(one.value - one.low, 0.0) for one in estimates]  # rounding may put the value outside its interval
    above = [max(one.high - one.value, 0.0) for one in estimates]
    return (below, above) if estimates else None


def _smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Return the exponential mean up to each value, corrected for its start."""
    smooth, mean = [], 0.0
    for i, value in enumerate(values, 1):
        mean = weight * mean + (1 - weight) * value
        smooth.append(mean / (1 - weight**i))
    return smooth
