"""Pictures of a sweep: what weights do, where the front lies, and what it costs."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from lora_align.evaluate.goals import Score
from lora_align.evaluate.sweep_result import SweepPolicy
from lora_align.metrics import pareto, plots
from lora_align.metrics.plots import BROKEN, INK, PALE

OTHERS = ("#0f766e", "#7c3aed", "#b45309", "#be185d")  # of scores beside the own one
TICKS = 9  # weights that are written below an axis
COSTS = ("text loss", "facts known", "KL")


def draw(
    folder: Path, values: Mapping[str, Sequence[float]], scores: Mapping[str, Score], points: Sequence[SweepPolicy]
) -> None:
    """Each picture for which there is something to show."""
    grid = [point for point in points if point.weights is not None] if values else []
    if len(values) == 2 and scores:
        _map(folder / "map.png", values, scores, grid)
    pictures = {
        "curves": curves(values, scores, grid),
        "front": front(scores, points),
        "length": lengths(scores, points),
        "asked": asked(scores, points),
        "cost": costs(scores, points),
    }
    for name, picture in pictures.items():
        if picture:
            picture.savefig(folder / f"{name}.png", dpi=150)


def curves(
    values: Mapping[str, Sequence[float]], scores: Mapping[str, Score], grid: Sequence[SweepPolicy]
) -> Figure | None:
    """A panel an axis: its own score, with its interval, and the other axes' scores; all other weights 0, or as near
    to it as the sweep came."""
    axes = [axis for axis in values if axis in scores and len(values[axis]) > 1]
    if not axes:
        return None
    picture = Figure(figsize=(3.4 * len(axes) + 0.4, 3.2), layout="constrained")
    for panel, axis in zip(picture.subplots(1, len(axes), squeeze=False).flat, axes, strict=True):
        rest = {name: min(values[name], key=abs) for name in values if name != axis}
        line = sorted(
            ((point.weights[axis], point) for point in grid if point.weights and rest.items() <= point.weights.items()),
            key=itemgetter(0),
        )
        for colour, (other, score) in zip((INK, *OTHERS), _first(axis, scores).items(), strict=False):
            known = [(place, point.figures[score.name]) for place, point in line if score.name in point.figures]
            places, found = [place for place, _ in known], [figure for _, figure in known]
            heights = [figure.value for figure in found]
            panel.plot(places, heights, color=colour, linewidth=2.2 if other == axis else 1.2, label=score.name)
            panel.fill_between(
                places, [f.low for f in found], [f.high for f in found], color=colour, alpha=0.12, linewidth=0
            )
        held = [f"{name}={weight:g}" for name, weight in rest.items() if weight]
        panel.set_xlabel(f"weight of {axis}" + (f", at {', '.join(held)}" if held else ""))
        if len(line) <= TICKS:
            panel.set_xticks([place for place, _ in line], [f"{place:g}" for place, _ in line])
        panel.legend(frameon=False, fontsize=7.5)
        _plain(panel)
    return picture


def front(scores: Mapping[str, Score], points: Sequence[SweepPolicy]) -> Figure | None:
    """Every point by the first two scores, those that no other beats joined, others than the grid's by name; better is
    up and to the right."""
    if len(scores) < 2:
        return None
    first, second, *_ = scores.values()
    picture = Figure(figsize=(5.2, 4.4), layout="constrained")
    panel = picture.subplots()
    known = [point for point in points if first.name in point.figures and second.name in point.figures]
    places = [(point.figures[first.name].value, point.figures[second.name].value) for point in known]
    worths = [(first.signed_value(point.figures), second.signed_value(point.figures)) for point in known]
    best = sorted(places[i] for i in pareto.front(worths))
    names = []
    for point, (x, y) in zip(known, places, strict=True):
        inside = point.weights is not None
        across, up = point.figures[first.name], point.figures[second.name]
        panel.errorbar(
            x, y, xerr=[[x - across.low], [across.high - x]], yerr=[[y - up.low], [up.high - y]],
            color=INK if inside else BROKEN, ecolor=PALE, elinewidth=1, marker="o" if inside else "D", markersize=4.5,
        )  # fmt: skip
        if not inside or (x, y) in best:
            name = ", ".join(f"{w:g}" for w in point.weights.values()) if point.weights is not None else point.name
            names.append(
                panel.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, color="#555555")
            )
    panel.plot(*zip(*best, strict=True), color=INK, linewidth=1.2, linestyle="--", zorder=1)
    axes = next((list(point.weights) for point in known if point.weights is not None), [])
    panel.set(xlabel=str(first), ylabel=str(second))
    for score, inverted in ((first, panel.invert_xaxis), (second, panel.invert_yaxis)):
        if score.lower:
            inverted()
    if axes:
        panel.set_title(f"beside points: weights of {', '.join(axes)}", fontsize=8, color="#555555")
    _plain(panel)
    picture.draw_without_rendering()  # names have their places from here on
    _without_overlap(names)
    return picture


def _without_overlap(names: Sequence[Annotation]) -> None:
    """A name that would lie on one before it is left out: the page's table has them all."""
    shown: list[Bbox] = []
    for name in names:
        box = name.get_window_extent()
        name.set_visible(not any(map(box.overlaps, shown)))
        if name.get_visible():
            shown.append(box)


def lengths(scores: Mapping[str, Score], points: Sequence[SweepPolicy]) -> Figure | None:
    """How often a point beats the start policy, against how much longer its answers are."""
    judged = [score for score in scores.values() if any(score.name in point.wins for point in points)]
    if not judged:
        return None
    before = points[0].figures["words"].value
    picture = Figure(figsize=(3.6 * len(judged) + 0.4, 3.4), layout="constrained")
    for panel, score in zip(picture.subplots(1, len(judged), squeeze=False).flat, judged, strict=True):
        for point in points[1:]:
            if score.name in point.wins:
                x, won = point.figures["words"].value / before, point.wins[score.name]
                colour = INK if point.weights is not None else BROKEN
                panel.plot([x, x], [won.low, won.high], color=PALE, linewidth=1, zorder=1)
                panel.plot(x, won.value, marker="o", color=colour, markersize=4)
        panel.axhline(0.5, color="#bbbbbb", linewidth=1)
        panel.axvline(1.0, color="#bbbbbb", linewidth=1)
        panel.set(xlabel="words, of the start policy's", ylabel=f"wins by {score}", ylim=(-0.02, 1.02))
        _plain(panel)
    return picture


def asked(scores: Mapping[str, Score], points: Sequence[SweepPolicy]) -> Figure | None:
    """What a policy of two objectives makes of a direction: a panel a score, over the angle that was asked for."""
    wanted = [(point, point.want.weights) for point in points if point.want and len(point.want.weights) == 2]
    known = [score.name for score in scores.values() if all(score.name in point.figures for point, _ in wanted)]
    if not wanted or not known:
        return None
    angles = [math.degrees(math.atan2(second, first)) for first, second in (of.values() for _, of in wanted)]
    first = next(iter(wanted[0][1]))
    picture = Figure(figsize=(3.2 * len(known) + 0.4, 3.0), layout="constrained")
    for panel, name in zip(picture.subplots(1, len(known), squeeze=False).flat, known, strict=True):
        found = [point.figures[name] for point, _ in wanted]
        panel.plot(angles, [figure.value for figure in found], "o-", color=INK, markersize=4)
        panel.fill_between(angles, [f.low for f in found], [f.high for f in found], color=INK, alpha=0.12, linewidth=0)
        panel.set(xlabel=f"degrees from {first}", ylabel=name)
        _plain(panel)
    return picture


def costs(scores: Mapping[str, Score], points: Sequence[SweepPolicy]) -> Figure | None:
    """What scores are paid with: loss of ordinary text, facts no longer known, distance from the start policy."""
    shown = [name for name in COSTS if any(name in point.figures for point in points)]
    if not shown or not scores:
        return None
    picture = Figure(figsize=(3.2 * len(shown) + 0.4, 3.0 * len(scores)), layout="constrained")
    panels = picture.subplots(len(scores), len(shown), squeeze=False, sharex="col", sharey="row")
    for row, score in zip(panels, scores.values(), strict=True):
        for panel, cost in zip(row, shown, strict=True):
            for number, point in enumerate(points):
                if cost in point.figures and score.name in point.figures:
                    x, y = point.figures[cost], point.figures[score.name]
                    panel.errorbar(
                        x.value, y.value, xerr=[[x.value - x.low], [x.high - x.value]],
                        yerr=[[y.value - y.low], [y.high - y.value]], ecolor=PALE, elinewidth=1,
                        color=INK if point.weights is not None else BROKEN, marker="o" if number else "*",
                        markersize=4.5 if number else 11,
                    )  # fmt: skip
            _plain(panel)
        row[0].set_ylabel(str(score))
    for panel, cost in zip(panels[-1], shown, strict=True):
        panel.set_xlabel(cost)
    return picture


def _map(
    file: Path, values: Mapping[str, Sequence[float]], scores: Mapping[str, Score], grid: Sequence[SweepPolicy]
) -> None:
    """Each score over both weights."""
    (one, ones), (other, others) = values.items()
    at = {((point.weights or {})[one], (point.weights or {})[other]): point for point in grid}
    names = [score.name for score in scores.values()]
    found = {name: [[_value(at[x, y], name) for x in ones] for y in others] for name in names}
    plots.weight_map(file, (one, other), (ones, others), found)


def _value(point: SweepPolicy, name: str) -> float:
    return point.figures[name].value if name in point.figures else math.nan


def _first(axis: str, scores: Mapping[str, Score]) -> dict[str, Score]:
    return {axis: scores[axis], **scores}


def _plain(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(labelsize=8)
    panel.xaxis.label.set_fontsize(9)
    panel.yaxis.label.set_fontsize(9)
