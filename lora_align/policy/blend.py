"""What a person asked to talk to, found on disk: vectors and their weights, a mix taken apart, a policy of `rsf`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align import runs
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.want import Want

if TYPE_CHECKING:  # names are found without torch
    from lora_align.model.base import Base


@dataclass(frozen=True)
class Blend:
    """What to load over the start policy, and at which weights."""

    found: Mapping[str, Vector]
    weights: Mapping[str, float]
    contains_start: bool = False
    policy: "ConditionedPolicy | None" = None

    def doubts(self) -> list[str]:
        """Why it may not do what its names say."""
        return [doubt for vector in self.found.values() for doubt in vector.doubts()]


def newest_policy(runs_dir: Path, option: str, screen: Screen) -> Run:
    """The last one that `rsf` has published and that can be asked for a direction, as some option needs."""
    made = [run for run in runs.every(runs_dir, screen) if run.manifest.stage == "rsf" and not takes_scores(run)]
    if not made:
        command = runs.command("rsf", runs_dir)
        raise UserError(f"{option}: no policy in {runs_dir}/rsf that can be asked; `{command}` trains one")
    return made[-1]


def takes_scores(run: Run) -> bool:
    """Whether a policy of `rsf` is asked for scores, as SteerLM's are, in place of a direction."""
    return bool(run.manifest.method["steer"])


@dataclass(frozen=True)
class ConditionedPolicy:
    """A policy that can be asked for a direction, and what it is asked for."""

    run: Run
    want: Want

    @classmethod
    def newest(cls, runs_dir: Path, asked: str, screen: Screen) -> "ConditionedPolicy":
        """The last one `rsf` has published, asked for `helpfulness=0.8,verbosity=-0.6`."""
        return cls.of(newest_policy(runs_dir, "--want", screen), asked, screen)

    @classmethod
    def of(cls, run: Run, asked: str, screen: Screen) -> "ConditionedPolicy":
        """Say what becomes of the weights, and whether the policy has ever been asked for the like."""
        want = Want.parse(asked, run.manifest.method["objectives"])
        screen.note(f"{run.path} asked for {want} (brought to length 1)")
        for name, (low, high) in run.manifest.recipe["rsf"]["directions"].items():
            if not low - 0.01 <= want.weights[name] <= high + 0.01:
                screen.warn(f"it was trained on {name} from {low:g} to {high:g} only")
        return cls(run, want)

    def named(self, runs_dir: Path) -> str:
        """What its adapter is called among weights."""
        return self.run.path.relative_to(runs_dir).as_posix()

    def system(self) -> str:
        """The message that asks for it."""
        return self.want.asked(self.run.manifest.method["ask"])


def choose(
    runs_dir: Path,
    recipe: Recipe,
    screen: Screen,
    weights: Mapping[str, float] | None = None,
    adapter: Path | None = None,
    want: str | None = None,
) -> Blend:
    """The vectors behind `--weights`, the adapter behind `--adapter`, or the newest mix taken apart again.

    With a want, the newest conditioned policy, and the vectors beside it.
    """
    if want is not None:
        policy = ConditionedPolicy.newest(runs_dir, want, screen)
        name = policy.named(runs_dir)
        found = {name: vectors.at(policy.run.path, name)}
        found |= {name: vectors.find(name, runs_dir, recipe.preferences) for name in weights or ()}
        return Blend(found, {name: 1.0, **(weights or {})}, policy=policy)
    if weights is not None:
        return Blend({name: vectors.find(name, runs_dir, recipe.preferences) for name in weights}, weights)
    if adapter is not None:
        inside = runs_dir / adapter
        return _whole(vectors.at(inside if runs.is_run(inside) else adapter.expanduser(), adapter.name))
    mixes = [run for run in runs.every(runs_dir, screen) if run.manifest.stage == "mix"]
    if not mixes:
        command = runs.command("merge --weights …", runs_dir)
        screen.note(f"no mix in {runs_dir}/ yet: this is the start policy; `{command}` makes one")
        return Blend({}, {})
    screen.note(f"mix: {mixes[-1].path}")
    return _taken_apart(mixes[-1], runs_dir, screen)


def _whole(vector: Vector) -> Blend:
    """One adapter at weight 1, which may hold the start adapter too."""
    contains_start = any(run.manifest.contains_start for run in vector.known_runs())
    return Blend({vector.name: vector}, {vector.name: 1.0}, contains_start)


def _taken_apart(mix: Run, runs_dir: Path, screen: Screen) -> Blend:
    """The mix as its vectors, so that each weight can be turned; whole where it is not their sum, or they are gone."""
    whole = _whole(vectors.at(mix.path, mix.path.name))
    if mix.manifest.metrics["left_out"]:
        screen.note("it was compressed: /w turns it as a whole")
        return whole
    if mix.manifest.method["name"] != "exact":
        screen.note(f"it is no plain sum, it was made by {mix.manifest.method['name']}: /w turns it as a whole")
        return whole
    try:
        found = {parent["name"]: vectors.find(parent["name"], runs_dir) for parent in mix.manifest.parents}
        same = all(_same(found[parent["name"]], parent["adapters"]) for parent in mix.manifest.parents)
    except UserError:
        same = False
    if not same:
        screen.note("the adapters it was made from are gone or were trained anew: /w turns it as a whole")
        return whole
    return Blend(found, {parent["name"]: parent["weight"] for parent in mix.manifest.parents})


def _same(vector: Vector, adapters: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a vector is still made of the very adapters a mix was; where the folders lie does not matter."""
    now = [parent.lineage() for parent in vector.parents]
    return [(a["sign"], a["sha256"]) for a in now] == [(a["sign"], a["sha256"]) for a in adapters]


def check_stands_on(base: "Base", start: str, found: Iterable[Vector]) -> None:
    """Refuse vectors of another base, or of another start adapter than the one laid under them."""
    theirs, start_id = vectors.common(found)
    if theirs and theirs["fingerprint"] != base.fingerprint:
        raise UserError(
            f"this was made on the base {theirs['model']} ({theirs['fingerprint'][:12]}), "
            f"the recipe names {base.recipe.model} ({base.fingerprint[:12]}); choose its recipe with --recipe"
        )
    if theirs and start != start_id:
        raise UserError("the start adapter in the runs folder is not the one these vectors stand on")
