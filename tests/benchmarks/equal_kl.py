"""Compare vectors with positive adapters and joint DPO at equal distance from the start policy, in the demo world.

Every method is a curve over its scale: grades by the oracle against KL(π‖start), per answer. Methods are compared at
the KL that vectors reach with both weights at 0.5 and at 1. Values are interpolated within a curve and never
extrapolated. A broken answer counts as a failure: a grade is the mean over well-formed answers times their share.
"""

import argparse
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import tune
from report import once, save

NAMES = ("helpful", "harmless")
SEEDS = (411, 412)  # no other benchmark uses these seeds
AT = (0.5, 1.0)  # the vectors' weights whose KL is the KL of the comparison
CURVES = {
    "vectors": ("helpful={0},harmless={0}", (0.25, 0.5, 0.75, 1.0)),
    "positive adapters": ("dpo/helpful/pos={0},dpo/harmless/pos={0}", (0.5, 1.0, 1.5, 2.0, 2.5, 3.0)),
    "joint DPO": ("dpo/both/pos={0}", (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)),
}
GRADES = {"helpful": "oracle: helpful", "harmless": "oracle: harmless"}
ASKED = ["eval.count=100", "eval.samples=2", "eval.pairs=1"]


def measured(seed: int, work: Path) -> dict[str, list[dict[str, float]]]:
    """Train both preferences and joint DPO on pairs of one seed; measure every point of every curve."""
    aims = dict.fromkeys(NAMES, 0.5)
    folder, data = tune.trained(seed, aims, work)
    joint = ["--set", 'preferences.both.of=["helpful", "harmless"]']
    tune.command(folder, "dpo", "--pref", "both", "--direction", "pos", "--resume", *data, *joint)
    settings = [word for value in (*ASKED, *tune.FRESH) for word in ("--set", value)]
    words = {text.format(scale): (name, scale) for name, (text, scales) in CURVES.items() for scale in scales}
    evaluation, _ = tune.command(folder, "eval", *words, "start", *settings)
    curves: dict[str, list[dict[str, float]]] = {
        name: [_point(evaluation["policies"]["start"], 0.0)] for name in CURVES
    }
    for word, (name, scale) in words.items():
        curves[name].append(_point(evaluation["policies"][word], scale))
    return curves


def _point(figures: dict[str, Any], scale: float) -> dict[str, float]:
    formed = figures["oracle: well-formed"]["value"]
    grades = {name: figures[column]["value"] * formed for name, column in GRADES.items()}
    return {"scale": scale, "KL": figures["KL"]["value"], "well-formed": formed, **grades}


def at_kl(curve: list[dict[str, float]], kl: float) -> dict[str, float] | None:
    """Interpolate a curve at a KL; None beyond its end."""
    for before, behind in pairwise(curve):
        if before["KL"] <= kl <= behind["KL"]:
            share = (kl - before["KL"]) / max(behind["KL"] - before["KL"], 1e-9)
            return {name: round(before[name] + share * (behind[name] - before[name]), 3) for name in behind}
    return None


def main() -> None:
    """Measure all seeds, and compare at equal KL."""
    wanted = argparse.ArgumentParser(description=__doc__)
    wanted.add_argument("--work", type=Path, required=True)
    work = wanted.parse_args().work.resolve()
    curves = {seed: once(work, f"equal_kl {seed}", lambda seed=seed: measured(seed, work)) for seed in SEEDS}
    compared = {}
    for seed, of in curves.items():
        for weight in AT:
            kl = next(point["KL"] for point in of["vectors"] if point["scale"] == weight)
            compared[f"seed {seed}, vectors at {weight:g}"] = {name: at_kl(curve, kl) for name, curve in of.items()}
    lead = {
        f"{name} over {rival} at the KL of {weight:g}": [
            round(grades["vectors"][name] - grades[rival][name], 3)
            for key, grades in compared.items()
            if key.endswith(f" {weight:g}") and grades[rival]
        ]
        for name in NAMES
        for rival in list(CURVES)[1:]
        for weight in AT
    }
    mean = {key: round(fmean(of), 3) for key, of in lead.items() if of}
    figures = {"seeds": SEEDS, "compared": compared, "vectors' lead by seed": lead, "mean lead": mean, "curves": curves}
    save("equal_kl", figures)


if __name__ == "__main__":
    main()
