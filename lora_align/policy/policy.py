"""Policies: whatever can answer, found by the words that name it. Finding one needs neither torch nor the base."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align import runs
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.want import Want, scores_prompt
from lora_align.weights import parse_weights

if TYPE_CHECKING:
    from lora_align.model.base import Base

BASE, START, MIX = "base", "start", "mix"  # words that name a policy by themselves
WANT = "want"  # prefix of a direction, or of a run and what it is asked for


@dataclass(frozen=True)
class Conditioned:
    """A run of `rsf` and the system message that asks it for a direction, or a SteerLM-style one for scores."""

    name: str  # of its adapter among weights
    run: Run
    system: str
    want: Want | None = None  # None where it is asked for scores

    @classmethod
    def asked(cls, name: str, run: Run, text: str, screen: Screen) -> "Conditioned":
        """Ask a run for `helpfulness=0.8,verbosity=-0.6`; warn where it was not trained on such a direction."""
        want = Want.parse(text, run.manifest.method["objectives"])
        screen.note(f"{run.path} asked for {want} (brought to length 1)")
        for objective, (low, high) in run.manifest.recipe["rsf"]["directions"].items():
            if not low - 0.01 <= want.weights[objective] <= high + 0.01:
                screen.warn(f"it was trained on {objective} from {low:g} to {high:g} only")
        return cls(name, run, want.asked(run.manifest.method["ask"]), want)


@dataclass(frozen=True)
class Policy:
    """Weights over vectors, on the start policy or on the base alone, and what it is asked for, if anything."""

    name: str
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    start: float = 1.0  # weight of the start adapter: 0 for the base, and for adapters that contain it
    conditioned: Conditioned | None = None

    @property
    def system(self) -> str:
        """The system message that asks for something; empty for most policies."""
        return self.conditioned.system if self.conditioned else ""

    @property
    def scales(self) -> dict[str, float]:
        """The weight of each adapter over the base."""
        return {START: self.start, **self.weights}

    @property
    def contains_start(self) -> bool:
        """Whether one of its adapters contains the start adapter."""
        return bool(self.vectors) and not self.start

    def at(self, weights: Mapping[str, float], name: str = "") -> "Policy":
        """Return the same vectors at other weights."""
        return replace(self, name=name, weights=weights)

    def warnings(self) -> list[str]:
        """Why it may not do what its name says."""
        return [warning for vector in self.vectors.values() for warning in vector.doubts()]


START_POLICY, BASE_ALONE = Policy(START), Policy(BASE, start=0.0)


def find_policies(words: Sequence[str], recipe: Recipe, runs_dir: Path, screen: Screen) -> list[Policy]:
    """Return the policies that words name, see `find_policy`."""
    return [find_policy(word, recipe, runs_dir, screen) for word in words]


def find_policy(word: str, recipe: Recipe, runs_dir: Path, screen: Screen) -> Policy:
    """Return the policy that a word names.

    A word is `helpful=1,harmless=0.5`, `want:helpfulness=0.8`, `want@rsf/policy/t2:helpfulness=0.8`, a run's or an
    adapter's folder, `start`, `base`, or `mix` for the newest mix.
    """
    if word == BASE:
        return BASE_ALONE
    if word == START:
        return START_POLICY
    if word.startswith((f"{WANT}:", f"{WANT}@")):
        return _conditioned(word, runs_dir, screen)
    if "=" in word and not Path(word).exists():
        return weighted(parse_weights(word), recipe, runs_dir, word)
    if word == MIX:
        mixes = _mixes(runs_dir, screen)
        if not mixes:
            command = runs.command("merge", runs_dir)
            raise UserError(f"no mix in {runs_dir}/: name weights, as in helpful=1, or `{command}` first")
        word = mixes[-1].path.relative_to(runs_dir).as_posix()
    return one_adapter(vectors.find(word, runs_dir, recipe.preferences, (START, BASE, MIX)))


def weighted(weights: Mapping[str, float], recipe: Recipe, runs_dir: Path, name: str = "") -> Policy:
    """Return the policy of weights over preferences, runs or adapter folders."""
    found = {key: vectors.find(key, runs_dir, recipe.preferences) for key in weights}
    vectors.refuse_start_inside(found.values())
    return Policy(name, found, weights)


def chosen(
    runs_dir: Path,
    recipe: Recipe,
    screen: Screen,
    weights: Mapping[str, float] | None = None,
    adapter: Path | None = None,
    want: str | None = None,
) -> Policy:
    """Return the policy that the options of `chat` and `generate` choose, without any the newest mix as its vectors."""
    if want is not None:
        asked = find_policy(f"{WANT}:{want}", recipe, runs_dir, screen)
        beside = weighted(weights or {}, recipe, runs_dir)
        return replace(asked, vectors={**asked.vectors, **beside.vectors}, weights={**asked.weights, **beside.weights})
    if weights is not None:
        return weighted(weights, recipe, runs_dir)
    if adapter is not None:
        inside = runs_dir / adapter
        return one_adapter(vectors.at(inside if runs.is_run(inside) else adapter.expanduser(), adapter.name))
    mixes = _mixes(runs_dir, screen)
    if not mixes:
        command = runs.command("merge --weights …", runs_dir)
        screen.note(f"no mix in {runs_dir}/ yet: this is the start policy; `{command}` makes one")
        return START_POLICY
    screen.note(f"mix: {mixes[-1].path}")
    return _taken_apart(mixes[-1], runs_dir, screen)


def newest_conditioned(runs_dir: Path, option: str, screen: Screen) -> Run:
    """Return the newest run of `rsf` that can be asked for a direction; `option` is what needs one."""
    made = [run for run in runs.list_runs(runs_dir, screen) if run.manifest.stage == "rsf" and not takes_scores(run)]
    if not made:
        command = runs.command("rsf", runs_dir)
        raise UserError(f"{option}: no policy in {runs_dir}/rsf that can be asked; `{command}` trains one")
    return made[-1]


def takes_scores(run: Run) -> bool:
    """Return whether a run of `rsf` is asked for scores, as SteerLM is, instead of a direction."""
    return bool(run.manifest.method["steer"])


def check_stands_on(base: "Base", start: str, found: Iterable[Vector]) -> None:
    """Refuse vectors of another base, or of another start adapter than the one below them."""
    theirs, start_id = vectors.common(found)
    if theirs and theirs["fingerprint"] != base.fingerprint:
        raise UserError(
            f"this was made on the base {theirs['model']} ({theirs['fingerprint'][:12]}), "
            f"the recipe names {base.recipe.model} ({base.fingerprint[:12]}); choose its recipe with --recipe"
        )
    if theirs and start != start_id:
        raise UserError("the start adapter in the runs folder is not the one these vectors stand on")


def _mixes(runs_dir: Path, screen: Screen) -> list[Run]:
    return [run for run in runs.list_runs(runs_dir, screen) if run.manifest.stage == "mix"]


def _conditioned(word: str, runs_dir: Path, screen: Screen) -> Policy:
    """Return the newest conditioned policy, or the run behind the @, asked for what follows the colon."""
    folder, _, text = word.removeprefix(WANT).partition(":")
    if folder:
        inside = runs_dir / folder[1:]
        run = runs.read(inside if runs.is_run(inside) else Path(folder[1:]))
        if run.manifest.stage != "rsf":
            stage = run.manifest.stage
            raise UserError(f"{word}: {run.path} is a run of {stage}; `rsf` trains policies that can be asked")
    else:
        run = newest_conditioned(runs_dir, "--want", screen)
    name = (run.path.relative_to(runs_dir) if run.path.is_relative_to(runs_dir) else run.path).as_posix()
    if takes_scores(run):
        asked = Conditioned(name, run, _scores_message(run, text, word))
    else:
        asked = Conditioned.asked(name, run, text, screen)
    return Policy(word, {name: vectors.at(run.path, name)}, {name: 1.0}, conditioned=asked)


def _scores_message(run: Run, text: str, word: str) -> str:
    scores, objectives = parse_weights(text), run.manifest.method["objectives"]
    if set(scores) != set(objectives):
        raise UserError(f"{word}: this policy is asked for scores of {' and '.join(objectives)}, from 0 to 100")
    return scores_prompt({name: scores[name] for name in objectives}, run.manifest.method["steer"])


def one_adapter(vector: Vector) -> Policy:
    """Return the policy of one adapter at weight 1, which may contain the start adapter."""
    contains_start = any(run.manifest.contains_start or run.manifest.stage == "sft" for run in vector.known_runs())
    return Policy(vector.name, {vector.name: vector}, {vector.name: 1.0}, start=float(not contains_start))


def _taken_apart(mix: Run, runs_dir: Path, screen: Screen) -> Policy:
    """Return a mix as its vectors, whose weights can change; whole where it is not their sum or they are gone."""
    whole = one_adapter(vectors.at(mix.path, mix.path.name))
    if mix.manifest.metrics.get("left_out"):
        screen.note("it was compressed: /w turns it as a whole")
        return whole
    if (method := mix.manifest.method.get("name")) != "exact":
        screen.note(f"it is no plain sum, it was made by {method}: /w turns it as a whole")
        return whole
    try:
        found = {parent["name"]: vectors.find(parent["name"], runs_dir) for parent in mix.manifest.parents}
        same = all(_same(found[parent["name"]], parent["adapters"]) for parent in mix.manifest.parents)
    except UserError:
        same = False
    if not same:
        screen.note("the adapters it was made from are gone or were trained anew: /w turns it as a whole")
        return whole
    return Policy(mix.path.name, found, {parent["name"]: parent["weight"] for parent in mix.manifest.parents})


def _same(vector: Vector, adapters: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a vector still consists of the adapters a mix was made of, wherever their folders lie."""
    now = [parent.lineage() for parent in vector.parents]
    return [(a["sign"], a["sha256"]) for a in now] == [(a["sign"], a["sha256"]) for a in adapters]
