"""Build the first paper's items: effects of weights, baselines, the geometry of vectors, and their cost."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import evidence
from control import SEEDS, agreement, spearman
from evidence import CORRELATED, CORRELATIONS, FAR, NOISES, PAIR, REACHED, STEPS
from evidence_item import (
    FOLDER,
    Item,
    SeedEstimate,
    each,
    figure,
    moved,
    result_of,
    rises,
    seconds,
    short,
    span,
    verdict,
    yes,
)

from lora_align.adapters import peft_format
from lora_align.adapters.delta import LoraDelta
from lora_align.demo.oracle import AXES
from lora_align.metrics import plots
from lora_align.policy import vectors
from lora_align.policy.safe_ranges import up_or_down
from lora_align.rankers import Direction


def control(work: Path) -> Item:
    """Report both weights from -1 to 1."""
    seeds = each(work, "grid")
    at = {key: {name: figure([of[key] for of in seeds], name) for name in PAIR} for key in seeds[0]}
    grids = {name: [[at[f"{x:g},{y:g}"][name].value for x in STEPS] for y in STEPS] for name in PAIR}
    own = {
        name: [mean(at[f"{x:g},{y:g}"][name].value for x, y in _line(name, step)) for step in STEPS] for name in PAIR
    }
    plots.weight_map(FOLDER / "control.png", PAIR, (STEPS, STEPS), grids)
    ranks = {name: spearman(STEPS, own[name]) for name in PAIR}
    line = [[of[f"{step},{step}"] for of in seeds] for step in (-1, 0, 1)]
    rises = {name: [moved(b, a, name) for a, b in itertools.pairwise(line)] for name in PAIR}
    papers = {"-1,-1": "−1.07, −3.78", "0,0": "0.20, −2.12", "1,1": "1.99, 3.20"}
    rows = [
        [f"({key.replace(',', ', ').replace('-', '−')})", *(str(at[key][name]) for name in PAIR), papers[key]]
        for key in papers
    ]
    return Item(
        "The weights control it",
        "Over η in {−1, −0.5, 0, 0.5, 1}² both rewards rise with their weights (Llama-3.1-8B, reward models).",
        verdict(*(rise.higher for of in rises.values() for rise in of), *(rank == 1 for rank in ranks.values())),
        "; ".join(
            f"{name}: Spearman with its own weight, averaged over the other, {short(ranks[name])}; it rises from "
            f"(−1, −1) to (0, 0): {rises[name][0].answer}; from there to (1, 1): {rises[name][1].answer}"
            for name in PAIR
        ),
        [[["η of helpful, harmless", *PAIR, "the paper's rewards"], *rows]],
        {"control.png": "helpfulness and harmlessness over both weights"},
        {key: {name: asdict(of) for name, of in both.items()} for key, both in at.items()},
    )


def _line(name: str, step: float) -> list[tuple[float, float]]:
    return [(step, other) if name == PAIR[0] else (other, step) for other in STEPS]


RIVALS = {  # the paper's helpful, harmless, hours, refusals
    "vectors": "2.003, 3.250; 4 h; .101",
    "soup": "1.814, 5.573; 31 h; .189 (of PPO's policies)",
    "RLOO": "1.577, 5.444; 19 h; .212 (Safe-RLHF)",
    "joint DPO": ".718, −.445; 1 h; .067 (safe first)",
    "MODPO": "",
    "positive alone": "1.454, 1.265",
    "start": "0.20, −2.12 (η = 0)",
}


def rivals(work: Path) -> Item:
    """Build the main table."""
    found_by = {label: [of[label] for of in each(work, "rivals")] for label in RIVALS}
    names = (*PAIR, "refused", "well-formed")
    at = {label: {name: figure(found_by[label], name) for name in names} for label in RIVALS}
    took = {label: mean(_seconds(work, label, seed) for seed in SEEDS) for label in RIVALS}
    rows = [
        [{"start": "start, which is the raw base"}.get(label, label), *(str(at[label][name]) for name in names),
         f"{took[label]:.0f}", paper]
        for label, paper in RIVALS.items()
    ]  # fmt: skip
    gains = {
        label: {name: moved(found_by["vectors"], found_by[label], name) for name in names}
        for label in RIVALS
        if label != "vectors"
    }
    words = {"soup": "the soup", "RLOO": "online RL", "positive alone": "the positive adapters alone"}
    claims = {
        **{f"more helpful than {words[of]}": gains[of]["helpful"].higher for of in ("soup", "RLOO")},
        **{f"less harmless than {words[of]}": gains[of]["harmless"].lower for of in ("soup", "RLOO")},
        **{f"refuses less than {words[of]}": gains[of]["refused"].lower for of in ("soup", "RLOO")},
        **{
            f"better at both than {words.get(of, of)}": all(gains[of][name].higher for name in PAIR)
            for of in ("positive alone", "joint DPO")
        },
        **{f"trained in less time than {words[of]}": took["vectors"] < took[of] for of in ("soup", "RLOO")},
    }
    differences = [[f"vectors − {label}", *map(str, of.values())] for label, of in gains.items()]
    return Item(
        "Against other ways to be helpful and harmless",
        "Vectors are more helpful and refuse less than the RLHF ones, but are less harmless; better than the positive "
        "adapter alone; a few hours in place of a day.",
        verdict(*claims.values()),
        "; ".join(f"{claim}: {yes(holds)}" for claim, holds in claims.items())
        + ". Helpfulness is graded on safe prompts here and harmlessness on risky ones, so that nobody pays with "
        "the one for the other, as under the paper's reward models; that may be why the vectors are the most "
        "harmless, too. RLOO has the second of two settings that were tried, on another seed. This soup is of DPO's "
        "adapters and so needs half of what vectors do, the paper's of policies trained by PPO. Seconds are those "
        "of training, with a core each, without loading and what the start policy makes of the answers. MODPO, "
        f"which the paper has not, counts for no claim: it learns from the pairs of {PAIR[0]}, with a margin from "
        f"the adapter of {PAIR[1]} (whose seconds are added), each at a weight of a half. Safe-RLHF and BFPO were "
        "not tested",
        [
            [["", "helpful", "harmless", "safe prompts refused", "well-formed", "seconds", "the paper's"], *rows],
            [["prompt by prompt", *names], *differences],
        ],
        figures={label: {name: asdict(of) for name, of in all_.items()} for label, all_ in at.items()}
        | {f"vectors - {label}": {name: asdict(one) for name, one in of.items()} for label, of in gains.items()}
        | {"seconds": took},
    )


def _seconds(work: Path, label: str, seed: int) -> float:
    """Return the training seconds of a policy in the main table."""
    both = {side: sum(seconds(work / f"seed{seed}/dpo/{name}/{side.value}") for name in PAIR) for side in Direction}
    if label in ("soup", "positive alone"):
        return both[Direction.pos]
    if label == "RLOO":
        return sum(result_of(work, f"rloo 0.0 {seed}")[name] for name in ("reward", "both"))
    if label == "MODPO":
        return seconds(work / f"seed{seed}/dpo/{PAIR[1]}/pos") + float(result_of(work, f"modpo {seed}"))
    joint = seconds(work / f"seed{seed}/dpo/joint/pos")
    return {"vectors": sum(both.values()), "joint DPO": joint, "start": 0.0}[label]


def later(work: Path) -> Item:
    """Report what a third and a fourth preference change when they are added."""
    seeds = each(work, "later")
    names = (*PAIR, "polite", "brief", "well-formed")
    by_label = {label: [of[label] for of in seeds] for label in seeds[0]}
    at = {label: {name: figure(of, name) for name in names} for label, of in by_label.items()}
    two, four, start = " ".join(PAIR), " ".join((*PAIR, "polite", "brief")), ""
    gains = {name: moved(by_label[four], by_label[start], name) for name in ("polite", "brief")}
    price = {new: {name: moved(by_label[f"{two} {new}"], by_label[two], name) for name in PAIR} for new in gains} | {
        "both": {name: moved(by_label[four], by_label[two], name) for name in PAIR}
    }
    pays = {name: of.lower for name, of in price["both"].items()}
    papers = {start: "0.25, −2.27, −4.57, −1.58", two: "1.385, 3.585", four: "1.01, 2.67, 6.10, −0.07"}
    rows = [[label or "none", *(str(of[name]) for name in names), papers.get(label, "")] for label, of in at.items()]
    prices = [[f"adding {new}", *(str(of[name]) for name in PAIR)] for new, of in price.items()]
    return Item(
        "More preferences, added later",
        "Two more vectors are added without training the first two again; those pay for it (3B: helpful 1.385 → 1.01, "
        "harmless 3.585 → 2.67, with psychological −4.57 → 6.10 and honest −1.58 → −0.07).",
        verdict(*(of.higher for of in gains.values()), *pays.values()),
        "; ".join(f"{name} gains: {of.answer}" for name, of in gains.items())
        + "; "
        + "; ".join(f"{name} pays for both: {yes(of)}" for name, of in pays.items())
        + ", by what the second table says. Help is told in words, which `brief` takes away; manners take none, and "
        "what is harmless is as harmless in few",
        [
            [["vectors, with weight 1", *names, "the paper's: helpful, harmless, psychological, honest"], *rows],
            [["rise of, by", *PAIR], *prices],
        ],
        figures={label or "none": {name: asdict(of) for name, of in all_.items()} for label, all_ in at.items()}
        | {"price": {new: {name: asdict(one) for name, one in of.items()} for new, of in price.items()}},
    )


def geometry(work: Path) -> Item:
    """Report angles, interference, and agreement under label noise."""
    loaded = {name: [vectors.find(name, work / f"seed{seed}").load() for seed in SEEDS] for name in AXES}
    between = [helpful.cosine(harmless) for helpful, harmless in zip(*(loaded[name] for name in PAIR), strict=True)]
    every = [one[at].cosine(other[at]) for one, other in itertools.combinations(loaded.values(), 2) for at in
             range(len(SEEDS))]  # fmt: skip
    sides = {name: [_opposed(work / f"seed{seed}/dpo/{name}") for seed in SEEDS] for name in AXES}
    across = {name: agreement(of) for name, of in loaded.items()}
    apart = agreement([vectors.find("helpful", work / f"apart{seed}").load() for seed in SEEDS])
    noisy = {0.0: across["helpful"]}
    noisy |= {
        n: agreement([vectors.find("helpful", work / f"noise{n}-{seed}").load() for seed in SEEDS]) for n in NOISES
    }
    rewarded = {n: agreement([_difference(work / f"rloo{n}-{seed}") for seed in SEEDS]) for n in evidence.REWARD_NOISES}
    interference = each(work, "interference")
    sti = {
        label: {size: [one[size][when][key] for one in interference] for size in interference[0]}
        for label, (when, key) in STI.items()
    }
    agreed = [["labels exchanged", *(f"{n:g}" for n in noisy)]]
    agreed.append(["vectors of DPO", *(span(of) for of in noisy.values())])
    by_reward = (span(rewarded[n]) if n in rewarded else "" for n in noisy)
    agreed.append(["of RLOO (the paper's of PPO: 0.21 to 0.26)", *by_reward])
    _noise(FOLDER / "noise.png", noisy, rewarded)
    raw = list(sti["STI"].values())
    sti_spans = {label: {size: _span_of_three(of) for size, of in sizes.items()} for label, sizes in sti.items()}
    claims = {
        "Δ₊ and Δ₋ oppose each other for all eight": all(value < 0 for of in sides.values() for value in of),
        "helpful and harmless stand at an acute angle": min(between) > 0,
        "RLOO's agree less over seeds than DPO's": min(across["helpful"]) > max(rewarded[0.0]),
        "STI grows with the number": all(max(a) < min(b) for a, b in itertools.pairwise(raw)),
    }
    return Item(
        "Angles and interference",
        "cos(Δ₊, Δ₋) −0.47 to −0.71; cos of helpful and harmless 0.34 to 0.40; the same vector from three seeds "
        "0.98 to 1.00 (trained by PPO: 0.21 to 0.26); STI 0.41 for two preferences, 2.33 for four. Why DPO's agree is "
        "left open.",
        verdict(*claims.values()),
        "; ".join(f"{claim}: {yes(holds)}" for claim, holds in claims.items())
        + f". Helpful and harmless: {span(between)}; all 28 pairs of the eight: {span(every)}. "
        f"Helpful over three seeds, each with its own pairs: {span(across['helpful'])}; "
        f"with an A of its own, too: {span(apart)}; with random labels: {span(noisy[0.5])}. "
        "The first step down is the share of the common A, the second that of the labels. That helpful and harmless "
        "stand at right "
        "angles is a matter of the pairs, in which axes are independent (in those of item 6 they are not). All eight "
        "start from that A, and so read much the same directions of a layer's input, which STI counts as interference; "
        "`tsv` brings it to nothing by construction. RLOO was not tried on random labels",
        [
            [["", *AXES, "the paper's, of helpful and harmless"],
             ["cos(Δ₊, Δ₋)", *(span(of) for of in sides.values()), "−0.71 to −0.47"],
             ["over data seeds", *(span(of) for of in across.values()), "0.98 to 1.00"]],
            [["preferences", *sti["STI"]], ["the paper's STI", "0.41", "2.33", "", ""],
             *([label, *of.values()] for label, of in sti_spans.items())],
            agreed,
        ],
        {"noise.png": "agreement over seeds against label noise"},
        {"cos of directions": sides, "over seeds": across, "helpful, harmless": between, "all pairs": every,
         "A apart": apart, "noise": noisy, "noise, RLOO": rewarded, "STI": sti},
    )  # fmt: skip


STI = {"STI": ("before", "raw"), "by size": ("before", "by_size"), "STI as `tsv` mixes them": ("in tsv", "raw")}


def _span_of_three(values: Sequence[float]) -> str:
    low, high = (f"{of:.3f}" for of in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def _opposed(folder: Path) -> float:
    pos, neg = (peft_format.load(folder / side.value) for side in Direction)
    return pos.cosine(neg)


def _difference(folder: Path) -> LoraDelta:
    pos, neg = (peft_format.load(folder / side.value) for side in Direction)
    return pos - neg


def _noise(file: Path, noisy: Mapping[float, list[float]], rewarded: Mapping[float, list[float]]) -> None:
    picture, [panel] = plots.grid(1, (4.6, 3.2), margin=(0.0, 0.0))
    for label, colour, of in (("DPO", plots.INK, noisy), ("RLOO, reward model", plots.BROKEN, rewarded)):
        plots.plot(
            panel, list(of), [mean(values) for values in of.values()], colour, width=1.5, marker="o", label=label
        )
        for place, values in of.items():
            panel.plot([place] * len(values), values, "_", color=colour, alpha=0.6)
    panel.set(xlabel="share of labels exchanged", ylabel="cosine of helpful over data seeds", ylim=(-0.05, 1.05))
    plots.plain(panel)
    panel.legend(frameon=False)
    plots.save(picture, file)


def knowledge(work: Path) -> Item:
    """Report at which weights both vectors lose facts, and how linear their effects are."""
    seeds = each(work, "far")
    names = ("known", "true facts", "well-formed", *PAIR)
    at = {f"{eta:g}": {name: figure([of[f"{eta:g}"] for of in seeds], name) for name in names} for eta in FAR}
    papers = {"0": "0.65", "1": "0.65", "1.5": "0.65", "2": "0.60", "4": "0.25"}
    rows = [[eta, *(str(of[name]) for name in names), papers.get(eta, "")] for eta, of in at.items()]
    known = {eta: of["known"] for eta, of in at.items()}
    claims = {
        "flat, within 0.05, up to 1.5": all(
            abs(known[eta].value - known["0"].value) < 0.05 for eta in ("0.5", "1", "1.5")
        ),
        "less at 4 than at 0": moved(*([of[eta] for of in seeds] for eta in ("4", "0")), "known").lower,
        "by chance at 4": known["4"].low <= 0.25 <= known["4"].high,
    }
    reached = each(work, "reached")
    return Item(
        "Knowledge kept",
        "CommonsenseQA is flat at 0.65 up to η = 1.5, 0.60 at 2 and 0.25 at 4.",
        verdict(*claims.values()),
        "; ".join(f"{claim}: {yes(holds)}" for claim, holds in claims.items())
        + f"; here {short(known['0'].value)} at 0, {short(known['2'].value)} at 2, {short(known['4'].value)} at 4, "
        f"where {short(at['4']['well-formed'].value)} of the answers are well-formed: form goes first here, and facts "
        "are what the base has read most of. *known* is the share of facts found likelier than three that are not true "
        "of their subject (by chance 0.25), *true facts* that of the facts stated in well-formed answers; both weights "
        "are η. Below: how far `reach` finds each of three vectors, and each two, to go, and how straight margins are",
        [[["η", *names, "the paper's"], *rows], *_reached(reached)],
        figures={eta: {name: asdict(of) for name, of in all_.items()} for eta, all_ in at.items()} | {"reach": reached},
    )


def _reached(seeds: list[Any]) -> list[list[list[str]]]:
    """Return the tables of `reach`, seed by seed: the largest weights, what breaks beyond, and R² of margins."""

    def far(sides: list[Any], sign: int) -> str:
        ends = [f"{sign * side['to'] + 0.0:g}".replace("-", "−") for side in sides]
        return "; ".join(f"{to} ({side['breaks'] or 'and more'})" for to, side in zip(ends, sides, strict=True))

    alone = [
        [name, far([of["alone"][name]["down"] for of in seeds], -1), far([of["alone"][name]["up"] for of in seeds], 1),
         span([of["alone"][name]["r2"] for of in seeds])]
        for name in REACHED
    ]  # fmt: skip
    together = list(zip(*(of["together"] for of in seeds), strict=True))
    turned = [
        [", ".join(f"{name} {up_or_down(sign)}" for name, sign in zip(pairs[0]["names"], side["signs"], strict=True)),
         far([pair["sides"][at] for pair in pairs], 1)]
        for pairs in together for at, side in enumerate(pairs[0]["sides"])
    ]  # fmt: skip
    terms = [
        [" and ".join(pairs[0]["names"]),
         *(span([pair["term"][pair["names"][side]] for pair in pairs]) for side in (0, 1))]
        for pairs in together
    ]  # fmt: skip
    return [
        [["three seeds", "down to", "up to", "R² of its margin against η"], *alone],
        [["two, with equal weights", "to"], *turned],
        [["η₁η₂", "in the first's margin, nats", "in the second's"], *terms],
    ]


def correlation(work: Path) -> Item:
    """Report preferences that correlate in the data."""
    first, second = CORRELATED
    both = list(itertools.product(CORRELATED, repeat=2))
    rows: list[list[str]] = []
    figures: dict[float, dict[str, Any]] = {}
    for strength in CORRELATIONS:
        seeds = [result_of(work, f"correlated {strength} {seed}") for seed in SEEDS]
        cosines = [_together(work / (f"correlated{strength}-{seed}" if strength else f"seed{seed}")) for seed in SEEDS]
        by_prompt = {
            f"{one} moves {other}": rises([of[f"{one} 1"] for of in seeds], [of[f"{one} -1"] for of in seeds], other)
            for one, other in both
        }
        spans = {name: SeedEstimate.of(of) for name, of in by_prompt.items()}
        rows.append([short(strength), span(cosines), *map(str, spans.values())])
        figures[strength] = {"cosines": cosines, "spans": spans, "by prompt": by_prompt}
    ends = [figures[strength] for strength in (CORRELATIONS[0], CORRELATIONS[-1])]
    turned = max(ends[0]["cosines"]) < min(ends[1]["cosines"])
    leaks = {}
    for name in (f"{first} moves {second}", f"{second} moves {first}"):
        low, high = ([{"rise": seed} for seed in end["by prompt"][name]] for end in ends)
        leaks[name] = moved(high, low, "rise")
    return Item(
        "Two axes that go together",
        "Not in the paper: pairs in which two axes are correlated, from −0.8 to 0.8.",
        "They come together"
        if turned and all(of.higher for of in leaks.values())
        else "Mixed"
        if turned or any(of.higher for of in leaks.values())
        else "Apart",
        f"the vectors' cosine is larger at 0.8 than at −0.8 on every seed: {yes(turned)}; "
        + "; ".join(f"{name} more at 0.8 than at −0.8: {of.answer}" for name, of in leaks.items())
        + ". *moves* is what turning a weight from −1 to 1 adds to a grade",
        [[["correlation", f"cos of {first} and {second}", *(f"{one} moves {other}" for one, other in both)], *rows]],
        figures={
            strength: {"cosines": of["cosines"], "spans": {name: asdict(one) for name, one in of["spans"].items()}}
            for strength, of in figures.items()
        },
    )


def _together(folder: Path) -> float:
    first, second = (vectors.find(name, folder).load() for name in CORRELATED)
    return first.cosine(second)
