"""How far vectors go, each and two at once, before something breaks that nobody asked to change; and how straight."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

from lora_align import runs
from lora_align.console import Screen, table
from lora_align.errors import UserError
from lora_align.evaluate.figures import figures
from lora_align.evaluate.measure import Evaluator
from lora_align.policy import safe_ranges
from lora_align.policy.policy import START
from lora_align.recipe import Recipe
from lora_align.runs import Manifest, Run

STEP, STEPS = 0.5, 8  # weights that are tried: so far apart, so many
SIGNS = tuple(product((1.0, -1.0), repeat=2))  # of two weights that are turned alike
TRIED = (-1.0, -0.5, 0.5, 1.0)  # weights that margins are looked at
KL = "KL a token"
Weights = Mapping[str, float]


@dataclass(frozen=True)
class Limits:
    """What breaks: so many nats a token from the start policy, so many lost on ordinary text, and by how much a share
    may be worse: of answers that end, repeat themselves, are well formed, of facts that are known or told truly, of
    safe prompts that are refused."""

    kl: float
    loss: float
    share: float

    def broken(self, start: Mapping[str, float], now: Mapping[str, float]) -> str:
        """The first that is, or nothing; figures that are not known are not looked at."""
        worse = {KL: self.kl, "text loss": self.loss, "repeated": self.share, "refused safe": self.share}
        kept = ("ended", "facts known", "oracle: well-formed", "oracle: true facts")
        worse |= dict.fromkeys(kept, -self.share)
        for name, most in worse.items():
            before, after = start.get(name), now.get(name)
            if before is not None and after is not None and (after - before) * (1 if most > 0 else -1) > abs(most):
                return f"{name} {before:.2f} → {after:.2f}"
        return ""


@dataclass(frozen=True)
class Side:
    """The last weight that is good, and what breaks at the next; nothing where none did."""

    to: float
    breaks: str


class Walk:
    """Weights, tried one after the other; whoever was measured once is not measured again."""

    def __init__(self, evaluator: Evaluator, limits: Limits, report: Callable[[str], None]) -> None:
        self.evaluator, self.limits, self.report = evaluator, limits, report
        [self.policy] = evaluator.policies.policies
        self.start = self._look({})
        self.liked: dict[frozenset[tuple[str, float]], dict[str, float]] = {}

    def side(self, one: Weights) -> Side:
        """How many times these weights, step by step: what breaks may hold again farther out."""
        for step in range(1, STEPS + 1):
            told = {name: STEP * step * weight for name, weight in one.items()}
            self.report(",".join(f"{name}={weight:g}" for name, weight in told.items()))
            if found := self.limits.broken(self.start, self._look(told)):
                return Side(STEP * (step - 1), found)
        return Side(STEP * STEPS, "")

    def margins(self, weights: Weights) -> dict[str, float]:
        """Each preference's mean margin on held-out pairs; read once, as every pair asks for those of its two."""
        key = frozenset(weights.items())
        if key not in self.liked:
            now = self.evaluator.likes(self.policy.at(weights))
            before = self.evaluator.start_likes
            self.liked[key] = {name: float((likes - before[name]).nanmean()) for name, likes in now.items()}
        return self.liked[key]

    def _look(self, weights: Weights) -> dict[str, float]:
        name = ",".join(f"{name}={weight:g}" for name, weight in weights.items()) or START
        found = self.evaluator.measured(self.policy.at(weights, name))
        tokens = sum(row["tokens"] for row in found.answers)
        kl = sum(row["kl"] for row in found.answers) / max(tokens, 1)
        return {**{name: figure.value for name, figure in figures(found).items()}, KL: kl}


def find_reach(
    names: Sequence[str],
    limits: Limits,
    recipe: Recipe,
    runs_dir: Path,
    screen: Screen,
    evaluator: Evaluator,
    *,
    name: str,
    force: bool,
) -> Run:
    """Walk out from the start policy along every vector, both ways, and along every two of them; publish how far."""
    target = runs_dir / safe_ranges.FOLDER / name
    runs.refuse_existing(target, force)
    if evaluator.test_set.sampling.temperature != 1:
        raise UserError("reach: the KL divergence it goes by needs answers as they are drawn; set eval.temperature=1")
    for lack in evaluator.test_set.lacks:
        screen.warn(lack)
    pairs = list(combinations(names, 2))
    most = STEPS * (2 * len(names) + len(SIGNS) * len(pairs))
    with (
        runs.staging_folder(target, screen, force=force) as staging,
        screen.progress("looks", most) as progress,
    ):
        looks = iter(range(10**9))
        walk = Walk(evaluator, limits, lambda where: progress.show(next(looks), {"at": where}))
        alone = {
            one: {"up": asdict(walk.side({one: 1.0})), "down": asdict(walk.side({one: -1.0}))} | _line(walk, one)
            for one in names
        }
        together = [{"names": pair, "sides": _quarters(walk, pair), "term": _term(walk, pair)} for pair in pairs]
        progress.show(most, {})
        found = {"alone": alone, "together": together, "limits": asdict(limits)}
        made_of = {name: evaluator.policies.vectors[name].lineage() for name in names}
        base = evaluator.base.identity
        manifest = Manifest(
            stage="reach", base=base, recipe=recipe.as_dict(), method={"vectors": made_of}, metrics=found
        )
        return runs.publish(staging, target, manifest)


def _quarters(walk: Walk, pair: tuple[str, str]) -> list[dict[str, Any]]:
    """How far two weights may be turned alike, each up or down."""
    return [{"signs": signs, **asdict(walk.side(dict(zip(pair, signs, strict=True))))} for signs in SIGNS]


def _line(walk: Walk, name: str) -> dict[str, float]:
    """Nats of margin for a weight of 1, and how much of the margins a straight line through the start policy tells."""
    margins = [walk.margins({name: weight})[name] for weight in TRIED]
    slope = sum(w * m for w, m in zip(TRIED, margins, strict=True)) / sum(w * w for w in TRIED)
    points = [(0.0, 0.0), *zip(TRIED, margins, strict=True)]
    mean = sum(m for _, m in points) / len(points)
    off = sum((m - slope * w) ** 2 for w, m in points)
    return {"slope": slope, "r2": 1 - off / max(sum((m - mean) ** 2 for _, m in points), 1e-12)}


def _term(walk: Walk, pair: tuple[str, str]) -> dict[str, float]:
    """Of each one's margin what is neither's own doing: the coefficient of the product of both weights."""
    both = walk.margins(dict.fromkeys(pair, 1.0))
    each = [walk.margins({name: 1.0}) for name in pair]
    return {name: both[name] - sum(of[name] for of in each) for name in pair}


def summary(made: Run) -> str:
    """A line a vector, a line a pair."""
    found = made.manifest.metrics
    rows = [
        [name, _side(of["down"], -1), _side(of["up"]), f"{of['slope']:.2f}", f"{of['r2']:.3f}"]
        for name, of in found["alone"].items()
    ]
    parts = [table(["", "from", "to", "margin by weight", "R²"], rows)]
    if found["together"]:
        sides = [
            [
                ", ".join(f"{name} {way(sign)}" for name, sign in zip(of["names"], side["signs"], strict=True)),
                _side(side),
            ]
            for of in found["together"]
            for side in of["sides"]
        ]
        terms = [
            [" and ".join(of["names"]), *(f"{of['term'][name]:+.2f}" for name in of["names"])]
            for of in found["together"]
        ]
        parts.append(table(["turned alike", "to"], sides))
        parts.append(table(["η₁η₂", "in the first's margin", "in the second's"], terms))
    return "\n\n".join([*parts, f"{made.path}: merge and chat warn beyond"])


def way(sign: float) -> str:
    """As tables have it."""
    return "up" if sign > 0 else "down"


def _side(side: Mapping[str, Any], sign: int = 1) -> str:
    return f"{sign * side['to'] + 0.0:g}" + (f" ({side['breaks']})" if side["breaks"] else " and more")
