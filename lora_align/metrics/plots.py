"""Plots: control curves, weight maps, reward-model reports, lengths, layer norms."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, PALE, BROKEN = "#1f4e9c", "#b9c7e0", "#c2410c"
COLOURS = "YlGnBu"

Grid = Sequence[Sequence[float]]  # [weights of the second preference, weights of the first]


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
    columns = min(columns, len(curves))
    rows = -(-len(curves) // columns)
    picture = Figure(figsize=(2.35 * columns + 0.5, 2.2 * rows + 0.35), layout="constrained")
    panels = picture.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for panel, (name, seeds) in zip(panels.flat, curves.items(), strict=False):
        for seed in seeds if len(seeds) > 1 else ():
            panel.plot(weights, seed, color=PALE, linewidth=1)
        mean = [sum(column) / len(column) for column in zip(*seeds, strict=True)]
        panel.plot(weights, mean, color=INK, linewidth=2.2, marker="o", markersize=3.5, label="its own score")
        panel.plot(weights, well_formed[name], color=BROKEN, linewidth=1, linestyle="--", label="share well-formed")
        panel.set_title(name, fontsize=10)
        _plain(panel)
    for panel in panels.flat[len(curves) :]:
        panel.set_visible(False)
    panels.flat[0].legend(frameon=False, fontsize=7.5, loc="lower right")
    picture.supxlabel("weight", fontsize=9)
    picture.savefig(file, dpi=150)


def weight_map(
    file: Path, names: tuple[str, str], weights: tuple[Sequence[float], Sequence[float]], scores: Mapping[str, Grid]
) -> None:
    """Plot one heat map per score over the weights of two preferences. Scores within 0 and 1 use that scale."""
    picture = Figure(figsize=(3.1 * len(scores), 3.3), layout="constrained")
    for panel, (score, grid) in zip(picture.subplots(1, len(scores), squeeze=False).flat, scores.items(), strict=True):
        flat = [value for values in grid for value in values if not math.isnan(value)] or [0.0]
        low, high = (0.0, 1.0) if min(flat) >= 0 and max(flat) <= 1 else (min(flat), max(flat))
        panel.imshow(grid, origin="lower", cmap=COLOURS, vmin=low, vmax=high)
        for row, values in enumerate(grid):
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
    picture.savefig(file, dpi=150)


def reward_report(file: Path, report: Mapping[str, Any]) -> None:
    """Plot the calibration of each head against ratings or pairs, and the rank correlation between heads."""
    heads = {
        name: figures for name, figures in report["heads"].items() if "calibration" in figures or "chances" in figures
    }
    columns = 4
    rows = -(-(len(heads) + 1) // columns)
    picture = Figure(figsize=(2.5 * columns, 2.5 * rows), layout="constrained")
    panels = list(picture.subplots(rows, columns, squeeze=False).flat)
    for panel, (name, figures) in zip(panels, heads.items(), strict=False):
        rated = figures["rated"] > 1
        top = 100 if rated else 1
        predicted, observed = zip(*figures["calibration" if rated else "chances"], strict=True)
        panel.plot([0, top], [0, top], color="#cccccc", linewidth=1)
        panel.plot(predicted, observed, color=INK, linewidth=2, marker="o", markersize=4)
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("score" if rated else "predicted chance of winning", fontsize=8)
        panel.set_ylabel("mean rating" if rated else "share won", fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=8)
    names = list(report["heads"])
    last, *empty = panels[len(heads) :]
    last.imshow(report["between"], cmap="RdBu_r", vmin=-1, vmax=1)
    last.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    last.set_yticks(range(len(names)), names, fontsize=7)
    last.set_title("rank correlation", fontsize=10)
    for panel in empty:
        panel.set_visible(False)
    picture.savefig(file, dpi=130)


def lengths(file: Path, bins: Sequence[tuple[int, int, int]], max_length: int, title: str) -> None:
    """Plot a histogram of pair lengths in tokens, with a line where pairs are truncated."""
    picture = Figure(figsize=(6.4, 2.8), layout="constrained")
    panel = picture.subplots()
    lows, widths = [low for low, _, _ in bins], [high + 1 - low for low, high, _ in bins]
    panel.bar(lows, [count for _, _, count in bins], width=widths, align="edge", color=INK, edgecolor="white")
    if bins and max_length <= bins[-1][1]:
        panel.axvline(max_length, color=BROKEN, linestyle="--", label=f"max_length {max_length:,}")
        panel.legend(frameon=False, fontsize=8)
    panel.set(xlabel="tokens of a prompt with its longer answer", ylabel="pairs", title=title)
    panel.spines[["top", "right"]].set_visible(False)
    picture.savefig(file, dpi=130)


def layer_maps(file: Path, places: Mapping[str, Mapping[str, Mapping[int, float]]]) -> None:
    """Plot one heat map per update: its norm in every layer and kind of module."""
    kinds = list(dict.fromkeys(kind for norms in places.values() for kind in norms))
    by_layer = [layers for norms in places.values() for layers in norms.values()]
    layers = sorted({layer for norms in by_layer for layer in norms})
    largest = max((norm for norms in by_layer for norm in norms.values()), default=0.0)
    width, height = 0.22 * len(layers) + 1.6, 0.26 * len(kinds) + 0.75
    columns = max(1, min(len(places), int(11 / width)))
    rows = -(-len(places) // columns)
    picture = Figure(figsize=(width * columns + 0.6, height * rows + 0.3), layout="constrained")
    panels = picture.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for panel, (name, norms) in zip(panels.flat, places.items(), strict=False):
        grid = [[norms.get(kind, {}).get(layer, math.nan) for layer in layers] for kind in kinds]
        shown = panel.imshow(grid, cmap=COLOURS, vmin=0, vmax=largest or 1, aspect="auto")
        panel.set_title(name, fontsize=10)
        step = -(-len(layers) // 16)
        panel.set_xticks(range(0, len(layers), step), ["–" if n < 0 else n for n in layers[::step]], fontsize=7)
        panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    for panel in panels.flat[len(places) :]:
        panel.set_visible(False)
    picture.colorbar(shown, ax=panels, label="norm", shrink=0.8)
    picture.supxlabel("layer", fontsize=9)
    picture.savefig(file, dpi=150)


def _plain(panel: Axes) -> None:
    """Set the y axis to 0 to 1 and remove unneeded lines."""
    panel.set_ylim(-0.02, 1.02)
    panel.axvline(0, color="#dddddd", linewidth=1, zorder=0)
    panel.grid(axis="y", color="#eeeeee", linewidth=0.8)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
