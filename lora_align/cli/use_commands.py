"""Commands that use what was trained: chat, generate, score."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_align.cli.shared import (
    MEASURES,
    SEEDS,
    AdapterOption,
    Given,
    LengthOption,
    TopPOption,
    WantOption,
    WeightsOption,
    check_first_row,
    check_text,
    check_url,
    takes,
    weights_of,
)
from lora_align.console import Screen
from lora_align.data import shards
from lora_align.errors import UserError
from lora_align.policy.policy import Policy, select_policy
from lora_align.recipe import Recipe

if TYPE_CHECKING:
    from lora_align.model.sampler import Sampler


@takes(*MEASURES)
def score(
    given: Given,
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
) -> None:
    """Score answers, or both answers of pairs. Continues where it was stopped.

    Example: lora-align score --data answers.jsonl --out scored.jsonl
    """
    project = given.of_runs()
    given.check_judges([by], project)
    shards.check_out_file(out)
    check_first_row(data)
    given.screen.loading(project.base.model)
    from lora_align.commands.score import score_file

    result = score_file(project, given.runs_dir, data, out, by, given.screen)
    given.screen.result(result.summary(), result.as_json())


@takes(*MEASURES)
def chat(
    given: Given,
    weights: WeightsOption = None,
    adapter: AdapterOption = None,
    want: WantOption = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this and exit.")] = None,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="A system message.")] = "",
    temperature: Annotated[float, typer.Option(metavar="NUMBER", min=0.0, help="0 takes the likeliest token.")] = 0.7,
    top_p: TopPOption = 1.0,
    max_new_tokens: LengthOption = 512,
    seed: Annotated[int | None, typer.Option(metavar="N", help="The same answers every time.", **SEEDS)] = None,
) -> None:
    """Talk to a mix, an adapter or a policy, and change its weights. Without options: the newest mix.

    Piped text is one prompt. Where it begins with /, each line is a command or a message, as on a terminal.

    Example: lora-align chat --weights helpful=1,harmless=-0.5
    """
    if adapter is not None and (weights is not None or want is not None):
        raise UserError("chat: --adapter goes without --weights and --want")
    check_text("--prompt", prompt)
    check_text("--system", system)
    script: list[str] = []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        if prompt.startswith("/"):
            script, prompt = prompt.splitlines(), None
    if prompt is not None and not prompt.strip():
        raise UserError("chat: the prompt is empty; pipe one in, or give --prompt TEXT")
    if script and given.as_json:
        raise UserError("chat: --json takes one prompt, no commands")
    project = given.of_runs()
    wanted = weights_of(weights)
    policy = select_policy(given.runs_dir, project, given.screen, wanted, adapter, want)
    given.screen.loading(project.base.model)
    from lora_align.chat import session as sessions
    from lora_align.chat import terminal
    from lora_align.model import base as bases
    from lora_align.model.decoding import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    session = sessions.open_session(bases.find(project.base), given.runs_dir, project, policy, sampling, given.screen)
    session.system = system
    if prompt is not None:
        terminal.once(session, prompt.strip(), given.screen)
    elif script:
        terminal.script(session, script, given.screen)
    else:
        terminal.talk(session, given.screen)


@takes(*MEASURES)
def generate(
    given: Given,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE|ID", help="A file of prompts (.txt: one a line), or a data set's hub id."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A new .jsonl or .parquet file.")] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Answers to each prompt.")] = 1,
    weights: WeightsOption = None,
    adapter: AdapterOption = None,
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
    top_p: TopPOption = 1.0,
    max_new_tokens: LengthOption = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="Another one gives other answers.", **SEEDS)] = 0,
) -> None:
    """Answer a file of prompts, n times each. Continues where it was stopped.

    Example: lora-align generate --prompts prompts.txt --out answers.jsonl -n 4
    """
    if endpoint and (weights is not None or want is not None):
        raise UserError("generate: a server draws with --model or --adapter; `merge` makes an adapter of weights")
    if adapter is not None and (weights is not None or want is not None):
        raise UserError("generate: --adapter goes without --weights and --want")
    check_url("--endpoint", endpoint)
    check_text("--system", system)
    project = given.of_runs()
    if show_server:
        from lora_align.model.endpoint import serve_line

        given.screen.result(serve_line(project), {"serve": serve_line(project)})
        return
    if prompts is None or out is None:
        raise UserError("generate: --prompts FILE and --out FILE are needed")
    part = _part(share)
    wanted = weights_of(weights)
    shards.check_out_file(out)
    check_first_row(prompts)
    policy = None if endpoint else select_policy(given.runs_dir, project, given.screen, wanted, adapter, want)
    given.screen.loading(project.base.model)
    from lora_align.commands.generate import generate_file
    from lora_align.model.decoding import Sampling

    if endpoint:
        sampler, who = _served(endpoint, model, adapter, project)
    elif policy is not None:
        sampler, who, asked = _loaded(project, given.runs_dir, policy, given.screen)
        system = f"{asked}\n\n{system}" if asked and system else asked or system
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    result = generate_file(prompts, out, sampler, who, given.screen, n=n, sampling=sampling, system=system, share=part)
    given.screen.result(result.summary(), result.as_json())


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
