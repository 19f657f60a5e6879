"""Commands that mix and share adapters: merge, inspect, push. None of them loads a base."""

from pathlib import Path
from typing import Annotated

import typer

from lora_align import runs
from lora_align.adapters.merge_methods import METHODS
from lora_align.adapters.merge_options import MergeOptions, check_weights
from lora_align.cli.shared import MEASURES, Given, check_picture, run_facts, takes
from lora_align.errors import UserError
from lora_align.weights import parse_weights

MethodOption = Annotated[
    str, typer.Option("--method", metavar="NAME", help=f"{', '.join(METHODS.built_in)}, or a registered method.")
]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="An option of the method, as in density=0.3.")
]
RankOption = Annotated[
    str | None,
    typer.Option(
        "--rank",
        metavar="N|auto:SHARE",
        help="Cut to this rank; auto:0.99: the smallest that keeps 99 % of the energy.",
    ),
]
FitOption = Annotated[
    str | None,
    typer.Option("--fit", metavar="SERVER", help="vllm or llama.cpp: pad with zeros to a rank that it reads."),
]


@takes(*MEASURES, "name", "force")
def merge(
    given: Given,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME=WEIGHT,…",
            help="Preferences, runs or folders, as in helpful=1,harmless=-0.5.",
        ),
    ],
    method: MethodOption = "exact",
    option: MethodOptions = None,
    rank: RankOption = None,
    fit: FitOption = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="TYPE", help="float32, float16 or bfloat16 instead of the parents' own."),
    ] = None,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Merge adapters whose bases are the same under other names.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write to this folder instead of runs/mix/NAME.")
    ] = None,
    with_start: Annotated[
        bool, typer.Option("--with-start/--without-start", help="Include the SFT adapter, or leave it out.")
    ] = True,
) -> None:
    """Add weighted preference vectors up to one ordinary adapter.

    Example: lora-align merge --weights helpful=1,harmless=0.5
    """
    wanted = parse_weights(weights)
    if out is not None and (given.name is not None or not out.name):
        raise UserError("merge: --out takes the path of a new folder, and goes without --name")
    if out is not None:
        runs.refuse_missing_parent(out)
    how = MergeOptions.said(method, option or [], rank, fit, dtype, with_start=with_start, same_base=same_base)
    check_weights(method, wanted)
    project = given.of_runs()
    given.check_vectors(wanted, project)
    given.screen.note("adding adapters up …")
    from lora_align.commands.merge import merge_adapters, summary

    run = merge_adapters(
        wanted, project, given.runs_dir, given.screen, how, name=given.name, out=out, force=given.force
    )
    given.screen.result(summary(run), run_facts(run))


@takes(*MEASURES)
def inspect(
    given: Given,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Preferences, runs or folders; without any: all trained preferences."),
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            "--weights", "-w", metavar="NAME=WEIGHT,…", help="Also measure this mix, as in helpful=1,harmless=-0.5."
        ),
    ] = "",
    method: MethodOption = "exact",
    option: MethodOptions = None,
    rank: RankOption = None,
    fit: FitOption = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="FILE", help="Draw a map of every vector's layers to this .png, .pdf or .svg file."
        ),
    ] = None,
) -> None:
    """Measure vectors: norms, angles, spectra, interference. With --weights, also what a mix keeps of each.

    Example: lora-align inspect helpful harmless
    """
    wanted = parse_weights(weights) if weights else {}
    check_picture(picture)
    how = MergeOptions.said(method, option or [], rank, fit, None, same_base=True)
    project = given.of_runs()
    given.check_vectors([*(names or []), *wanted], project)
    given.screen.note("reading adapters …")
    from lora_align.commands.inspect import inspect_vectors, summary

    found = inspect_vectors(names or [], wanted, project, given.runs_dir, how, picture)
    for doubt in found["doubts"]:
        given.screen.warn(doubt)
    given.screen.result(summary(found), found)


@takes()
def push(
    given: Given,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder, as in runs/mix/helpful1.")],
    to: Annotated[str, typer.Option("--to", metavar="OWNER/NAME", help="The repository on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="Visible to everybody; private otherwise.")] = False,
) -> None:
    """Push a run to the hub, with a model card.

    Example: lora-align push runs/mix/helpful1 --to me/helpful
    """
    given.screen.note("loading libraries …")
    from lora_align.commands.push import push_run

    address = push_run(run, to, public=public, screen=given.screen)
    given.screen.result(address, {"run": str(run), "repository": to, "address": address})
