"""The commands chat, generate, serve and score."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_align.chat.commands import is_script
from lora_align.cli.shared import (
    RUNS,
    SEED_RANGE,
    AdapterOption,
    Given,
    LengthOption,
    ServedModelOption,
    SystemOption,
    TemperatureOption,
    TopPOption,
    WantOption,
    WeightsOption,
    check_first_row,
    check_text,
    check_url,
    takes,
)
from lora_align.data import shards
from lora_align.errors import UserError
from lora_align.mix_weights import parse_weights
from lora_align.policy import profiles
from lora_align.policy.policy import select_policy
from lora_align.recipe import Recipe

if TYPE_CHECKING:
    from lora_align.model.sampler_protocol import Sampler


@takes(*RUNS)
def score(
    given: Given,
    data: Annotated[
        str, typer.Option("--data", metavar="FILE|ID", help="A file or a dataset on the hub with answers or pairs.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="A new .jsonl or .parquet file for the rows with their scores."),
    ],
    by: Annotated[
        str,
        typer.Option(
            "--by",
            metavar="JUDGE",
            help="Score with this reward model, or by pair:PREFERENCE with a preference's two adapters.",
        ),
    ] = "reward",
) -> None:
    """Score answers, or both answers of pairs. The same command continues after a stop.

    Example: lora-align score --data answers.jsonl --out scored.jsonl
    """
    recipe = given.recipe_of_runs()
    given.check_judges([by], recipe)
    shards.check_out_file(out)
    check_first_row(data)
    given.screen.loading(recipe.base.model)
    from lora_align.commands.score import score_file

    result = score_file(recipe, given.runs_dir, data, out, by, given.screen)
    given.show(result)


@takes(*RUNS)
def chat(
    given: Given,
    weights: WeightsOption = None,
    adapter: AdapterOption = None,
    want: WantOption = None,
    profile: Annotated[
        str | None, typer.Option("--profile", metavar="NAME", help="The weights of a profile that `prefer` saved.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Answer this prompt and exit.")
    ] = None,
    system: SystemOption = "",
    temperature: TemperatureOption = 0.7,
    top_p: TopPOption = 1.0,
    max_new_tokens: LengthOption = 512,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="The seed of sampling; by default a new one each time.", **SEED_RANGE),
    ] = None,
) -> None:
    """Chat with a mix, an adapter or a policy, and change its weights.

    Text from a pipe is one prompt. If a line of it is a command such as /w, each line is a command or a message, as on
    a terminal; the first error ends the chat.

    Example: lora-align chat --weights helpful=1,harmless=-0.5
    """
    check_text("--prompt", prompt)
    check_text("--system", system)
    script: list[str] = []
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.buffer.read().decode("utf-8", errors="replace")
        if is_script(prompt):
            script, prompt = prompt.splitlines(), None
    if prompt is not None and not prompt.strip():
        raise UserError("chat: the prompt is empty; give --prompt TEXT, or pipe text in")
    if script and given.as_json:
        raise UserError("chat: --json needs one prompt and takes no commands; leave out --json")
    recipe = given.recipe_of_runs()
    if profile is not None and (weights is not None or adapter is not None):
        raise UserError("--profile excludes --weights and --adapter: give only one of them")
    wanted = parse_weights(weights) if weights is not None else None
    if profile is not None:
        wanted = profiles.weights(profile, given.runs_dir)
    policy = select_policy(given.runs_dir, recipe, given.screen, wanted, adapter, want)
    given.screen.loading(recipe.base.model)
    from lora_align.chat import session as sessions
    from lora_align.chat import terminal
    from lora_align.model import base as bases
    from lora_align.model.sampler_protocol import Sampling

    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    session = sessions.open_session(bases.find(recipe.base), given.runs_dir, recipe, policy, sampling, given.screen)
    session.system = system
    if prompt is not None:
        terminal.answer_once(session, prompt.strip(), given.screen)
    elif script:
        terminal.run_script(session, script, given.screen)
    else:
        terminal.run_terminal(session, given.screen)


@takes(*RUNS)
def generate(
    given: Given,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE|ID", help="A file of prompts (.txt: one per line), or a dataset on the hub."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="A new .jsonl or .parquet file for the answers.")
    ] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="The number of answers to each prompt.")] = 1,
    weights: WeightsOption = None,
    adapter: AdapterOption = None,
    want: WantOption = None,
    system: SystemOption = "",
    endpoint: Annotated[
        str | None, typer.Option("--endpoint", metavar="URL", help="Sample on this OpenAI-compatible server.")
    ] = None,
    model: ServedModelOption = "",
    show_server: Annotated[
        bool, typer.Option("--show-server", help="Print the vLLM command that serves the recipe's base, and exit.")
    ] = False,
    share: Annotated[
        str, typer.Option("--share", metavar="I/N", help="Answer only this part of the prompts, as in 2/4.")
    ] = "1/1",
    temperature: TemperatureOption = 1.0,
    top_p: TopPOption = 1.0,
    max_new_tokens: LengthOption = 512,
    seed: Annotated[int, typer.Option(metavar="N", help="The seed of sampling.", **SEED_RANGE)] = 0,
) -> None:
    """Sample n answers to each prompt of a file. The same command continues after a stop.

    Example: lora-align generate --prompts prompts.txt --out answers.jsonl -n 4
    """
    if endpoint and want is not None:
        raise UserError("generate: --endpoint excludes --want; leave out --endpoint")
    if endpoint and weights is not None and (model or adapter is not None):
        raise UserError("generate: with --endpoint, --weights is the model; leave out --model and --adapter")
    check_url("--endpoint", endpoint)
    check_text("--system", system)
    recipe = given.recipe_of_runs()
    if show_server:
        from lora_align.rsf.serving import serve_command

        given.screen.result(serve_command(recipe), {"serve": serve_command(recipe)})
        return
    if prompts is None or out is None:
        raise UserError("generate: give --prompts FILE and --out FILE")
    part = _part(share)
    wanted = parse_weights(weights) if weights is not None else None
    shards.check_out_file(out)
    check_first_row(prompts)
    policy = None if endpoint else select_policy(given.runs_dir, recipe, given.screen, wanted, adapter, want)
    if endpoint:
        given.screen.note(f"connecting to {endpoint} …")
    else:
        given.screen.loading(recipe.base.model)
    from lora_align.commands.generate import generate_file
    from lora_align.model.sampler_protocol import Sampling

    if endpoint:
        sampler, who = _served(endpoint, weights or model, adapter, recipe)
    elif policy is not None:
        from lora_align.model import base as bases
        from lora_align.policy.loading import load_policy

        loaded = load_policy(bases.find(recipe.base), recipe, policy, given.runs_dir, given.screen)
        sampler, who = loaded.sampler, loaded.identity
        system = "\n\n".join(filter(None, [policy.system, system]))
    sampling = Sampling(temperature, top_p, max_new_tokens, seed)
    result = generate_file(prompts, out, sampler, who, given.screen, n=n, sampling=sampling, system=system, share=part)
    given.show(result)


@takes(*RUNS)
def serve(
    given: Given,
    weights: WeightsOption = None,
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="The address to listen on; 0.0.0.0 for all of this machine."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="The port; 0 for a free one.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key", metavar="KEY", envvar="LORA_ALIGN_API_KEY", help="Answer only requests with this key."
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let other machines use the server without a key.")
    ] = False,
    max_new_tokens: LengthOption = 512,
    deadline: Annotated[
        float, typer.Option("--deadline", metavar="SECONDS", min=1.0, help="The longest time for one request.")
    ] = 600.0,
    log_texts: Annotated[
        bool, typer.Option("--log-texts", help="Print prompts and answers, not only their numbers of tokens.")
    ] = False,
) -> None:
    """Serve an OpenAI-compatible API, and a page with sliders.

    The model of a request is a policy, as in helpful=1,harmless=-0.5. --weights is the default.

    Example: lora-align serve --weights helpful=1
    """
    check_text("--api-key", api_key)
    recipe = given.recipe_of_runs()
    wanted = parse_weights(weights) if weights is not None else None
    policy = select_policy(given.runs_dir, recipe, given.screen, wanted)
    given.screen.loading(recipe.base.model)
    from lora_align.prefer.pick_routes import pick_routes
    from lora_align.serve.server import ServerSettings, run_server

    settings = ServerSettings(host, port, api_key or None, no_auth, max_new_tokens, deadline, log_texts)
    run_server(recipe, given.runs_dir, policy, settings, given.screen, pick_routes)


def _served(address: str, model: str, adapter: Path | None, recipe: Recipe) -> tuple["Sampler", Mapping[str, Any]]:
    """Return a sampler on a server, and the identity of its model."""
    from lora_align.model.endpoint import Endpoint
    from lora_align.rsf.serving import serve_command

    server = Endpoint.at(address, model, template=recipe.base.chat_template_kwargs)
    if adapter is not None:
        server = server.load_adapter(adapter, adapter.name, serve_command(recipe))
    return server, {"server": server.url, "model": server.model}


def _part(share: str) -> tuple[int, int]:
    """Parse `2/4` as part 2 of 4."""
    number, _, parts = share.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UserError(f"--share {share!r}: expected I/N, as in 2/4")
    return int(number), int(parts)
