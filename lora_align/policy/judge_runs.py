"""The runs behind a judge's name, found before a model is loaded."""

from pathlib import Path

from lora_align import runs
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.rankers import Direction
from lora_align.recipe import Recipe
from lora_align.runs import Run

PAIR = "pair:"  # before a preference: its two adapters judge


def check(name: str, recipe: Recipe, runs_dir: Path) -> None:
    """Refuse a name that no judge has."""
    if name.startswith(PAIR):
        of_pair(name.removeprefix(PAIR), recipe, runs_dir)
    else:
        of_reward(name, runs_dir)


def of_reward(name: str, runs_dir: Path) -> Run:
    """Return the reward model of that name, or in that folder."""
    folder = Path(name) if runs.is_run(Path(name)) else runs_dir / "reward" / name
    if not runs.is_run(folder):
        command = runs.command("reward", runs_dir)
        if name in vectors.trained(runs_dir):
            raise UserError(
                f"no reward model {name!r} in {runs_dir}/reward; did you mean {PAIR}{name}, its two adapters?"
            )
        raise UserError(f"no reward model {name!r} in {runs_dir}/reward: run `{command}`")
    run = runs.read(folder)
    if run.manifest.stage != "reward":
        raise UserError(f"{run.path} is a run of {run.manifest.stage}, not a reward model")
    return run


def of_pair(preference: str, recipe: Recipe, runs_dir: Path) -> dict[str, Run]:
    """Return a preference's two runs, by direction."""
    found = vectors.find(preference, runs_dir, recipe.preferences)
    sides = {run.manifest.direction: run for run in found.known_runs()}
    if set(sides) != {side.value for side in Direction}:
        raise UserError(f"{PAIR}{preference}: both runs of the preference are needed")
    return sides
