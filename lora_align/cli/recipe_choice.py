"""The choice of a command's recipe: the named one, ./lora-align.toml, the newest run's, or the demo."""

from collections.abc import Sequence
from pathlib import Path

from lora_align import recipe as recipes
from lora_align import runs
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.recipe import Recipe


def recipe_to_train(name: str | None, overrides: Sequence[str], screen: Screen, runs_dir: Path) -> Recipe:
    """Return the recipe of a command that trains or plans, read from its file.

    Without a name and without ./lora-align.toml, it is the file of the newest training run, without its overrides.
    """
    trained = [] if name or recipes.LOCAL.exists() else runs.list_runs(runs_dir)
    trained = [run for run in trained if run.manifest.stage in runs.FROM_RECIPE]
    source = str(trained[-1].manifest.recipe.get("source", "")) if trained else ""
    if source:
        path = trained[-1].path
        if not Path(source).is_file() and source not in recipes.builtin():
            raise UserError(
                f"{path} was trained with {source}, which does not exist; choose a recipe with --recipe FILE"
            )
        screen.note(f"recipe: {source}, as for {path}")
        name = source
    return _load(name, overrides, screen)


def recipe_of_runs(name: str | None, overrides: Sequence[str], screen: Screen, runs_dir: Path) -> Recipe:
    """Return the recipe of a command that uses runs.

    Without a name and without ./lora-align.toml, it is the recipe stored in the newest training run, with its
    overrides, or in the newest mix if no run trained. Its [eval] table is the one in the recipe's file, if it can be
    read, because overrides of measurements are not inherited. The values in which a stored recipe differs from its file
    are printed.
    """
    if name is None and not recipes.LOCAL.exists():
        stored = [run for run in runs.list_runs(runs_dir) if run.manifest.recipe]
        trained = [run for run in stored if run.manifest.stage in runs.FROM_RECIPE]
        if candidates := trained or [run for run in stored if run.manifest.stage == "mix"]:
            path, table = candidates[-1].path, candidates[-1].manifest.recipe
            source = f"{path}/{runs.MANIFEST}"
            inherited = recipes.with_eval_of_source(recipes.from_dict(table, source))
            screen.note(f"recipe: the one stored in {path}{recipes.changes_from_source(inherited)}")
            return recipes.from_dict(inherited.as_dict(), source, overrides)
    return _load(name, overrides, screen)


def _load(name: str | None, overrides: Sequence[str], screen: Screen) -> Recipe:
    path, why = recipes.find(name)
    if why:
        screen.note(why)
    return recipes.load(path, overrides)
