"""Commands that use what was trained."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from lora_align import runs
from lora_align.cli.look import facts
from lora_align.cli.options import (
    ForceOption,
    JsonOption,
    NameOption,
    QuietOption,
    RecipeOption,
    RunsOption,
    SetOption,
    checked,
    project_of,
)
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.preference import parse_weights


def score(
    data: Annotated[str, typer.Option("--data", help="Answers or pairs: a file, or a data set's hub id.")],
    out: Annotated[Path, typer.Option("--out", help="A new .jsonl or .parquet file: the rows and their scores.")],
    by: Annotated[
        str, typer.Option("--by", help="A reward model's name, or pair:PREFERENCE for its two adapters.")
    ] = "reward",
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score answers, or both answers of pairs; goes on where it was stopped."""
    screen = Screen(as_json, quiet)
    project = project_of(recipe, overrides, screen, runs_dir)
    from lora_align.stages import score as stage

    result = stage.run(project, runs_dir, data, out, by, screen)
    screen.result(stage.told(result), result)


def merge(
    weights: Annotated[
        str, typer.Option("--weights", "-w", help="As in helpful=1,harmless=-0.5; names, runs or folders.")
    ],
    rank: Annotated[int | None, typer.Option("--rank", min=1, help="Compress to this rank.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write to this folder instead of runs/mix/NAME.")] = None,
    with_start: Annotated[
        bool, typer.Option("--with-start/--without-start", help="Whether the mix holds the SFT adapter too.")
    ] = True,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    name: NameOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Add weighted preference vectors up to one ordinary adapter."""
    screen = Screen(as_json, quiet)
    wanted = parse_weights(weights)
    if out is not None and (name is not None or not out.name):
        raise UserError("merge: --out takes the path of a new folder, and goes without --name")
    project = project_of(recipe, overrides, screen, runs_dir)
    from lora_align.stages import mix

    run = mix.run(
        wanted, project, runs_dir, screen, name=checked(name), out=out, rank=rank, with_start=with_start, force=force
    )
    screen.result(mix.told(run), facts(run))


def chat(
    weights: Annotated[str | None, typer.Option("--weights", "-w", help="As in helpful=1,harmless=-0.5.")] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Any PEFT LoRA folder.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and exit.")] = None,
    system: Annotated[str, typer.Option("--system", help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0.01, max=1.0, help="Draw from the likeliest tokens of this mass.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The longest answer.")] = 512,
    seed: Annotated[int | None, typer.Option(help="The same answer every time.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Talk to the newest mix, or to --weights, or to --adapter; turn weights while you talk."""
    screen = Screen(as_json, quiet)
    if weights is not None and adapter is not None:
        raise UserError("chat: either --weights or --adapter")
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
    if prompt is not None and not prompt.strip():
        raise UserError("chat: the prompt is empty; pipe one in, or give --prompt TEXT")
    project = project_of(recipe, overrides, screen, runs_dir)
    wanted = parse_weights(weights) if weights is not None else None
    from lora_align.chat import session as sessions
    from lora_align.chat import terminal
    from lora_align.model import base as bases
    from lora_align.model.generate import Sampling

    blend = sessions.choose(runs_dir, project, screen, wanted, adapter)
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    session = sessions.open_session(bases.find(project.base), runs_dir, project, blend, sampling, screen)
    session.system = system
    if prompt is not None:
        terminal.once(session, prompt.strip(), screen)
    else:
        terminal.talk(session, screen)
