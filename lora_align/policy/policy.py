"""Parse a policy's name (`start`, `helpful=1,harmless=-0.5`, `want:…`, `prompt:…`, a folder); find its adapters.

Neither torch nor the base is loaded.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_align import runs
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.mix_weights import parse_weights
from lora_align.policy import vectors
from lora_align.policy.vectors import Vector
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.want_direction import Want, scores_message

if TYPE_CHECKING:
    from lora_align.model.base import Base

BASE, START, MIX = "base", "start", "mix"  # names of policies
WANT = "want"  # prefix of a name that requests a direction, as in want:helpfulness=0.8
PROMPT = "prompt"  # prefix of a name with a system prompt, as in `prompt:Be brief.` and `prompt@1.5:Be brief.`
WANTS, PROMPTS = ((f"{word}:", f"{word}@") for word in (WANT, PROMPT))  # how such names begin
STRONGEST = 10.0  # largest strength of a system prompt


@dataclass(frozen=True)
class Conditioned:
    """A run of `rsf` and a system message that requests a direction or, from a SteerLM-style policy, scores."""

    name: str  # the name of its adapter in `Policy.weights`
    run: Run
    system: str
    want: Want | None = None  # None for a SteerLM-style policy

    @classmethod
    def parse(cls, name: str, run: Run, text: str, screen: Screen) -> "Conditioned":
        """Parse a direction such as `helpfulness=0.8,verbosity=-0.6`; warn if it is outside the trained region."""
        want = Want.parse(text, run.manifest.method["objectives"])
        screen.note(f"{run.path}: direction {want} (normalised to length 1)")
        for objective, (low, high) in run.manifest.recipe["rsf"]["directions"].items():
            if not low - 0.01 <= want.weights[objective] <= high + 0.01:
                weight = f"{objective}={want.weights[objective]:.2f}"
                screen.warn(f"{weight} is outside the range {low:g} to {high:g} on which {run.path} was trained")
        return cls(name, run, want.system_message(run.manifest.method["ask"]), want)


@dataclass(frozen=True)
class Prompted:
    """A system prompt and its strength s: log π = (1 − s) log π_without + s log π_with, up to a constant.

    This is classifier-free guidance (arXiv 2306.17806) with the plain prompt as the unconditional context.
    """

    text: str
    strength: float = 1.0

    @classmethod
    def parse(cls, name: str) -> "Prompted":
        """Parse `prompt:TEXT` or `prompt@STRENGTH:TEXT`."""
        strength, _, text = name.removeprefix(PROMPT).partition(":")
        try:
            value = float(strength.removeprefix("@") or 1)
        except ValueError:
            value = math.nan
        if not text.strip() or not 0 <= value <= STRONGEST:
            raise UserError(
                f"{name!r}: expected {PROMPT}:TEXT or {PROMPT}@STRENGTH:TEXT, with a strength from 0 to {STRONGEST:g}"
            )
        return cls(text.strip(), value)


@dataclass(frozen=True)
class Policy:
    """Weights over vectors, added to the start policy or to the base, and the system prompt of some policies."""

    name: str
    vectors: Mapping[str, Vector] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    start: float = 1.0  # weight of the start adapter: 0 for the base, and for adapters that contain it
    conditioned: Conditioned | None = None
    prompted: Prompted | None = None

    @property
    def system(self) -> str:
        """Return the system message of a conditioned or prompted policy, or "" for other policies."""
        if self.prompted:
            return self.prompted.text
        return self.conditioned.system if self.conditioned else ""

    @property
    def strength(self) -> float:
        """Return the strength of the system message: 1 unless a prompted policy has another one."""
        return self.prompted.strength if self.prompted else 1.0

    @property
    def scales(self) -> dict[str, float]:
        """Return the weight of each adapter on the base, the start adapter included."""
        return {START: self.start, **self.weights}

    @property
    def contains_start(self) -> bool:
        """Return whether an adapter of this policy contains the start adapter."""
        return bool(self.vectors) and not self.start

    def at(self, weights: Mapping[str, float], name: str = "") -> "Policy":
        """Return a policy of the same vectors with other weights."""
        return replace(self, name=name, weights=weights)

    def warnings(self) -> list[str]:
        """Return the warnings of all vectors."""
        return [warning for vector in self.vectors.values() for warning in vector.warnings()]


START_POLICY, BASE_ALONE = Policy(START), Policy(BASE, start=0.0)


def find_policies(names: Sequence[str], recipe: Recipe, runs_dir: Path, screen: Screen) -> list[Policy]:
    """Return the policies with these names; see `find_policy`."""
    return [find_policy(name, recipe, runs_dir, screen) for name in names]


def find_policy(name: str, recipe: Recipe, runs_dir: Path, screen: Screen) -> Policy:
    """Return the policy with this name.

    A name is `helpful=1,harmless=0.5`, `want:helpfulness=0.8`, `want@rsf/policy/t2:helpfulness=0.8`,
    `prompt:Be brief.`, `prompt@1.5:Be brief.`, a run's or an adapter's folder, `start`, `base`, or `mix` for the newest
    mix.
    """
    if name.startswith(PROMPTS):
        return Policy(name, prompted=Prompted.parse(name))
    if name == BASE:
        return BASE_ALONE
    if name == START:
        return START_POLICY
    if name.startswith(WANTS):
        return _conditioned(name, runs_dir, screen)
    if "=" in name and not Path(name).exists():
        return weighted(parse_weights(name), recipe, runs_dir, name)
    if name == MIX:
        mixes = _mixes(runs_dir, screen)
        if not mixes:
            command = runs.command("merge --weights …", runs_dir)
            raise UserError(f"no mix in {runs_dir}/; name weights, as in helpful=1, or run `{command}` first")
        screen.note(f"mix: {mixes[-1].path}")
        name = mixes[-1].path.relative_to(runs_dir).as_posix()
    return one_adapter(vectors.find(name, runs_dir, recipe.preferences, (START, BASE, MIX)))


def weighted(weights: Mapping[str, float], recipe: Recipe, runs_dir: Path, name: str = "") -> Policy:
    """Return the policy of weights over preferences, runs or adapter folders."""
    by_name = {key: vectors.find(key, runs_dir, recipe.preferences) for key in weights}
    vectors.refuse_start_inside(by_name.values())
    return Policy(name, by_name, weights)


def select_policy(
    runs_dir: Path,
    recipe: Recipe,
    screen: Screen,
    weights: Mapping[str, float] | None = None,
    adapter: Path | None = None,
    want: str | None = None,
) -> Policy:
    """Return the policy that the options of `chat` and `generate` select; by default the vectors of the newest mix."""
    if adapter is not None and (weights is not None or want is not None):
        raise UserError("--adapter excludes --weights and --want: give only one of them")
    if want is not None:
        one = find_policy(f"{WANT}:{want}", recipe, runs_dir, screen)
        added = weighted(weights or {}, recipe, runs_dir)
        return replace(one, vectors={**one.vectors, **added.vectors}, weights={**one.weights, **added.weights})
    if weights is not None:
        return weighted(weights, recipe, runs_dir)
    if adapter is not None:
        inside = runs_dir / adapter
        return one_adapter(vectors.from_folder(inside if runs.is_run(inside) else adapter.expanduser(), adapter.name))
    mixes = _mixes(runs_dir, screen)
    if not mixes:
        made = bool(vectors.trained(runs_dir))
        command = runs.command("merge --weights …" if made else "dpo --pref NAME", runs_dir)
        what = "makes a mix" if made else "trains a preference"
        screen.note(f"no mix in {runs_dir}/, so this is the start policy; `{command}` {what}")
        return START_POLICY
    screen.note(f"mix: {mixes[-1].path}")
    return _split_mix(mixes[-1], runs_dir, screen)


def newest_conditioned(runs_dir: Path, option: str, screen: Screen) -> Run:
    """Return the newest run of `rsf` that takes a direction. `option` begins the message if there is none."""
    made = [run for run in runs.list_runs(runs_dir, screen) if run.manifest.stage == "rsf" and not takes_scores(run)]
    if not made:
        command = runs.command("rsf", runs_dir)
        raise UserError(f"{option}: no conditioned policy in {runs_dir}/rsf; `{command}` trains one")
    return made[-1]


def takes_scores(run: Run) -> bool:
    """Return whether a run of `rsf` takes scores, as SteerLM does, instead of a direction."""
    return bool(run.manifest.method["steer"])


def check_base_and_start(base: "Base", start: str, adapters: Iterable[Vector]) -> None:
    """Refuse vectors that were trained on another base or another start adapter."""
    theirs, start_id = vectors.common_base(adapters)
    if theirs and theirs["fingerprint"] != base.fingerprint:
        raise UserError(
            f"the adapters were trained on the base {theirs['model']} ({theirs['fingerprint'][:12]}), "
            f"the recipe names {base.recipe.model} ({base.fingerprint[:12]}); name their recipe with --recipe"
        )
    if theirs and start != start_id:
        raise UserError(
            "these adapters were trained on another start adapter than the one in the runs folder; name their recipe "
            "with --recipe and their runs folder with --runs, or train them again"
        )


def _mixes(runs_dir: Path, screen: Screen) -> list[Run]:
    return [run for run in runs.list_runs(runs_dir, screen) if run.manifest.stage == "mix"]


def _conditioned(name: str, runs_dir: Path, screen: Screen) -> Policy:
    """Return the policy of `want:DIRECTION`, which uses the newest run, or of `want@FOLDER:DIRECTION`."""
    folder, _, text = name.removeprefix(WANT).partition(":")
    if folder:
        inside = runs_dir / folder[1:]
        run = runs.read(inside if runs.is_run(inside) else Path(folder[1:]))
        if run.manifest.stage != "rsf":
            stage = run.manifest.stage
            raise UserError(f"{name}: {run.path} is a run of {stage}; only runs of `rsf` take a direction")
    else:
        run = newest_conditioned(runs_dir, name, screen)
    adapter = (run.path.relative_to(runs_dir) if run.path.is_relative_to(runs_dir) else run.path).as_posix()
    if takes_scores(run):
        conditioned = Conditioned(adapter, run, _scores_message(run, text, name))
    else:
        conditioned = Conditioned.parse(adapter, run, text, screen)
    return Policy(name, {adapter: vectors.from_folder(run.path, adapter)}, {adapter: 1.0}, conditioned=conditioned)


def _scores_message(run: Run, text: str, name: str) -> str:
    scores, objectives = parse_weights(text), run.manifest.method["objectives"]
    if set(scores) != set(objectives):
        raise UserError(f"{name}: this policy takes scores of {' and '.join(objectives)}, from 0 to 100; give each")
    return scores_message({objective: scores[objective] for objective in objectives}, run.manifest.method["steer"])


def one_adapter(vector: Vector) -> Policy:
    """Return the policy of one adapter with weight 1. Leave out the start adapter if this adapter contains it."""
    contains_start = any(run.manifest.contains_start or run.manifest.stage == "sft" for run in vector.known_runs())
    return Policy(vector.name, {vector.name: vector}, {vector.name: 1.0}, start=float(not contains_start))


def split_mix(policy: Policy, runs_dir: Path, screen: Screen) -> Policy:
    """Return the vectors and weights of a policy that is one mix. Return any other policy unchanged."""
    several = [run for vector in policy.vectors.values() for run in vector.known_runs()]
    if [run.manifest.stage for run in several] != ["mix"] or list(policy.weights.values()) != [1.0]:
        return policy
    [mix] = several
    parts = _split_mix(mix, runs_dir, screen)
    with_start = mix.manifest.contains_start or not mix.manifest.start
    return parts if parts.vectors.keys() == policy.vectors.keys() else replace(parts, start=float(with_start))


def _split_mix(mix: Run, runs_dir: Path, screen: Screen) -> Policy:
    """Return the vectors and weights of a mix, or the mix as one adapter if it cannot be split."""
    whole = one_adapter(vectors.from_folder(mix.path, mix.path.name))
    if mix.manifest.metrics.get("left_out"):
        screen.note("the mix was truncated to a lower rank, so it is used as one adapter")
        return whole
    if (method := mix.manifest.method.get("name")) != "exact":
        screen.note(f"the mix was made by {method} and is not a plain sum, so it is used as one adapter")
        return whole
    try:
        parts = {parent["name"]: vectors.find(parent["name"], runs_dir) for parent in mix.manifest.parents}
        same = all(is_made_of(parts[parent["name"]], parent["adapters"]) for parent in mix.manifest.parents)
    except UserError:
        same = False
    if not same:
        screen.note("the adapters of the mix were removed or trained again, so the mix is used as one adapter")
        return whole
    return Policy(mix.path.name, parts, {parent["name"]: parent["weight"] for parent in mix.manifest.parents})


def is_made_of(vector: Vector, adapters: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a vector has the adapters of a mix's manifest, by sign and hashes."""
    keys = ("sign", "sha256", "config_sha256")  # the configuration holds the scaling
    now = [parent.lineage() for parent in vector.parents]
    return [[a[key] for key in keys] for a in now] == [[a.get(key) for key in keys] for a in adapters]
