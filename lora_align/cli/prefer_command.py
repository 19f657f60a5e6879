"""The command prefer."""

from typing import Annotated

import typer

from lora_align.cli.shared import (
    RUNS,
    SEED_RANGE,
    Given,
    LengthOption,
    TemperatureOption,
    check_first_row,
    takes,
)
from lora_align.data.files import EVERYDAY
from lora_align.errors import UserError
from lora_align.mix_weights import NAME, NAME_RULE, parse_weights
from lora_align.policy import vectors


@takes(*RUNS)
def prefer(
    given: Given,
    prefs: Annotated[
        str | None,
        typer.Option("--prefs", metavar="NAME,…", help="The preferences to weigh; by default all that are trained."),
    ] = None,
    picks: Annotated[int, typer.Option("--picks", metavar="N", min=1, max=1000, help="The number of picks.")] = 12,
    profile: Annotated[
        str, typer.Option("--profile", metavar="NAME", help="Save the weights under this name, for `chat --profile`.")
    ] = "me",
    prompts: Annotated[
        str, typer.Option("--prompts", metavar="FILE|ID", help="Prompts to answer; by default everyday prompts.")
    ] = "",
    logged: Annotated[
        str, typer.Option("--from", metavar="FILE|ID", help="Learn from these comparisons instead of asking.")
    ] = "",
    simulate: Annotated[
        str | None,
        typer.Option(
            "--simulate", metavar="NAME=WEIGHT,…", help="Ask a simulated person with this taste, to try the method."
        ),
    ] = None,
    noise: Annotated[
        float, typer.Option("--noise", metavar="SHARE", min=0.0, max=0.5, help="Wrong picks of a simulated person.")
    ] = 0.1,
    kl: Annotated[
        float, typer.Option("--kl", metavar="NATS", min=1e-6, help="Size of the mix: KL(start‖mix) per token.")
    ] = 0.2,
    temperature: TemperatureOption = 1.0,
    max_new_tokens: LengthOption = 128,
    seed: Annotated[int, typer.Option(metavar="N", help="The seed of sampling.", **SEED_RANGE)] = 0,
) -> None:
    """Find your weights: pick the better of two answers a few times.

    Example: lora-align prefer --picks 12 --profile me
    """
    if logged and simulate is not None:
        raise UserError("prefer: --from and --simulate exclude each other; give one of them")
    if not NAME.fullmatch(profile):
        raise UserError(f"--profile {profile!r}: expected {NAME_RULE}")
    recipe = given.recipe_of_runs()
    names = list(dict.fromkeys(name.strip() for name in prefs.split(","))) if prefs else vectors.trained(given.runs_dir)
    taste = parse_weights(simulate) if simulate is not None else None
    if len(names) < 2:
        raise UserError(
            f"prefer: two preferences or more are needed, {given.runs_dir}/ has {', '.join(names) or 'none'}"
        )
    given.check_vectors([*names, *(taste or {})], recipe)
    if unknown := set(taste or {}) - set(names):
        raise UserError(f"--simulate: {sorted(unknown)[0]} is not among the preferences {', '.join(names)}")
    for data in filter(None, (prompts, logged)):
        check_first_row(data)
    if given.as_json and not logged and simulate is None:
        raise UserError("prefer: --json cannot ask a person; give --from or --simulate")
    given.screen.loading(recipe.base.model)
    from lora_align.model.sampler_protocol import Sampling
    from lora_align.prefer.session import Asked, learn_weights

    asked = Asked(
        picks,
        prompts or str(EVERYDAY),
        kl,
        Sampling(temperature, 1.0, max_new_tokens, seed),
        "" if taste is not None else profile,
        logged,
        taste,
        noise,
    )
    given.show(learn_weights(names, asked, recipe, given.runs_dir, given.screen))
