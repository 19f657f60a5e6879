"""What `evidence.py` measured, item by item: figures with intervals beside the papers', pictures, and a verdict."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import evidence
from control import SEEDS, agreement, spearman
from evidence import FAR, NOISES, PAIR, STEPS, USERS
from matplotlib.figure import Figure
from report import RESULTS

from lora_align.adapters import peft_format, vectors
from lora_align.demo.oracle import AXES
from lora_align.evaluate import estimates, plots
from lora_align.evaluate.estimates import Estimate
from lora_align.preference import Direction

FOLDER = Path(__file__).parent / "evidence"
YES, NO, OTHERWISE = "Reproduced", "Not reproduced", "Different"
Table = list[list[str]]


@dataclass
class Item:
    """One question: what the paper says, what was found, and what that amounts to."""

    title: str
    claim: str
    verdict: str
    because: str
    tables: list[Table] = field(default_factory=list)
    pictures: Mapping[str, str] = field(default_factory=dict)  # a file, and what is to be seen on it
    figures: Any = None


def found(work: Path, name: str) -> Any:
    """What a job has measured."""
    return json.loads((work / "measured" / f"{name}.json").read_text())["found"]


def took(work: Path, name: str) -> float:
    """A job's seconds."""
    return float(json.loads((work / "measured" / f"{name}.json").read_text())["seconds"])


def each(work: Path, name: str) -> list[Any]:
    """A job of every seed."""
    return [found(work, f"{name} {seed}") for seed in SEEDS]


def figure(seeds: Sequence[Mapping[str, Any]], name: str) -> Estimate:
    """The mean over all answers of all seeds; prompts are drawn anew for the interval."""
    rows = [(value, 10_000 * at + i) for at, of in enumerate(seeds) for i, value in enumerate(of[name])]
    known = [(float(value), group) for value, group in rows if value is not None]
    return estimates.mean(*map(list, zip(*known, strict=True)))  # type: ignore[arg-type]


def told(of: Estimate) -> str:
    """`.94 (.93 to .95)`."""
    return f"{short(of.value)} ({short(of.low)} to {short(of.high)})"


def short(value: float) -> str:
    """Two decimals, without the nought before them."""
    sign, size = "−" if value < 0 else "", f"{abs(value):.2f}"
    return sign + (size.removeprefix("0") if size != "0.00" else "0")


def yes(holds: bool) -> str:
    """Or no."""
    return "yes" if holds else "no"


def above(one: Estimate, other: Estimate) -> bool:
    """Whether intervals lie apart."""
    return one.low > other.high


# --- the first paper ---


def control(work: Path) -> Item:
    """Both weights from -1 to 1."""
    seeds = each(work, "grid")
    at = {key: {name: figure([of[key] for of in seeds], name) for name in PAIR} for key in seeds[0]}
    grids = {name: [[at[f"{x:g},{y:g}"][name].value for x in STEPS] for y in STEPS] for name in PAIR}
    own = {
        name: [mean(at[f"{x:g},{y:g}"][name].value for x, y in _line(name, step)) for step in STEPS] for name in PAIR
    }
    FOLDER.mkdir(exist_ok=True)
    plots.weight_map(FOLDER / "control.png", PAIR, (STEPS, STEPS), grids)
    ranks = {name: spearman(STEPS, own[name]) for name in PAIR}
    better = all(above(at["1,1"][name], at["0,0"][name]) and above(at["0,0"][name], at["-1,-1"][name]) for name in PAIR)
    papers = {"-1,-1": "−1.07, −3.78", "0,0": ".20, −2.12", "1,1": "1.99, 3.20"}
    rows = [
        [f"({key.replace(',', ', ').replace('-', '−')})", *(told(at[key][name]) for name in PAIR), papers[key]]
        for key in papers
    ]
    both = better and all(rank == 1 for rank in ranks.values())
    return Item(
        "The weights control it",
        "Over η in {−1, −.5, 0, .5, 1}² both rewards rise with their weights (Llama-3.1-8B, reward models).",
        YES if both else OTHERWISE,
        f"Spearman of each grade with its own weight, averaged over the other: {short(ranks[PAIR[0]])} and "
        f"{short(ranks[PAIR[1]])}; both rise from (−1, −1) by (0, 0) to (1, 1): {yes(better)}",
        [[["η of helpful, harmless", *PAIR, "the paper's rewards"], *rows]],
        {"control.png": "helpfulness and harmlessness over both weights"},
        {key: {name: asdict(of) for name, of in both_.items()} for key, both_ in at.items()},
    )


def _line(name: str, step: float) -> list[tuple[float, float]]:
    return [(step, other) if name == PAIR[0] else (other, step) for other in STEPS]


RIVALS = {  # the paper's helpful, harmless, hours, refusals
    "vectors": "2.003, 3.250, 4 h, .101",
    "soup": "1.814, 5.573, 31 h, .189",
    "RLOO": "(Safe-RLHF) 1.577, 5.444, 19 h, .212",
    "joint DPO": "(safe first) .718, −.445, 1 h, .067",
    "positive alone": "1.454, 1.265",
    "start": "",
}


def rivals(work: Path) -> Item:
    """The main table."""
    seeds = each(work, "rivals")
    names = (*PAIR, "refused", "well-formed")
    at = {label: {name: figure([of[label] for of in seeds], name) for name in names} for label in RIVALS}
    seconds = {label: mean(_seconds(work, label, seed) for seed in SEEDS) for label in RIVALS}
    rows = [
        [label, *(told(at[label][name]) for name in names), f"{seconds[label]:.0f}", paper]
        for label, paper in RIVALS.items()
    ]
    ours = at["vectors"]
    claims = {
        "more helpful than the soup": above(ours["helpful"], at["soup"]["helpful"]),
        "more helpful than online RL": above(ours["helpful"], at["RLOO"]["helpful"]),
        "less harmless than the soup": above(at["soup"]["harmless"], ours["harmless"]),
        "less harmless than online RL": above(at["RLOO"]["harmless"], ours["harmless"]),
        "refuses less than online RL": above(at["RLOO"]["refused"], ours["refused"]),
        "better at both than the positive adapters alone": all(
            above(ours[name], at["positive alone"][name]) for name in PAIR
        ),
        "better at both than joint DPO": all(above(ours[name], at["joint DPO"][name]) for name in PAIR),
        "trained in less time than online RL": seconds["vectors"] < seconds["RLOO"],
    }
    return Item(
        "Against other ways to be helpful and harmless",
        "Vectors are more helpful and refuse less than the RLHF ones, but are less harmless; better than the positive "
        "adapter alone; a few hours in place of a day.",
        YES if all(claims.values()) else NO if not any(claims.values()) else OTHERWISE,
        "; ".join(f"{claim}: {yes(holds)}" for claim, holds in claims.items())
        + ". The start policy is the raw base here, as the built-in recipe has no SFT; soup and vectors are of DPO's "
        "adapters, the paper's soup of PPO's",
        [[["", "helpful", "harmless", "safe prompts refused", "well-formed", "seconds", "the paper's"], *rows]],
        figures={label: {name: asdict(of) for name, of in all_.items()} for label, all_ in at.items()},
    )


def _seconds(work: Path, label: str, seed: int) -> float:
    """What a contestant took to train, on one core; of a preference's two directions a half each."""
    vectors_ = sum(took(work, f"seed{seed} {name}") for name in PAIR)
    if label in ("soup", "positive alone"):
        return vectors_ / 2
    if label == "RLOO":
        return sum(found(work, f"rloo 0.0 {seed}")[name] for name in ("reward", "both"))
    return {"vectors": vectors_, "joint DPO": took(work, f"seed{seed} joint"), "start": 0.0}[label]


def later(work: Path) -> Item:
    """A third and a fourth preference, added."""
    seeds = each(work, "later")
    names = (*PAIR, "polite", "brief", "well-formed")
    at = {label: {name: figure([of[label] for of in seeds], name) for name in names} for label in seeds[0]}
    two, four, start = at[" ".join(PAIR)], at[" ".join((*PAIR, "polite", "brief"))], at[""]
    rows = [[label or "none", *(told(of[name]) for name in names)] for label, of in at.items()]
    gains = all(above(four[name], start[name]) for name in ("polite", "brief"))
    pays = any(above(two[name], four[name]) for name in PAIR)
    price = ", ".join(f"{name} {short(four[name].value - two[name].value)}" for name in PAIR)
    return Item(
        "More preferences, added later",
        "Two more vectors are added without training the first two again; those pay for it (3B: helpful 1.385 → 1.01, "
        "harmless 3.585 → 2.67, with psychological −4.57 → 6.10 and honest −1.58 → −.07).",
        YES if gains and pays else OTHERWISE,
        f"the new ones {'both gain' if gains else 'do not both gain'}; the price of the first two: {price}. "
        "`brief` and "
        "`helpful` want opposite things of an answer's length in this world",
        [[["vectors, with weight 1", *names], *rows]],
        figures={label or "none": {name: asdict(of) for name, of in all_.items()} for label, all_ in at.items()},
    )


def geometry(work: Path) -> Item:
    """Angles, interference, and agreement under noise."""
    loaded = {name: [vectors.find(name, work / f"seed{seed}").load() for seed in SEEDS] for name in AXES}
    between = [loaded["helpful"][i].cosine(loaded["harmless"][i]) for i in range(len(SEEDS))]
    sides = {
        name: [
            peft_format.load(work / f"seed{seed}/dpo/{name}/pos").cosine(
                peft_format.load(work / f"seed{seed}/dpo/{name}/neg")
            )
            for seed in SEEDS
        ]
        for name in AXES
    }
    across = {name: agreement(found_) for name, found_ in loaded.items()}
    apart = agreement([vectors.find("helpful", work / f"apart{seed}").load() for seed in SEEDS])
    noisy = {0.0: across["helpful"]}
    noisy |= {
        n: agreement([vectors.find("helpful", work / f"noise{n}-{seed}").load() for seed in SEEDS]) for n in NOISES
    }
    rewarded = {n: agreement([_difference(work / f"rloo{n}-{seed}") for seed in SEEDS]) for n in evidence.REWARD_NOISES}
    composed = each(work, "composed")
    sti = {
        size: [mean(of[f"{size} STI"][kind] for of in composed) for kind in ("raw", "by_size")] for size in (2, 4, 6, 8)
    }
    least = min(min(of) for of in across.values())
    agreed = [["labels exchanged", *(f"{n:g}" for n in noisy)]]
    agreed.append(["vectors of DPO", *(_span(of) for of in noisy.values())])
    agreed.append(["of RLOO", *(_span(rewarded[n]) if n in rewarded else "" for n in noisy)])
    FOLDER.mkdir(exist_ok=True)
    _noise(FOLDER / "noise.png", noisy, rewarded)
    opposed = all(value < 0 for of in sides.values() for value in of)
    ordered = min(across["helpful"]) > max(rewarded[0.0])
    grows = sti[2][0] < sti[4][0] < sti[6][0] < sti[8][0]
    return Item(
        "Angles and interference",
        "cos(Δ₊, Δ₋) −.47 to −.71; cos of helpful and harmless .34 to .40; the same vector from three seeds "
        ".98 to 1.00 "
        "(trained by PPO: .21 to .26); STI .41 for two preferences, 2.33 for four. Why DPO's agree is left open.",
        YES if opposed and ordered and grows else OTHERWISE,
        f"Δ₊ and Δ₋ oppose each other: {yes(opposed)}; helpful and harmless stand at {_span(between)}; three data "
        f"seeds agree to {short(least)} or more for all eight, where the paper's seeds share their data; with an A of "
        f"its own for each: {_span(apart)}, labels by lot: {_span(noisy[0.5])}. RLOO's agree less: {yes(ordered)}; STI "
        f"grows with the number: {yes(grows)}. A shared A inflates cosines and the part of STI that compares inputs",
        [
            [["", *AXES], ["cos(Δ₊, Δ₋)", *(_span(of) for of in sides.values())],
             ["over data seeds", *(_span(of) for of in across.values())]],
            [["preferences", *(str(size) for size in sti)], ["STI", *(f"{of[0]:.2f}" for of in sti.values())],
             ["by size", *(f"{of[1]:.3f}" for of in sti.values())]],
            agreed,
        ],
        {"noise.png": "agreement over seeds against label noise"},
        {"cos of directions": sides, "over seeds": across, "helpful, harmless": between, "A apart": apart,
         "noise": noisy, "noise, RLOO": rewarded, "STI": sti},
    )  # fmt: skip


def _difference(folder: Path) -> Any:
    pos, neg = (peft_format.load(folder / side.value) for side in Direction)
    return pos - neg


def _span(values: Sequence[float]) -> str:
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"


def _noise(file: Path, noisy: Mapping[float, list[float]], rewarded: Mapping[float, list[float]]) -> None:
    picture = Figure(figsize=(4.6, 3.2), layout="constrained")
    panel = picture.subplots()
    for label, colour, of in (("DPO", plots.INK, noisy), ("RLOO, reward model", plots.BROKEN, rewarded)):
        panel.plot(list(of), [mean(values) for values in of.values()], "o-", color=colour, label=label)
        for place, values in of.items():
            panel.plot([place] * len(values), values, "_", color=colour, alpha=0.6)
    panel.set(xlabel="share of labels exchanged", ylabel="cosine of helpful over data seeds", ylim=(-0.05, 1.05))
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False)
    picture.savefig(file, dpi=150)


def knowledge(work: Path) -> Item:
    """How far both vectors may be turned until facts go."""
    seeds = each(work, "far")
    names = ("known", "true facts", "well-formed", *PAIR)
    at = {f"{eta:g}": {name: figure([of[f"{eta:g}"] for of in seeds], name) for name in names} for eta in FAR}
    papers = {"0": ".65", "1": ".65", "1.5": ".65", "2": ".60", "4": ".25"}
    rows = [[eta, *(told(of[name]) for name in names), papers.get(eta, "")] for eta, of in at.items()]
    flat = all(abs(at[eta]["known"].value - at["0"]["known"].value) < 0.05 for eta in ("0.5", "1", "1.5"))
    falls = above(at["0"]["known"], at["4"]["known"])
    return Item(
        "Knowledge kept",
        "CommonsenseQA is flat up to η = 1.5, .60 at 2 and .25 at 4.",
        YES if flat and falls else OTHERWISE,
        "*known* is the share of facts found likelier than three that are not true of their subject (by chance .25), "
        "*true facts* that of the facts stated in well-formed answers; both weights are η",
        [[["η", *names, "the paper's"], *rows]],
        figures={eta: {name: asdict(of) for name, of in all_.items()} for eta, all_ in at.items()},
    )


def correlation(work: Path) -> Item:
    """Axes that go together in the data."""
    first, second = evidence.CORRELATED
    rows, figures = [], {}
    for strength in evidence.CORRELATIONS:
        seeds = [found(work, f"correlated {strength} {seed}") for seed in SEEDS]
        folder = "correlated{}-{}" if strength else "seed{1}"
        cosines = [
            vectors.find(first, work / folder.format(strength, seed))
            .load()
            .cosine(vectors.find(second, work / folder.format(strength, seed)).load())
            for seed in SEEDS
        ]
        spans = {
            (one, other): figure([of[f"{one} 1"] for of in seeds], other).value
            - figure([of[f"{one} -1"] for of in seeds], other).value
            for one in evidence.CORRELATED
            for other in evidence.CORRELATED
        }
        rows.append([short(strength), _span(cosines), *(short(value) for value in spans.values())])
        figures[strength] = {"cosines": cosines, "spans": {" ".join(key): value for key, value in spans.items()}}
    leak = [figures[s]["spans"][f"{first} {second}"] for s in evidence.CORRELATIONS]
    return Item(
        "Two axes that go together",
        "Not in the paper: pairs in which two axes are correlated, from −.8 to .8.",
        "Measured",
        f"turning `{first}` from −1 to 1 moves `{second}` by {short(leak[0])} at −.8 and by {short(leak[-1])} "
        "at .8: what "
        "goes together in the pairs goes together in the vectors, margins or not",
        [[
            ["correlation", f"cos of {first} and {second}", *(f"{one} moves {other}" for one, other in
             itertools.product(evidence.CORRELATED, repeat=2))],
            *rows,
        ]],
        figures=figures,
    )  # fmt: skip


# --- the second paper ---


def three_users(work: Path) -> Item:
    """What each of three users gets of one average policy, of weights, of a direction."""
    published = json.loads((RESULTS / "fronts.json").read_text())["figures"]
    angles = {who: math.radians(published["angles"][place]) for who, place in USERS.items()}
    average = [found(work, f"users {seed}") for seed in evidence.fronts.SEEDS]

    def worth(angle: float, helpfulness: float, verbosity: float) -> float:
        return math.cos(angle) * helpfulness - math.sin(angle) * verbosity

    rows, figures = [], {}
    for who, place in USERS.items():
        got = {
            "one DPO for all": [
                worth(angles[who], *(of[name] for name in evidence.fronts.OBJECTIVES)) for of in average
            ],
            "weights of one's own": [worth(angles[who], *of[place]) for of in published["points"]["vectors"]],
            "a direction of one's own": [worth(angles[who], *of[place]) for of in published["points"]["t4"]],
        }
        rows.append([who, *(f"{short(mean(values))} ({_span(values)})" for values in got.values())])
        figures[who] = got
    wins = [min(of["a direction of one's own"]) > max(of["one DPO for all"]) for of in figures.values()]
    weights = [min(of["weights of one's own"]) > max(of["one DPO for all"]) for of in figures.values()]
    return Item(
        "Users who want different things",
        "One reward for all serves nobody whose wish is not the average; a direction does (figure 2).",
        YES if all(wins) else OTHERWISE,
        f"a direction of one's own serves {sum(wins)} of three better on every seed, weights of one's own "
        f"{sum(weights)}",
        [[["vᵀ(helpfulness, verbosity), mean and span of three seeds", *figures["few words"]], *rows]],
        figures=figures,
    )


def fronts(work: Path) -> Item:
    """What `fronts.py` has published."""
    published = json.loads((RESULTS / "fronts.json").read_text())["figures"]
    compared, wins = published["compared"], published["wins against SFT, and verbosity"]
    volumes = {name.removeprefix("volume "): of for name, of in compared.items() if name.startswith("volume ")}
    rows = [
        [name, f"{of['mean']:.3f} ({of['interval'][0]:.3f} to {of['interval'][1]:.3f})"] for name, of in volumes.items()
    ]
    rivals_ = ("SFT", "DPO", "SteerLM")
    first = next((t for t in (1, 2, 3, 4) if all(compared[f"t{t} above {of}"]["interval"][0] > 0 for of in rivals_)), 0)
    order = {t: volumes[f"t{t} - t{t - 1}"]["interval"] for t in (1, 2, 3, 4)}
    grows = [f"t{t}" for t, (low, _) in order.items() if low > 0]
    covered = sorted(("vectors", "SteerLM", *evidence.fronts.ITERATIONS), key=lambda name: volumes[name]["mean"])
    best = {name: max(of, key=lambda point: point[0]) for name, of in wins.items()}
    most = "; ".join(f"{name} {short(rate)}, {short(length)}" for name, (rate, length) in best.items())
    FOLDER.mkdir(exist_ok=True)
    _wins(FOLDER / "wins.png", wins)
    return Item(
        "Fronts",
        "From t ≥ 1 the front of the policy that is asked dominates SFT, DPO and SteerLM, and each front the one "
        "before (figure 4); figure 5 sets wins beside lengths. Vectors were not compared.",
        YES if first == 1 and len(grows) == 4 else OTHERWISE if first else NO,
        f"above SFT, DPO and SteerLM at their own verbosities, intervals apart from 0: "
        f"{f'from t{first} on' if first else 'never'}; more covered than by the iteration before: "
        f"{', '.join(grows) or 'none'}; by area, least first: {', '.join(covered)}. Highest rate of wins against SFT, "
        f"and the verbosity there: {most}",
        [[["", "area dominated (95 %)"], *rows]],
        {
            "../results/fronts.png": "fronts, what an angle does, reward model against oracle",
            "wins.png": "how often an answer is more helpful than the start policy's, against how verbose it is",
        },
        {"areas": volumes, "wins against SFT, and verbosity": wins},
    )


def _wins(file: Path, wins: Mapping[str, Sequence[Sequence[float]]]) -> None:
    picture = Figure(figsize=(5.4, 3.8), layout="constrained")
    panel = picture.subplots()
    for name, of in wins.items():
        rates, lengths = zip(*of[: evidence.fronts.TARGETS] if name == "SteerLM" else of, strict=True)
        colour, mark = evidence.fronts.STYLES[name]
        panel.plot(lengths, rates, mark, color=colour, markersize=4.5, linewidth=1.2, label=name)
    panel.axhline(0.5, color="#bbbbbb", linewidth=1, zorder=0)
    panel.set(xlabel="verbosity", ylabel="wins against SFT, by helpfulness")
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, fontsize=7.5)
    picture.savefig(file, dpi=150)


# --- the first paper's open questions ---


def open_questions(work: Path) -> Item:
    """Weights without a sweep, and composition that knows of interference."""
    tune = json.loads((RESULTS / "tune.json").read_text())["figures"]
    sums = [of for name, of in tune.items() if name.startswith("seed")]
    composed = each(work, "composed")
    from composition import SIZES, WAYS
    from composition import told as kept

    figures = {size: {way.label: kept(composed, size, way) for way in WAYS} for size in SIZES}
    rows = [
        [str(size), *(f"{of['mean gain']:.2f}, {of['worst']:.2f}, {of['well_formed']:.0%}" for of in ways.values())]
        for size, ways in figures.items()
    ]
    beaten = {
        size: [
            label
            for label, of in ways.items()
            if of["worst"] - ways["exact"]["worst"]
            > of["worst, deviation over seeds"] + ways["exact"]["worst, deviation over seeds"]
        ]
        for size, ways in figures.items()
    }
    shares = [of["tune's share of the grid's time"] for of in sums]
    equal = all(of["tune: score"] >= of["grid: score"] - 1e-9 for of in sums)
    winners = sorted({label for labels in beaten.values() for label in labels})
    return Item(
        "Weights without sweeps, and composition",
        "Open questions of the first paper: how to choose η without a sweep; how to compose knowing of interference.",
        "Answered in small" if equal else OTHERWISE,
        f"`tune` chose as well as the best of 25 points on {'all' if equal else 'not all'} of three seeds, in "
        f"{short(min(shares))} to {short(max(shares))} of the time. By the worst preference's gain, beyond "
        "the spread of "
        f"seeds, addition is beaten by: {', '.join(winners) or 'none'} ({beaten})",
        [[["preferences", *(f"{way.label}: mean gain, worst, well-formed" for way in WAYS)], *rows]],
        figures={"tune": tune, "composition": figures},
    )
