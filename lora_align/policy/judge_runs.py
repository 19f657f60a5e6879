"""Check a judge's name, and find the runs behind it, before a model is loaded."""

from pathlib import Path

from lora_align import runs, text_measures
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.runs import Run

PAIR = "pair:"  # prefix of a preference whose two adapters are the judge
TEXT = "text:"  # prefix of a measured property of the text
PREFIXES = (PAIR, TEXT)  # a judge of these kinds has one objective, which its name ends in


def check(name: str, recipe: Recipe, runs_dir: Path) -> None:
    """Refuse a name that is neither a reward model, `pair:` and a trained preference, nor `text:` and a measure."""
    if name.startswith(PAIR):
        of_pair(name.removeprefix(PAIR), recipe, runs_dir)
    elif name.startswith(TEXT):
        text_measures.find(name.removeprefix(TEXT))
    else:
        of_reward(name, runs_dir)


def of_reward(name: str, runs_dir: Path) -> Run:
    """Return the reward model of that name, or in that folder."""
    folder = Path(name) if runs.is_run(Path(name)) else runs_dir / "reward" / name
    if not runs.is_run(folder):
        command = runs.command("reward", runs_dir)
        if name in vectors.trained(runs_dir):
            raise UserError(
                f"no reward model {name!r} in {runs_dir}/reward; to judge with the two adapters of this preference, "
                f"use {PAIR}{name}"
            )
        named = "" if name == "reward" else f" --name {name}"
        raise UserError(f"no reward model {name!r} in {runs_dir}/reward: run `{command}{named}`")
    run = runs.read(folder)
    if run.manifest.stage != "reward":
        raise UserError(f"{run.path} is a run of {run.manifest.stage}, not a reward model; name a run of `reward`")
    return run


def of_pair(preference: str, recipe: Recipe, runs_dir: Path) -> dict[str, Run]:
    """Return a preference's two runs, by direction."""
    vector = vectors.find(preference, runs_dir, recipe.preferences)
    if vector.layers:
        raise UserError(f"{PAIR}{preference}: a judge uses all layers; name the preference without @")
    pair_runs = {run.manifest.direction: run for run in vector.known_runs()}
    if set(pair_runs) != {direction.value for direction in Direction}:
        raise UserError(
            f"{PAIR}{preference}: a judge needs a preference with both adapters, pos and neg; this name has "
            f"{', '.join(filter(None, pair_runs)) or 'neither'}"
        )
    return pair_runs
