"""Commands that use what was trained."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_align import runs
from lora_align.cli.options import (
    JsonOption,
    QuietOption,
    RecipeOption,
    RunsOption,
    SetOption,
    project_of,
    readable,
)
from lora_align.console import Screen
from lora_align.data import shards
from lora_align.errors import UserError
from lora_align.policy import judge_runs
from lora_align.policy.policy import Policy, chosen
from lora_align.recipe import Recipe
from lora_align.weights import parse_weights

if TYPE_CHECKING:
    from lora_align.model.sampler import Sampler

WantOption = Annotated[
    str | None,
    typer.Option(
        "--want",
        metavar="NAME=WEIGHT,…",
        help="A direction for the policy of `rsf`, as in helpfulness=0.8,verbosity=-0.6.",
    ),
]


def score(
    data: Annotated[
        str, typer.Option("--data", metavar="FILE|ID", help="Answers or pairs: a file, or a data set's hub id.")
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="A new .jsonl or .parquet file: the rows and their scores.")
    ],
    by: Annotated[
        str,
        typer.Option("--by", metavar="JUDGE", help="A reward model's name, or pair:PREFERENCE for its two adapters."),
    ] = "reward",
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score answers, or both answers of pairs. Continues where it was stopped.

    Example: lora-align score --data answers.jsonl --out scored.jsonl
    """
    screen = Screen(as_json, quiet)
    project = project_of(recipe, overrides, screen, runs_dir)
    judge_runs.check(by, project, runs_dir)
    shards.check_out(out)
    readable(data)
    screen.loading(project.base.model)
    from lora_align.commands.score import score_file, summary

    result = score_file(project, runs_dir, data, out, by, screen)
    screen.result(summary(result), result)


def chat(
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME=WEIGHT,…",
            help="Preferences, runs or folders, as in helpful=1,harmless=-0.5.",
        ),
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="Any PEFT LoRA folder.")] = None,
    want: WantOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and exit.")] = None,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(metavar="NUMBER", min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.01, max=1.0, help="Sample from the likeliest tokens of this probability."),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")] = 512,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same answers every time.")] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Talk to a mix, an adapter or a policy, and change its weights. Without options: the newest mix.

    Piped text is one prompt. Where it begins with /, each line is a command or a message, as on a terminal.

    Example: lora-align chat --weights helpful=1,harmless=-0.5
    """
    screen = Screen(as_json, quiet)
    if adapter is not None and (weights is not None or want is not None):
        raise UserError("chat: --adapter goes without --weights and --want")
    script: list[str] = []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        if prompt.startswith("/"):
            script, prompt = prompt.splitlines(), None
    if prompt is not None and not prompt.strip():
        raise UserError("chat: the prompt is empty; pipe one in, or give --prompt TEXT")
    if script and as_json:
        raise UserError("chat: --json takes one prompt, no commands")
    project = project_of(recipe, overrides, screen, runs_dir)
    wanted = parse_weights(weights) if weights is not None else None
    policy = chosen(runs_dir, project, screen, wanted, adapter, want)
    screen.loading(project.base.model)
    from lora_align.chat import session as sessions
    from lora_align.chat import terminal
    from lora_align.model import base as bases
    from lora_align.model.decoding import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    session = sessions.open_session(bases.find(project.base), runs_dir, project, policy, sampling, screen)
    session.system = system
    if prompt is not None:
        terminal.once(session, prompt.strip(), screen)
    elif script:
        terminal.script(session, script, screen)
    else:
        terminal.talk(session, screen)


def generate(
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE|ID", help="A file of prompts (.txt: one a line), or a data set's hub id."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A new .jsonl or .parquet file.")] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Answers to each prompt.")] = 1,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME=WEIGHT,…",
            help="Preferences, runs or folders, as in helpful=1,harmless=-0.5.",
        ),
    ] = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", metavar="DIR", help="Any PEFT LoRA folder.")] = None,
    want: WantOption = None,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="A system message.")] = "",
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Sample on this OpenAI-compatible server instead.")
    ] = None,
    model: Annotated[str, typer.Option("--model", metavar="NAME", help="The model's name on that server.")] = "",
    show_server: Annotated[
        bool, typer.Option("--show-server", help="Print how to serve the recipe's base, and exit.")
    ] = False,
    share: Annotated[
        str, typer.Option("--share", metavar="I/N", help="Only this part of the prompts, as in 2/4.")
    ] = "1/1",
    temperature: Annotated[float, typer.Option(metavar="NUMBER", min=0.0, help="0 takes the likeliest token.")] = 1.0,
    top_p: Annotated[
        float,
        typer.Option(metavar="SHARE", min=0.01, max=1.0, help="Sample from the likeliest tokens of this probability."),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="The longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Another one gives other answers.")] = 0,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    runs_dir: RunsOption = runs.DEFAULT,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Answer a file of prompts, n times each. Continues where it was stopped.

    Example: lora-align generate --prompts prompts.txt --out answers.jsonl -n 4
    """
    screen = Screen(as_json, quiet)
    if endpoint and (weights is not None or want is not None):
        raise UserError("generate: a server draws with --model or --adapter; `merge` makes an adapter of weights")
    if adapter is not None and (weights is not None or want is not None):
        raise UserError("generate: --adapter goes without --weights and --want")
    project = project_of(recipe, overrides, screen, runs_dir)
    if show_server:
        from lora_align.model.endpoint import serve_line

        screen.result(serve_line(project), {"serve": serve_line(project)})
        return
    if prompts is None or out is None:
        raise UserError("generate: --prompts FILE and --out FILE are needed")
    part = _part(share)
    wanted = parse_weights(weights) if weights is not None else None
    shards.check_out(out)
    readable(prompts)
    policy = None if endpoint else chosen(runs_dir, project, screen, wanted, adapter, want)
    screen.loading(project.base.model)
    from lora_align.commands.generate import generate_file, summary
    from lora_align.model.decoding import Sampling

    if endpoint:
        sampler, who = _served(endpoint, model, adapter, project)
    elif policy is not None:
        sampler, who, asked = _loaded(project, runs_dir, policy, screen)
        system = f"{asked}\n\n{system}" if asked and system else asked or system
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    result = generate_file(prompts, out, sampler, who, screen, n=n, sampling=sampling, system=system, share=part)
    screen.result(summary(result), result)


def _served(address: str, model: str, adapter: Path | None, project: Recipe) -> tuple["Sampler", dict[str, Any]]:
    """A server as a sampler, and what names it."""
    from lora_align.model.endpoint import Endpoint

    server = Endpoint.at(address, model, template=project.base.chat_template_kwargs)
    if adapter is not None:
        server = server.load_adapter(adapter, adapter.name, project)
    return server, {"server": server.url, "model": server.model}


def _loaded(project: Recipe, runs_dir: Path, policy: Policy, screen: Screen) -> tuple["Sampler", dict[str, Any], str]:
    """The base with what was chosen over it, what names it, and the system message that asks."""
    from lora_align.chat import session as sessions
    from lora_align.model import base as bases
    from lora_align.model.decoding import Sampling
    from lora_align.model.sampler import LocalSampler

    base = bases.find(project.base)
    session = sessions.open_session(base, runs_dir, project, policy, Sampling(), screen)
    parts = [parent.lineage() for vector in policy.vectors.values() for parent in vector.parents]
    who = {"base": base.identity, "start": session.start, "adapters": parts, "weights": dict(policy.weights)}
    return LocalSampler(session.model, base), who, policy.system


def _part(share: str) -> tuple[int, int]:
    """`2/4`: the second of four."""
    number, _, parts = share.partition("/")
    if not (number.isdigit() and parts.isdigit() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--share {share!r}: expected which of how many parts, as in 2/4")
    return int(number), int(parts)
