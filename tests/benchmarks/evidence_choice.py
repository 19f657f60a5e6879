"""Build the items on choosing a policy: users, directions, and weights without a search by hand."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import evidence
import tune
from composition import ORDER, SIZES, WAYS
from composition import summary as composition_summary
from evidence import USERS
from evidence_item import FOLDER, OTHERWISE, Item, each, result_of, short, span, verdict, yes
from report import RESULTS

from lora_align.metrics import plots

MIDDLE = USERS["in between"]


def three_users(work: Path) -> Item:
    """Compare what each of three users gets from one average policy, from weights, and from a direction."""
    published = _published()
    angles = {who: math.radians(published["angles"][place]) for who, place in USERS.items()}
    average = [result_of(work, f"users {seed}") for seed in evidence.fronts.SEEDS]

    def worth(angle: float, helpfulness: float, verbosity: float) -> float:
        return math.cos(angle) * helpfulness - math.sin(angle) * verbosity

    rows, figures = [], {}
    for who, place in USERS.items():
        got = {
            "one DPO for all": [
                worth(angles[who], *(of[name] for name in evidence.fronts.OBJECTIVES)) for of in average
            ],
            "one mix for all": [worth(angles[who], *of[MIDDLE]) for of in published["points"]["vectors"]],
            "one direction for all": [worth(angles[who], *of[MIDDLE]) for of in published["points"]["t4"]],
            "weights of one's own": [worth(angles[who], *of[place]) for of in published["points"]["vectors"]],
            "a direction of one's own": [worth(angles[who], *of[place]) for of in published["points"]["t4"]],
        }
        rows.append([who, *(f"{short(mean(values))} ({span(values)})" for values in got.values())])
        figures[who] = got

    def served(how: str, than: str) -> list[str]:
        return [who for who, of in figures.items() if min(of[how]) > max(of[than])]

    directed, weighed = (served(how, "one DPO for all") for how in ("a direction of one's own", "weights of one's own"))
    better = served("a direction of one's own", "one direction for all")
    others = [who for who, place in USERS.items() if place != MIDDLE]
    return Item(
        "Users who want different things",
        "One reward for all serves only users with average wishes; a direction serves the others, too (figure 2, a "
        "drawing).",
        verdict(*(who in directed for who in USERS), *(who in better for who in others)),
        "served better than by one DPO on every pair of seeds: by the user's own direction "
        f"{', '.join(directed) or 'nobody'}; by the user's own weights {', '.join(weighed) or 'nobody'}. By the "
        "user's own direction better than by the middle one, which is one for all from the same policy: "
        f"{', '.join(better) or 'nobody'} (of {' and '.join(others)})",
        [[["vᵀ(helpfulness, verbosity), mean and span of three seeds", *figures["few words"]], *rows]],
        figures=figures,
    )


def fronts(work: Path) -> Item:
    """Report the published figures of `fronts.py`."""
    published = _published()
    compared, wins = published["compared"], published["wins against SFT, and verbosity"]
    volumes = {name.removeprefix("volume "): of for name, of in compared.items() if name.startswith("volume ")}
    areas = {name: of for name, of in volumes.items() if " - " not in name}
    rows = [[name, f"{of['mean']:.3f} ({_within(of)})"] for name, of in areas.items()]
    others, iterations = ("SFT", "DPO", "SteerLM"), evidence.fronts.ITERATIONS[1:]
    beaten, everywhere = (
        {t: [of for of in others if _higher(compared[f"{t} above {of}{where}"])] for t in iterations}
        for where in ("", ", least")
    )
    grown = [t for t, before in zip(iterations, evidence.fronts.ITERATIONS, strict=False)
             if _higher(volumes[f"{t} - {before}"])]  # fmt: skip
    gains = [
        [t, *(f"{compared[f'{t} above {of}']['mean']:.3f} ({_within(compared[f'{t} above {of}'])})" for of in
              (*others, "vectors"))]
        for t in iterations
    ]  # fmt: skip
    lines = {name: of[: evidence.fronts.TARGETS] if name == "SteerLM" else of for name, of in wins.items()}
    _wins(FOLDER / "wins.png", lines)
    most = {name: max(of, key=lambda point: point[0]) for name, of in lines.items()}
    rates = [[name, f"{short(of[0])} ({short(of[1])} to {short(of[2])})", short(of[3])] for name, of in most.items()]
    return Item(
        "Fronts",
        "From t ≥ 1 the front of the conditioned policy dominates SFT, DPO and SteerLM, and each front the one "
        "before (figure 4); figure 5 compares wins and lengths. Both are drawn without numbers. Vectors were not "
        "compared.",
        verdict(*(len(of) == len(others) for of in beaten.values()), len(grown) == len(iterations)),
        "above at the others' verbosities, on average over their points, with intervals that exclude 0 and on every "
        "seed: "
        + "; ".join(f"{t} above {', '.join(of) or 'none'}" for t, of in beaten.items())
        + "; at every one of their points, likewise: "
        + "; ".join(f"{t} above {', '.join(of) or 'none'}" for t, of in everywhere.items())
        + f". Covering more than the one before, likewise: {', '.join(grown) or 'none'}. SteerLM helps most where it "
        "is most verbose, more than half as much again as those it is set against",
        [
            [["", "area dominated (95 %; by seed)"], *rows],
            [["more helpfulness than", *others, "vectors"], *gains],
            [
                [
                    "the point that wins most, by the oracle's helpfulness",
                    "wins against SFT (that point's own interval)",
                    "verbosity there",
                ],
                *rates,
            ],
        ],
        {
            "../results/fronts.png": "fronts, what an angle does, reward model against oracle",
            "wins.png": "how often an answer is more helpful than the start policy's, against how verbose it is",
        },
        {"compared": compared, "wins against SFT, and verbosity": wins},
    )


def _higher(of: Mapping[str, Any]) -> bool:
    return bool(of["interval"][0] > 0 and min(of["by seed"]) > 0)


def _within(of: Mapping[str, Any]) -> str:
    low, high = of["interval"]
    return f"{low:.3f} to {high:.3f}; by seed {min(of['by seed']):.3f} to {max(of['by seed']):.3f}"


def _wins(file: Path, wins: Mapping[str, Sequence[Sequence[float]]]) -> None:
    picture, [panel] = plots.grid(1, (5.4, 3.8), margin=(0.0, 0.0))
    for name, of in wins.items():
        rates, low, high, lengths = zip(*of, strict=True)
        colour, mark = evidence.fronts.STYLES[name]
        panel.vlines(lengths, low, high, color=colour, alpha=0.3, linewidth=1)
        panel.plot(lengths, rates, mark, color=colour, markersize=4.5, linewidth=1.2, label=name)
    panel.axhline(0.5, color=plots.LINE, linewidth=1, zorder=0)
    panel.set(xlabel="verbosity", ylabel="wins against SFT, by helpfulness")
    plots.plain(panel)
    panel.legend(frameon=False, fontsize=7.5)
    plots.save(picture, file)


def open_questions(work: Path) -> Item:
    """Report on weights without a sweep, and on composition that reduces interference."""
    tuned = {seed: result_of(work, f"tune {seed}") for seed in tune.SEEDS}
    each_aim = {aims: {seed: of[aims] for seed, of in tuned.items()} for aims in map(tune.aims_text, tune.AIMS)}
    every = [of for seeds in each_aim.values() for of in seeds.values()]
    shares = [of["tune's share of the grid's time"] for of in every]
    equal = [of["tune: score"] >= of["grid: score"] - 1e-9 for of in every]
    within = [share <= 0.1 for share in shares]
    choices = [
        [aims, str(seed),
         *(f"{of[way]['weights']}: {short(of[f'{way}: score'])} ({span(of[f'{way}: scores'])})"
           for way in ("grid", "tune")),
         short(of["tune's share of the grid's time"])]
        for aims, seeds in each_aim.items() for seed, of in seeds.items()
    ]  # fmt: skip
    composed = each(work, "composed")
    figures = {size: {way.label: composition_summary(composed, size, way) for way in WAYS} for size in SIZES}
    rows = [
        [
            f"{size}, {label}", *(short(of["gain"][name]) if name in of["gain"] else "" for name in ORDER),
            f"{short(of['mean gain'])} ± {short(of['mean gain, deviation over seeds'])}",
            f"{short(of['worst'])} ± {short(of['worst, deviation over seeds'])}", f"{of['well_formed']:.0%}",
        ]
        for size, ways in figures.items() for label, of in ways.items()
    ]  # fmt: skip
    beaten = {
        size: [label for label, of in ways.items() if _beyond(of, ways["exact"])] for size, ways in figures.items()
    }
    beaten_text = "; ".join(f"of {size}: {', '.join(labels) or 'none'}" for size, labels in beaten.items())
    return Item(
        "Weights without sweeps, and composition",
        "Open questions of the first paper: how to choose η without a sweep; how to compose in the light of "
        "interference.",
        "Answered in small" if all(equal) and all(within) else OTHERWISE,
        f"`tune` scored no less than the best of a grid of 25 points: {yes(all(equal))}, {sum(equal)} of {len(equal)}; "
        f"in at most a tenth of its time: {yes(all(within))}, {sum(within)} of {len(within)}, {span(shares)}, both by "
        "a recipe that holds the two preferences alone. Help "
        "needs words, so that of the second aims each is had at the other's cost. By the worst preference's gain, "
        f"beyond both deviations over seeds, plain addition is beaten by, {beaten_text}",
        [
            [
                [
                    "aims",
                    "seed",
                    f"the grid chose, and scored (span of {tune.TRIED} draws of answers)",
                    "`tune` chose, and scored",
                    "of the grid's time",
                ],
                *choices,
            ],
            [["mixed at once, gains", *ORDER, "mean", "worst", "well-formed"], *rows],
        ],
        figures={"tune": tuned, "composition": figures},
    )


def _beyond(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    spread = one["worst, deviation over seeds"] + other["worst, deviation over seeds"]
    return bool(one["worst"] - other["worst"] > spread)


def _published() -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((RESULTS / "fronts.json").read_text())["figures"]
    return figures
