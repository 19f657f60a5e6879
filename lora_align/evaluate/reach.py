"""The command `reach`: find the largest weights before quality breaks, per vector and per pair of vectors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, count, product
from pathlib import Path

from lora_align import run_writer
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.evaluate.figures import figures
from lora_align.evaluate.grid import Weights, weights_text
from lora_align.evaluate.measure import Evaluator
from lora_align.policy.judges import column
from lora_align.policy.safe_ranges import PairReach, Reach, Side, VectorReach
from lora_align.recipe import Recipe
from lora_align.runs import Manifest

STEP, STEPS = 0.5, 8  # the weights tried on each side of 0
SIGNS = tuple(product((1.0, -1.0), repeat=2))  # the sign combinations of two weights of equal size
FIT = (-1.0, -0.5, 0.5, 1.0)  # weights at which the margins for the fitted line are measured
KL = "KL per token"
RISING, FALLING = ("repeated", "refused safe"), ("ended", "facts known")


@dataclass(frozen=True)
class Limits:
    """Limits of quality, relative to the start policy."""

    kl: float  # KL from the start policy, in nats per token
    loss: float  # maximum rise of the loss on ordinary text, in nats per token
    share: float  # maximum rise of a share in RISING, and maximum fall of a share in FALLING or of a judge's floor

    def broken(self, start: Mapping[str, float], now: Mapping[str, float], floors: Sequence[str] = ()) -> str:
        """Return the first figure that passes its limit, with both values; empty if none does."""
        rise = {KL: self.kl, "text loss": self.loss, **dict.fromkeys(RISING, self.share)}
        for name, most in {**rise, **dict.fromkeys((*FALLING, *floors), self.share)}.items():
            before, after = start.get(name), now.get(name)
            if before is not None and after is not None and (after - before) * (1 if name in rise else -1) > most:
                return f"{name} {before:.2f} → {after:.2f}"
        return ""


class Search:
    """Measure a policy at growing weights. Results are cached, because pairs share the weights of single vectors."""

    def __init__(self, evaluator: Evaluator, limits: Limits, report: Callable[[str], None]) -> None:
        self.evaluator, self.limits, self.report = evaluator, limits, report
        [self.policy] = evaluator.policies.policies
        judges = evaluator.policies.judges.items()
        self.floors = [column(name, floor) for name, judge in judges for floor in judge.floors]
        self.start = self._figures({})
        self.cached_margins: dict[frozenset[tuple[str, float]], dict[str, float]] = {}

    def side(self, direction: Weights) -> Side:
        """Increase weights along a direction, step by step, until a limit is broken."""
        for step in range(1, STEPS + 1):
            weights = {name: STEP * step * weight for name, weight in direction.items()}
            self.report(weights_text(weights))
            if broken := self.limits.broken(self.start, self._figures(weights), self.floors):
                return Side(STEP * (step - 1), broken)
        return Side(STEP * STEPS, "")

    def vector(self, name: str) -> VectorReach:
        """Return the reach of a vector, and the least-squares line of its margin through the start policy."""
        margins = {weight: self._margins({name: weight})[name] for weight in FIT}
        slope = sum(w * m for w, m in margins.items()) / sum(w * w for w in FIT)
        samples = {0.0: 0.0, **margins}
        mean = sum(samples.values()) / len(samples)
        residual = sum((m - slope * w) ** 2 for w, m in samples.items())
        r2 = 1 - residual / max(sum((m - mean) ** 2 for m in samples.values()), 1e-12)
        return VectorReach(self.side({name: 1.0}), self.side({name: -1.0}), slope, r2)

    def pair(self, names: tuple[str, str]) -> PairReach:
        """Return the reach of two vectors for each combination of signs, and their interaction at weights of 1."""
        sides = {signs: self.side(dict(zip(names, signs, strict=True))) for signs in SIGNS}
        both, single = self._margins(dict.fromkeys(names, 1.0)), [self._margins({name: 1.0}) for name in names]
        return PairReach(names, sides, {name: both[name] - sum(of[name] for of in single) for name in names})

    def _margins(self, weights: Weights) -> dict[str, float]:
        """Return the mean margin of each preference on its held-out pairs."""
        key = frozenset(weights.items())
        if key not in self.cached_margins:
            ratios, start = self.evaluator.pair_log_ratios(self.policy.at(weights)), self.evaluator.start_log_ratios
            self.cached_margins[key] = {name: float((of - start[name]).nanmean()) for name, of in ratios.items()}
        return self.cached_margins[key]

    def _figures(self, weights: Weights) -> dict[str, float]:
        measured = figures(self.evaluator.measure(self.policy.at(weights, weights_text(weights))))
        return {name: figure.value for name, figure in measured.items()}


def find_reach(
    evaluator: Evaluator, limits: Limits, recipe: Recipe, target: Path, screen: Screen, *, force: bool = False
) -> Reach:
    """Find and publish the reach of each vector of the evaluator's only policy, and of each pair of its vectors."""
    if evaluator.test_set.sampling.temperature != 1:
        raise UserError("reach: KL needs answers sampled at temperature 1; set eval.temperature=1")
    for gap in evaluator.test_set.gaps:
        screen.warn(gap)
    vectors = evaluator.policies.vectors
    pairs = list(combinations(vectors, 2))
    total = STEPS * (2 * len(vectors) + len(SIGNS) * len(pairs))
    with (
        run_writer.staging_folder(target, screen, force=force) as staging,
        screen.progress("weights", total) as progress,
    ):
        tried = count()
        search = Search(evaluator, limits, lambda weights: progress.show(next(tried), {"at": weights}))
        alone = {name: search.vector(name) for name in vectors}
        reach = Reach(alone, [search.pair(pair) for pair in pairs], asdict(limits))
        progress.show(total, {})
        manifest = Manifest(
            stage="reach",
            base=evaluator.base.identity,
            recipe=recipe.as_dict(),
            method={"vectors": {name: vector.lineage() for name, vector in vectors.items()}},
            metrics=reach.as_json(),
        )
        run_writer.publish(staging, target, manifest)
    return reach
