"""Compare policies conditioned on a direction with their baselines on helpfulness and verbosity, in the demo world.

For each data seed the script trains a reward model, a SteerLM-style policy, four iterations of `rsf` (timed as a user
would wait for them), DPO on helpfulness, and mixes of preference vectors. All policies answer prompts outside the
training data; the oracle and the reward model grade the answers. Runs and measurements are stored in --work, so that a
stopped run continues where it stopped. Published figures use test prompts and unused data seeds (`--development` uses
others).
"""

import argparse
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray
from report import RESULTS, once, save

from lora_align import recipe, runs
from lora_align.commands import merge
from lora_align.console import Screen
from lora_align.data.rows import Message, Prompt, with_system_prompt
from lora_align.demo import measurement, oracle, world
from lora_align.metrics import intervals, plots, score_quality
from lora_align.model import base as bases
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy import judges, vectors
from lora_align.policy.policy import Policy
from lora_align.policy.policy_set import PolicySet
from lora_align.rankers import Direction
from lora_align.rsf import inputs, loop
from lora_align.runs import Run
from lora_align.train import dpo, reward
from lora_align.want_direction import Want, scores_message

SEEDS, DEVELOPMENT_SEEDS = (207, 208, 209), (1,)
PROMPTS, SAMPLES, DIRECTIONS, TARGETS = 200, 2, 10, 5
LONG = 6  # epochs of the SteerLM baseline
OBJECTIVES = ("helpfulness", "verbosity")
INFEASIBLE = {"helpfulness": 100.0, "verbosity": 0.0}
# Names in the stored results. The paper counts from 1, and `rsf` does so now: t0 here is t1 there.
ITERATIONS = [f"t{t}" for t in range(5)]
MADE_AS = {label: f"t{t}" for t, label in enumerate(ITERATIONS, 1)}
RESAMPLED = 2000  # times the prompts are resampled for intervals
Answers = NDArray[np.float64]  # [directions or targets, prompts, samples, FIELDS]
FIELDS = ("helpfulness", "verbosity", "well-formed", "judged helpfulness", "judged verbosity")
Front = NDArray[np.float64]  # [points, (helpfulness, verbosity)]
STYLES = {  # each policy's colour, and the marker of its points
    **{f"t{t}": (shade, "o-") for t, shade in enumerate(["#c6d4ea", "#98b3d9", "#6a91c8", "#3f6cb0", "#1f4e9c"])},
    "SteerLM": ("#c2410c", "s--"),
    "vectors": ("#4d7c0f", "d--"),
    "SFT": ("black", "*"),
    "DPO": ("#7c3aed", "P"),
}


@dataclass(frozen=True)
class Bench:
    """Hold the work folder, the prompts' part, the data seeds and the overrides."""

    work: Path
    part: world.Part
    seeds: Sequence[int]
    overrides: Sequence[str]

    def project(self, seed: int, *more: str) -> recipe.Recipe:
        """Load the demo's recipe with data of one seed."""
        overrides = [f"rsf.iterations={len(ITERATIONS)}", *self.overrides, *more]
        demo = recipe.load(recipe.builtin()["demo"], overrides)
        assert demo.rsf is not None
        assert demo.reward is not None
        sources = {
            "reward.ratings.demo.data": demo.reward.ratings["demo"].data,
            "preferences.helpful.data": demo.preferences["helpful"].data,
            "preferences.brief.data": demo.preferences["brief"].data,
            "rsf.data": demo.rsf.data,
        }
        data = {key: f"{source}&seed={seed}" for key, source in sources.items()}
        return recipe.load(recipe.builtin()["demo"], [*overrides, *(f'{key}="{text}"' for key, text in data.items())])

    def runs(self, seed: int) -> Path:
        """Return the workspace of one data seed."""
        return self.work / f"seed{seed}"


def directions(project: recipe.Recipe) -> list[Want]:
    """Return evenly spaced angles over the recipe's training region, from helpfulness alone towards brevity."""
    assert project.rsf is not None
    helpfulness, verbosity = (project.rsf.directions[name] for name in OBJECTIVES)
    by_help = [math.degrees(math.acos(bound)) for bound in reversed(helpfulness)]
    by_brevity = [math.degrees(math.asin(-bound)) for bound in reversed(verbosity)]
    first, last = max(by_help[0], by_brevity[0]), min(by_help[1], by_brevity[1])
    return [at(first + (last - first) * step / (DIRECTIONS - 1)) for step in range(DIRECTIONS)]


def at(angle: float) -> Want:
    """Return the direction at this angle in degrees, from helpfulness alone towards brevity."""
    return Want({"helpfulness": math.cos(math.radians(angle)), "verbosity": -math.sin(math.radians(angle))})


def targets(steerlm: Run) -> list[dict[str, float]]:
    """Return five verbosities over SteerLM's training range, each with the highest helpfulness near it in the data."""
    seen = np.array(
        [[row[name] for name in OBJECTIVES] for row in json.loads((steerlm.path / loop.SCORES).read_text())]
    )
    wanted = np.quantile(seen[:, 1], np.linspace(0.1, 0.9, TARGETS))
    best = [float(seen[abs(seen[:, 1] - verbosity) < 5, 0].max()) for verbosity in wanted]
    return [dict(zip(OBJECTIVES, pair, strict=True)) for pair in zip(best, map(float, wanted), strict=True)]


# --- training ---


def miniature(bench: Bench, seed: int) -> dict[str, float]:
    """Train a direction-conditioned policy from the base; return the seconds of the reward model and of `rsf`."""
    project, folder, began = bench.project(seed), bench.runs(seed), time.perf_counter()
    reward.train_reward_model(project, folder, Screen(), force=True)
    judged = time.perf_counter()
    loop.train_rsf(project, folder, Screen(), force=True)
    return {"reward": judged - began, "rsf": time.perf_counter() - judged}


def steerlm(bench: Bench, seed: int) -> Run:
    """Train SteerLM on the bootstrap's data for more epochs, as a baseline and not as a first step."""
    longer = [f"rsf.epochs={LONG}", "rsf.prompts=8", "rsf.iterations=1"]  # the shortest possible iteration
    folder = bench.runs(seed) / "rsf" / "rival"
    if not runs.is_run(folder / loop.STEERLM):
        loop.train_rsf(bench.project(seed, *longer), bench.runs(seed), Screen(), name="rival")
    return runs.read(folder / loop.STEERLM)


def rivals(bench: Bench, seed: int) -> list[Run]:
    """Train DPO on helpfulness alone, and mix helpful and brief at every direction's weights."""
    project, folder = bench.project(seed), bench.runs(seed)
    for name in ("helpful", "brief"):
        missing = [side for side in Direction if not runs.is_run(folder / "dpo" / name / side.value)]
        if missing:
            dpo.train_dpo(project, [name], missing, folder, Screen(), resume=True)
    made = [runs.read(folder / "dpo" / "helpful" / "pos")]
    for number, wanted in enumerate(directions(project)):
        name = f"direction{number}"
        if not runs.is_run(folder / "mix" / name):
            weights = {"helpful": wanted.weights["helpfulness"], "brief": -wanted.weights["verbosity"]}
            merge.merge_adapters(weights, project, folder, Screen(quiet=True), name=name)
        made.append(runs.read(folder / "mix" / name))
    return made


# --- measurement ---


def answers(bench: Bench, seed: int, policy: Run | None, systems: Sequence[str]) -> list[Any]:
    """Grade a policy's answers under each system message: 0 to 1 by the oracle, 0 to 100 by the reward model."""
    policies = _policies(bench, seed, policy)
    prompts = [prompt for prompt in measurement.questions(seed, PROMPTS, part=bench.part) if not prompt.risky]
    return [graded_answers(policies, prompts, system, seed) for system in systems]


def _policies(bench: Bench, seed: int, policy: Run | None) -> PolicySet:
    base = bases.find(bench.project(seed).base)
    vector = {"policy": vectors.from_folder(policy.path, "policy")} if policy else {}
    judge = judges.reward(base, bench.runs(seed), reward.NAME)
    return PolicySet(base, [Policy("policy", vector, dict.fromkeys(vector, 1.0))], None, {"reward": judge})


def graded_answers(
    policies: PolicySet, questions: Sequence[oracle.Prompt], system: str, seed: int
) -> list[list[list[float]]]:
    """Return the grades under one system message, [prompts, samples, FIELDS]."""
    prompts: list[Prompt] = [(Message("user", prompt.text),) for prompt in questions]
    sampling = Sampling(1.0, 1.0, measurement.LONGEST, seed)
    policies.activate(policies.policies[0])
    drawn = policies.sampler.draw([with_system_prompt(system, prompt) for prompt in prompts], SAMPLES, sampling)
    samples = sorted((answer.prompt, answer.number, answer.text) for batch in drawn for answer in batch)
    judged = policies.score("reward", [(prompts[prompt], text) for prompt, _, text in samples])
    graded: list[list[list[float]]] = [[] for _ in questions]
    for (prompt, _, text), scores in zip(samples, judged, strict=True):
        score = oracle.score(questions[prompt], text)
        grades = [score.grades[name] for name in OBJECTIVES]
        graded[prompt].append([*grades, float(score.well_formed), *(scores[name] for name in OBJECTIVES)])
    return graded


def heads(bench: Bench, seed: int) -> dict[str, float]:
    """Return each head's Spearman with the oracle on fresh answers: helpful on safe prompts, harmless on risky ones."""
    base = bases.find(bench.project(seed).base)
    policies = _policies(bench, seed, None)
    questions = measurement.questions(seed, PROMPTS, part=bench.part)
    texts = measurement.answers(policies.model, base, questions, SAMPLES, seed)
    answered = [(prompt, text) for prompt, some in zip(questions, texts, strict=True) for text in some]
    scores = policies.score("reward", [((Message("user", prompt.text),), text) for prompt, text in answered])
    scored = [(prompt, oracle.score(prompt, text)) for prompt, text in answered]
    correlations = {}
    for preference, axis in oracle.AXES.items():
        name = axis.removeprefix("-")
        only = measurement.ONLY_ON.get(preference)
        rows = [i for i, (prompt, score) in enumerate(scored) if score.well_formed and only in (None, prompt.risky)]
        truth = torch.tensor([scored[i][1].grades[name] for i in rows], dtype=torch.float64)
        head = torch.tensor([scores[row][name] for row in rows], dtype=torch.float64)
        correlations[name] = float(score_quality.rank_correlations(torch.stack([head, truth], 1))[0, 1])
    return correlations


def measured(bench: Bench, seed: int) -> dict[str, Answers]:
    """Grade every policy's answers under all of its directions or targets."""
    project = bench.project(seed)
    assert project.rsf is not None
    ask, steer = project.rsf.ask, project.rsf.steer
    wants = [wanted.system_message(ask) for wanted in directions(project)]
    folder = bench.runs(seed) / "rsf" / inputs.NAME
    steered = steerlm(bench, seed)
    scores = [scores_message(score, steer) for score in (*targets(steered), INFEASIBLE)]
    helpful, *mixes = rivals(bench, seed)
    jobs: dict[str, list[tuple[Run | None, list[str]]]] = {
        "SFT": [(None, [""])],
        "DPO": [(helpful, [""])],
        "vectors": [(made, [""]) for made in mixes],
        "SteerLM": [(steered, scores)],
        **{label: [(runs.read(folder / MADE_AS[label]), wants)] for label in ITERATIONS},
    }
    return {
        label: np.array(
            once(
                bench.work,
                f"seed{seed}-{label}",
                lambda parts=parts: [row for policy, systems in parts for row in answers(bench, seed, policy, systems)],
            )
        )
        for label, parts in jobs.items()
    }


# --- analysis ---


def points(graded: Answers, weights: NDArray[np.float64] | None = None) -> Front:
    """Return the mean grades of the well-formed answers to each direction or target, with weighted prompts."""
    formed = graded[..., 2] * (1.0 if weights is None else weights[:, None])
    return np.stack([(graded[..., field] * formed).sum((1, 2)) / formed.sum((1, 2)) for field in (0, 1)], 1)


def volume(front: Front) -> float:
    """Return the area of (helpfulness, verbosity) that the front dominates, out of 1."""
    area = best = 0.0
    ordered = front[front[:, 1].argsort()]
    edges = [*ordered[1:, 1], 1.0]
    for (helpfulness, verbosity), edge in zip(ordered, edges, strict=True):
        best = max(best, float(helpfulness))
        area += best * float(edge - verbosity)
    return area


def gaps(front: Front, others: Front) -> NDArray[np.float64]:
    """Return the front's gain in helpfulness at each verbosity of the other front that it reaches."""
    ordered = front[front[:, 1].argsort()]
    compared = others[others[:, 1] >= ordered[0, 1]]
    reached: NDArray[np.float64] = np.interp(compared[:, 1], ordered[:, 1], np.maximum.accumulate(ordered[:, 0]))
    return reached - compared[:, 0]


def interval(values: Sequence[float]) -> list[float]:
    """Return the middle 95 %."""
    return [round(float(edge), 4) for edge in np.quantile(values, (0.025, 0.975))]


def prompts_of(bench: Bench) -> NDArray[np.int64]:
    """Return each prompt's index among the distinct prompts, [seeds, prompts]: seeds share some prompts."""
    texts = [
        prompt.text
        for seed in bench.seeds
        for prompt in measurement.questions(seed, PROMPTS, part=bench.part)
        if not prompt.risky
    ]
    _, which = np.unique(texts, return_inverse=True)
    return which.reshape(len(bench.seeds), PROMPTS)


def resampled(seeds: Sequence[Mapping[str, Answers]], which: NDArray[np.int64]) -> Iterator[list[dict[str, Front]]]:
    """Yield every policy's points, seed by seed, with resampled prompts.

    One sample of prompts serves all policies, and all seeds that have these prompts.
    """
    draw, count = np.random.default_rng(0), int(which.max()) + 1
    for _ in range(RESAMPLED):
        drawn = draw.multinomial(count, np.full(count, 1 / count)).astype(float)
        yield [
            {label: points(one, drawn[indices]) for label, one in seed.items()}
            for seed, indices in zip(seeds, which, strict=True)
        ]


def compared(seeds: Sequence[Mapping[str, Answers]], which: NDArray[np.int64]) -> dict[str, Any]:
    """Return volumes and gains as means over the seeds, with intervals over prompts."""
    figures: dict[str, Callable[[Mapping[str, Front]], float]] = {}
    for label in ("SFT", "DPO", "vectors", "SteerLM", *ITERATIONS):
        figures[f"volume {label}"] = lambda of, label=label: volume(of[label])
    for before, label in itertools.pairwise(ITERATIONS):
        figures[f"volume {label} - {before}"] = lambda of, a=label, b=before: volume(of[a]) - volume(of[b])
    for label in ITERATIONS[1:]:
        for rival in ("SFT", "DPO", "SteerLM", "vectors"):
            figures[f"{label} above {rival}"] = lambda of, a=label, b=rival: float(gaps(of[a], of[b]).mean())
            figures[f"{label} above {rival}, least"] = lambda of, a=label, b=rival: float(gaps(of[a], of[b]).min())
    fronts = [{label: points(one) for label, one in seed.items()} for seed in seeds]
    samples: dict[str, list[float]] = {name: [] for name in figures}
    for drawn in resampled(seeds, which):
        for name, figure in figures.items():
            samples[name].append(float(np.mean([figure(seed) for seed in drawn])))
    return {
        name: {
            "mean": round(float(np.mean([figure(seed) for seed in fronts])), 4),
            "interval": interval(samples[name]),
            "by seed": [round(figure(seed), 4) for seed in fronts],
        }
        for name, figure in figures.items()
    }


def wins(seeds: Sequence[Mapping[str, Answers]], which: NDArray[np.int64]) -> dict[str, list[list[float]]]:
    """Return each policy's win rate over the start policy in helpfulness, its interval over prompts, and the verbosity.

    There is one row for each direction or target. An answer that is not well formed has helpfulness 0.
    """

    def help_of(of: Answers) -> NDArray[np.float64]:
        return of[..., 0] * of[..., 2]

    by_policy: dict[str, list[list[float]]] = {}
    prompts = np.repeat(which.ravel(), SAMPLES).tolist()
    for label in seeds[0]:
        helped = np.stack([help_of(seed[label]) - help_of(seed["SFT"]) for seed in seeds], 1)  # [requests, seeds, ...]
        rates = [intervals.mean((0.5 + 0.5 * np.sign(of)).ravel().tolist(), prompts) for of in helped]
        lengths = np.mean([points(seed[label])[:, 1] for seed in seeds], 0)
        by_policy[label] = [
            [round(of.value, 4), round(of.low, 4), round(of.high, 4), round(float(length), 4)]
            for of, length in zip(rates, lengths, strict=True)
        ]
    return by_policy


def obeyed(seeds: Sequence[Mapping[str, Answers]], label: str) -> dict[str, Any]:
    """Return Spearman of the angle with the oracle's grades, sign reversed: more brevity should reduce both grades."""
    by_seed = [points(seed[label]) for seed in seeds]
    mean = np.mean(by_seed, 0)

    def correlation_of(front: Front) -> dict[str, float]:
        angles = np.arange(len(front))
        table = torch.tensor(np.stack([-angles, front[:, 0], front[:, 1]], 1))
        correlations = score_quality.rank_correlations(table)
        return {name: round(float(correlations[0, 1 + i]), 3) for i, name in enumerate(OBJECTIVES)}

    return {"mean of the seeds": correlation_of(mean), "by seed": [correlation_of(front) for front in by_seed]}


def judged(seeds: Sequence[Mapping[str, Answers]], wants: Sequence[Want]) -> dict[str, Any]:
    """Return vᵀr by the reward model and by the oracle, in points, as means over directions, prompts and seeds."""
    series: dict[str, Any] = {}
    weights = np.array([[wanted.weights[name] for name in OBJECTIVES] for wanted in wants])[:, None, None, :]
    for label in ITERATIONS:
        pairs = [(seed[label][..., 3:5], 100 * seed[label][..., 0:2], seed[label][..., 2]) for seed in seeds]
        model = [float(((predicted * weights).sum(-1) * formed).sum() / formed.sum()) for predicted, _, formed in pairs]
        truth = [float(((real * weights).sum(-1) * formed).sum() / formed.sum()) for _, real, formed in pairs]
        series[label] = {"reward model": model, "oracle": truth}
    means = {label: {key: float(np.mean(values)) for key, values in of.items()} for label, of in series.items()}
    steps = itertools.pairwise(ITERATIONS)
    over = [
        now
        for before, now in steps
        if means[now]["reward model"] > means[before]["reward model"] and means[now]["oracle"] < means[before]["oracle"]
    ]
    rounded = {
        label: {key: [round(v, 2) for v in values] for key, values in of.items()} for label, of in series.items()
    }
    return {"by seed": rounded, "over-optimised": over}


def infeasible(seeds: Sequence[Mapping[str, Answers]], label: str) -> dict[str, Any]:
    """Compare SteerLM at full helpfulness and no words with the last policy's directions; add well-formed shares."""
    extreme = [points(seed["SteerLM"])[-1] for seed in seeds]
    directed = np.mean([points(seed[label]) for seed in seeds], 0)
    formed = {name: round(float(np.mean([seed[name][..., 2].mean() for seed in seeds])), 4) for name in seeds[0]}
    answered = [round(float(value), 3) for value in np.mean(extreme, 0)]
    reached = float(gaps(directed, np.mean(extreme, 0)[None]).mean())
    return {"SteerLM answers": dict(zip(OBJECTIVES, answered, strict=True)), f"{label} above it": round(reached, 4)} | {
        "well-formed": formed
    }


def draw(seeds: Sequence[Mapping[str, Answers]], wants: Sequence[Want], rewards: Mapping[str, Any], file: Path) -> None:
    """Plot the fronts, the effect of the angle, and the reward model against the oracle."""
    picture, panels = plots.grid(3, (11 / 3, 3.8), margin=(0.0, 0.0), width_ratios=(1.4, 1, 1))
    fronts_of, angles_of, rewards_of = panels
    mean = {label: np.mean([points(seed[label]) for seed in seeds], 0) for label in seeds[0]}
    lines = {**mean, "SteerLM": mean["SteerLM"][:TARGETS]}
    for label, (colour, mark) in STYLES.items():
        size, name = (8 if len(lines[label]) == 1 else 4), {"DPO": "DPO, helpful"}.get(label, label)
        fronts_of.plot(*lines[label].T[::-1], mark, color=colour, markersize=size, linewidth=1.3, label=name)
    asked_too_much = mean["SteerLM"][-1]
    fronts_of.plot(*asked_too_much[::-1], "x", color=STYLES["SteerLM"][0], label="SteerLM, asked for 100 and 0")
    fronts_of.set_xlabel("verbosity")
    fronts_of.set_ylabel("helpfulness")
    fronts_of.legend(frameon=False, fontsize=7, loc="lower right")
    degrees = [math.degrees(math.atan2(-w.weights["verbosity"], w.weights["helpfulness"])) for w in wants]
    for column, (name, colour) in enumerate(zip(OBJECTIVES, ("#1f4e9c", "#c2410c"), strict=True)):
        for seed in seeds:
            angles_of.plot(degrees, points(seed[ITERATIONS[-1]])[:, column], color=colour, alpha=0.25, linewidth=1)
        angles_of.plot(degrees, mean[ITERATIONS[-1]][:, column], "o-", color=colour, markersize=3.5, label=name)
    angles_of.set_xlabel(f"angle asked of {ITERATIONS[-1]}, degrees")
    angles_of.set_ylabel("oracle's grade")
    angles_of.legend(frameon=False, fontsize=8)
    for number in range(len(seeds)):
        line = [[rewards["by seed"][label][key][number] for label in ITERATIONS] for key in ("reward model", "oracle")]
        rewards_of.plot(*line, "o-", color="#1f4e9c", alpha=0.6, markersize=3.5)
        for label, x, y in zip(ITERATIONS, *line, strict=True):
            rewards_of.annotate(label, (x, y), fontsize=7, xytext=(3, -8), textcoords="offset points")
    rewards_of.set_xlabel("value by the reward model, points")
    rewards_of.set_ylabel("value by the oracle, points")
    for panel in panels:
        plots.plain(panel)
    plots.save(picture, file)


def main() -> None:
    """Train, sample, grade, compare, save and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--only", type=int, metavar="SEED", help="measure this data seed and save nothing but --work")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    options = parser.parse_args()
    seeds = DEVELOPMENT_SEEDS if options.development else SEEDS
    bench = Bench(
        work=options.work,
        part="dev" if options.development else "test",
        seeds=(options.only,) if options.only else seeds,
        overrides=options.overrides,
    )
    wants = directions(bench.project(bench.seeds[0]))
    took = [once(bench.work, f"seed{seed}-seconds", lambda seed=seed: miniature(bench, seed)) for seed in bench.seeds]
    reward_heads = [once(bench.work, f"seed{seed}-heads", lambda seed=seed: heads(bench, seed)) for seed in bench.seeds]
    results = [measured(bench, seed) for seed in bench.seeds]
    if options.only:
        return
    rewards, which = judged(results, wants), prompts_of(bench)
    steered = [{**seed, "SteerLM": seed["SteerLM"][:TARGETS]} for seed in results]
    figures = {
        "prompts": f"{PROMPTS} safe prompts of part {bench.part}, {SAMPLES} answers each at temperature 1",
        "data seeds": list(bench.seeds),
        "angles": [math.degrees(math.acos(wanted.weights["helpfulness"])) for wanted in wants],
        "seconds": [{stage: round(seconds) for stage, seconds in one.items()} for one in took],
        "reward heads": {name: [round(one[name], 3) for one in reward_heads] for name in reward_heads[0]},
        "compared": compared(steered, which),
        "obeyed": {label: obeyed(results, label) for label in ITERATIONS},
        "wins against SFT, and verbosity": wins(results, which),
        "infeasible": infeasible(results, ITERATIONS[-1]),
        "rewards": rewards,
        "points": {label: [np.round(points(seed[label]), 3).tolist() for seed in results] for label in results[0]},
    }
    if options.development:
        print(json.dumps({key: value for key, value in figures.items() if key != "points"}, indent=1))
    else:
        save("fronts", figures)
    draw(results, wants, rewards, (bench.work if options.development else RESULTS) / "fronts.png")


if __name__ == "__main__":
    main()
