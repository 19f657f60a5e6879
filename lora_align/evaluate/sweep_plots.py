"""Pictures of a sweep: what weights do, where the front lies, and what it costs."""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import product
from operator import itemgetter
from pathlib import Path
from textwrap import shorten

from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from lora_align.evaluate.goals import GoalScore
from lora_align.evaluate.sweep_result import SweepPolicy
from lora_align.metrics import pareto, plots
from lora_align.metrics.plots import BOLD, BROKEN, INK, LINE, THIN
from lora_align.policy.policy import PROMPT, START

OTHERS = ("#0f766e", "#7c3aed", "#b45309", "#be185d")  # colours of the other axes' scores
TICKS = 9  # most weights that are written below an axis
KL = "KL"
LABEL = 60  # characters of a policy in a legend
COSTS = ("text loss", "facts known", KL)


def draw(
    folder: Path,
    values: Mapping[str, Sequence[float]],
    scores: Mapping[str, GoalScore],
    policies: Sequence[SweepPolicy],
    rivals: Mapping[str, Mapping[float, str]],
) -> None:
    """Draw each picture for which there is something to show."""
    grid = [policy for policy in policies if policy.weights is not None] if values else []
    if len(values) == 2 and scores:
        _map(folder / "map.png", values, scores, grid)
    pictures = {
        "curves": curves(values, scores, grid),
        "front": front(scores, policies),
        "length": lengths(scores, policies),
        "asked": direction_curves(scores, policies),
        "cost": costs(scores, policies),
        "equal_kl": kl_curves(scores, grid, policies, rivals),
    }
    for name, picture in pictures.items():
        if picture:
            plots.save(picture, folder / f"{name}.png")


def curves(
    values: Mapping[str, Sequence[float]], scores: Mapping[str, GoalScore], grid: Sequence[SweepPolicy]
) -> Figure | None:
    """Return panels in a column for each axis: its own score and those of other axes, with intervals, over its weight.

    Scores of one kind share a row, and so a scale. All other weights are 0, or the nearest to 0 that the sweep has.
    """
    axes = [axis for axis in values if axis in scores and len(values[axis]) > 1]
    if not axes:
        return None
    kinds = list(dict.fromkeys(map(_kind, scores.values())))
    picture, panels = plots.grid(len(kinds) * len(axes), (3.4, 3.2), len(axes), sharey="row")
    for panel, (kind, axis) in zip(panels, product(kinds, axes), strict=True):
        fixed = {name: min(values[name], key=abs) for name in values if name != axis}
        line = sorted(
            (
                (policy.weights[axis], policy)
                for policy in grid
                if policy.weights and fixed.items() <= policy.weights.items()
            ),
            key=itemgetter(0),
        )
        ordered = [(axis, scores[axis]), *((other, score) for other, score in scores.items() if other != axis)]
        for colour, (other, score) in zip((INK, *OTHERS), ordered, strict=False):
            if _kind(score) != kind:
                continue
            known = [(place, policy.figures[score.name]) for place, policy in line if score.name in policy.figures]
            places, estimates = [place for place, _ in known], [figure for _, figure in known]
            plots.plot(panel, places, estimates, colour, width=BOLD if other == axis else THIN, label=score.name)
        nonzero = [f"{name}={weight:g}" for name, weight in fixed.items() if weight]
        panel.set_xlabel(f"weight of {axis}" + (f", at {', '.join(nonzero)}" if nonzero else ""))
        if len(line) <= TICKS:
            panel.set_xticks([place for place, _ in line], [f"{place:g}" for place, _ in line])
        panel.legend(frameon=False, fontsize=7.5)
        plots.plain(panel)
    return picture


def kl_curves(
    scores: Mapping[str, GoalScore],
    grid: Sequence[SweepPolicy],
    policies: Sequence[SweepPolicy],
    rivals: Mapping[str, Mapping[float, str]],
) -> Figure | None:
    """Return panels with each score over the KL from the start policy: a line for the axis, and one for each rival."""
    if not rivals or not scores:
        return None
    by_name = {policy.name: policy for policy in policies}
    start, axis = by_name[START], next(iter(scores))
    lines = {axis: sorted(grid, key=lambda policy: (policy.weights or {}).get(axis, 0.0))}
    lines |= {
        f"against {name.removeprefix(f'{PROMPT}:')}": [start, *(by_name[word] for word in words.values())]
        for name, words in rivals.items()
    }
    shown = [*scores.values(), *(GoalScore(name) for name in ("words", "text loss") if name in start.figures)]
    shown = list({score.name: score for score in shown}.values())
    picture, panels = plots.grid(len(shown), (4.2, 3.4), 3)
    for panel, score in zip(panels, shown, strict=True):
        for colour, (name, line) in zip((INK, *OTHERS), lines.items(), strict=False):
            known = [of.figures for of in line if {KL, score.name} <= of.figures.keys()]
            distances, values = [of[KL] for of in known], [of[score.name] for of in known]
            plots.plot(panel, distances, values, colour, width=BOLD if name == axis else THIN, marker="o")
        panel.set(xlabel="KL from the start policy, nats per answer", ylabel=str(score))
        plots.plain(panel)
    labels = [shorten(name, LABEL, placeholder=" …") for name in lines]
    picture.legend(panels[0].get_lines(), labels, loc="outside lower center", ncols=2, frameon=False, fontsize=7.5)
    return picture


def front(scores: Mapping[str, GoalScore], policies: Sequence[SweepPolicy]) -> Figure | None:
    """Plot every point by the first two scores; better is up and to the right.

    A line joins the points that no other point beats. Their weights, and the names of points outside the grid, are
    beside them.
    """
    if len(scores) < 2:
        return None
    first, second, *_ = scores.values()
    picture, [panel] = plots.grid(1, (5.2, 4.4), margin=(0.0, 0.0))
    known = [policy for policy in policies if first.name in policy.figures and second.name in policy.figures]
    places = [(policy.figures[first.name].value, policy.figures[second.name].value) for policy in known]
    worths = [(first.signed_value(policy.figures), second.signed_value(policy.figures)) for policy in known]
    best = sorted(places[i] for i in pareto.front(worths))
    names = []
    for policy, (x, y) in zip(known, places, strict=True):
        inside = policy.weights is not None
        across, up = policy.figures[first.name], policy.figures[second.name]
        plots.plot(panel, [across], [up], _colour(policy), marker="o" if inside else "D", size=4.5)
        if not inside or (x, y) in best:
            name = ", ".join(f"{w:g}" for w in policy.weights.values()) if policy.weights is not None else policy.name
            names.append(
                panel.annotate(name, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, color="#555555")
            )
    plots.plot(panel, [x for x, _ in best], [y for _, y in best], width=THIN, dashed=True)
    axes = next((list(policy.weights) for policy in known if policy.weights is not None), [])
    panel.set(xlabel=str(first), ylabel=str(second))
    for score, inverted in ((first, panel.invert_xaxis), (second, panel.invert_yaxis)):
        if score.lower:
            inverted()
    plots.plain(panel)
    if axes:
        panel.set_title(f"beside points: weights of {', '.join(axes)}", fontsize=8, color="#555555")
    picture.draw_without_rendering()  # computes the positions of the names
    _without_overlap(names)
    return picture


def _without_overlap(names: Sequence[Annotation]) -> None:
    """Hide each name that would cover an earlier one; the table of the page has all of them."""
    shown: list[Bbox] = []
    for name in names:
        box = name.get_window_extent()
        name.set_visible(not any(map(box.overlaps, shown)))
        if name.get_visible():
            shown.append(box)


def lengths(scores: Mapping[str, GoalScore], policies: Sequence[SweepPolicy]) -> Figure | None:
    """Plot each point: the share of wins against the start policy over the relative length of its answers."""
    judged = [score for score in scores.values() if any(score.name in policy.wins for policy in policies)]
    if not judged:
        return None
    before = policies[0].figures["words"].value
    picture, panels = plots.grid(len(judged), (3.6, 3.4), len(judged))
    for panel, score in zip(panels, judged, strict=True):
        for policy in policies[1:]:
            if score.name in policy.wins:
                longer = policy.figures["words"].value / before
                plots.plot(panel, [longer], [policy.wins[score.name]], _colour(policy), marker="o")
        panel.axhline(0.5, color=LINE, linewidth=1, zorder=0)
        panel.axvline(1.0, color=LINE, linewidth=1, zorder=0)
        panel.set(xlabel="words, relative to the start policy", ylabel=f"wins by {score}", ylim=(-0.02, 1.02))
        plots.plain(panel)
    return picture


def direction_curves(scores: Mapping[str, GoalScore], policies: Sequence[SweepPolicy]) -> Figure | None:
    """Return a panel for each score over the angle of the requested direction, for policies with two objectives."""
    wanted = [(policy, policy.want.weights) for policy in policies if policy.want and len(policy.want.weights) == 2]
    known = [score.name for score in scores.values() if all(score.name in policy.figures for policy, _ in wanted)]
    if not wanted or not known:
        return None
    angles = [math.degrees(math.atan2(second, first)) for first, second in (of.values() for _, of in wanted)]
    first = next(iter(wanted[0][1]))
    picture, panels = plots.grid(len(known), (3.2, 3.0), len(known))
    for panel, name in zip(panels, known, strict=True):
        plots.plot(panel, angles, [policy.figures[name] for policy, _ in wanted], width=1.5, marker="o")
        panel.set(xlabel=f"degrees from {first}", ylabel=name)
        plots.plain(panel)
    return picture


def costs(scores: Mapping[str, GoalScore], policies: Sequence[SweepPolicy]) -> Figure | None:
    """Plot the scores against their costs: text loss, facts known, and KL from the start policy (a star)."""
    shown = [name for name in COSTS if any(name in policy.figures for policy in policies)]
    if not shown or not scores:
        return None
    count = len(scores) * len(shown)
    picture, panels = plots.grid(count, (3.2, 3.0), len(shown), sharex="col", sharey="row")
    for panel, (score, cost) in zip(panels, product(scores.values(), shown), strict=True):
        for number, policy in enumerate(policies):
            if cost in policy.figures and score.name in policy.figures:
                marker, size = ("o", 4.5) if number else ("*", 11.0)
                x, y = policy.figures[cost], policy.figures[score.name]
                plots.plot(panel, [x], [y], _colour(policy), marker=marker, size=size)
        plots.plain(panel)
    for panel, score in zip(panels[:: len(shown)], scores.values(), strict=True):
        panel.set_ylabel(str(score))
    for panel, cost in zip(panels[-len(shown) :], shown, strict=True):
        panel.set_xlabel(cost)
    return picture


def _map(
    file: Path, values: Mapping[str, Sequence[float]], scores: Mapping[str, GoalScore], grid: Sequence[SweepPolicy]
) -> None:
    """Draw a heat map of each score over both weights."""
    (one, ones), (other, others) = values.items()
    at = {((policy.weights or {})[one], (policy.weights or {})[other]): policy for policy in grid}
    names = [score.name for score in scores.values()]
    maps = {name: [[_value(at[x, y], name) for x in ones] for y in others] for name in names}
    plots.weight_map(file, (one, other), (ones, others), maps)


def _colour(policy: SweepPolicy) -> str:
    return BROKEN if policy.weights is None else INK


def _value(policy: SweepPolicy, name: str) -> float:
    return policy.figures[name].value if name in policy.figures else math.nan


def _kind(score: GoalScore) -> str:
    """Return the kind of a score, such as `margin` for `margin helpful`; scores of one kind have one scale."""
    return re.split("[ :]", score.name)[0]
