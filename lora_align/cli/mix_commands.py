"""The commands merge, inspect, export and push, which load no base."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from lora_align import runs, store
from lora_align.adapters.merge_methods import METHODS
from lora_align.adapters.merge_options import MergeOptions, check_weights
from lora_align.cli.shared import RUNS, Given, check_picture, takes
from lora_align.errors import UserError
from lora_align.export import FORMATS, FULL_DISK, ExportOptions
from lora_align.mix_weights import parse_weights
from lora_align.policy.policy import find_policy, split_mix

MethodOption = Annotated[
    str,
    typer.Option("--method", metavar="NAME", help=f"{', '.join(METHODS.built_in)}, or a registered method."),
]
MethodOptions = Annotated[
    list[str] | None,
    typer.Option("--option", metavar="KEY=VALUE", help="An option of the method, as in density=0.3; repeatable."),
]
RankOption = Annotated[
    str | None,
    typer.Option(
        "--rank",
        metavar="N|auto:SHARE",
        help="Truncate to this rank, or to the smallest rank with this share of the energy, as in auto:0.99.",
    ),
]


@takes(*RUNS, "name", "force")
def merge(
    given: Given,
    weights: Annotated[
        str,
        typer.Option(
            "--weights",
            "-w",
            metavar="NAME=WEIGHT,…",
            help="Weights of preferences, runs or folders, as in helpful=1,harmless=-0.5.",
        ),
    ],
    method: MethodOption = "exact",
    option: MethodOptions = None,
    rank: RankOption = None,
    fit: Annotated[
        str | None,
        typer.Option(
            "--fit", metavar="SERVER", help="Pad the rank with zeros to one that SERVER (vllm or llama.cpp) accepts."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype", metavar="TYPE", help="Store float32, float16 or bfloat16 instead of the merged adapters' type."
        ),
    ] = None,
    same_base: Annotated[
        bool,
        typer.Option(
            "--same-base",
            help="Treat the adapters' bases as the same, even if their names or revisions differ or are missing.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Write the adapter to this folder instead of runs/mix/NAME."),
    ] = None,
    with_start: Annotated[
        bool, typer.Option("--with-start/--without-start", help="Include the SFT adapter of the start policy, or not.")
    ] = True,
) -> None:
    """Merge weighted preference vectors into one ordinary adapter.

    Example: lora-align merge --weights helpful=1,harmless=0.5
    """
    wanted = parse_weights(weights)
    if out is not None and given.name is not None:
        raise UserError("merge: give either --out or --name")
    if out is not None and not out.name:
        raise UserError(f"--out {out}: give the path of a new folder")
    if out is not None:
        store.refuse_missing_parent(out)
    how = MergeOptions.parse(method, option or [], rank, fit, dtype, with_start=with_start, same_base=same_base)
    check_weights(method, wanted)
    recipe = given.recipe_of_runs()
    given.check_vectors(wanted, recipe)
    given.screen.note("merging adapters …")
    from lora_align.commands.merge import merge_adapters

    mix = merge_adapters(wanted, recipe, given.runs_dir, given.screen, how, name=given.name, out=out, force=given.force)
    given.show(mix)


@takes(*RUNS)
def inspect(
    given: Given,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="NAME", help="Preferences, runs or folders; by default all trained preferences."),
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
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture",
            metavar="FILE",
            help="Plot the norm of each layer of every vector to this .png, .pdf or .svg file.",
        ),
    ] = None,
) -> None:
    """Measure vectors: norms, cosines, spectra, interference. With --weights, also measure a mix.

    Example: lora-align inspect helpful harmless
    """
    wanted = parse_weights(weights) if weights else {}
    check_picture(picture)
    how = MergeOptions.parse(method, option or [], rank, None, None, same_base=True)
    recipe = given.recipe_of_runs()
    given.check_vectors([*(names or []), *wanted], recipe)
    given.screen.note("reading adapters …")
    from lora_align.commands.inspect import inspect_vectors

    inspection = inspect_vectors(names or [], wanted, recipe, given.runs_dir, how, picture)
    for warning in inspection.doubts:
        given.screen.warn(warning)
    given.show(inspection)


@takes(*RUNS)
def export(
    given: Given,
    policy: Annotated[
        str,
        typer.Argument(
            metavar="WEIGHTS|RUN|FOLDER",
            help="What to export: weights, as in helpful=1,harmless=-0.5, a run or an adapter's folder.",
        ),
    ],
    gguf: Annotated[
        Path | None,
        typer.Option(
            "--gguf", metavar="FILE", help="Write a LoRA adapter that llama.cpp loads; with --each, a folder of them."
        ),
    ] = None,
    each: Annotated[
        bool, typer.Option("--each", help="Write one file a vector, so that each request can change the weights.")
    ] = False,
    merged: Annotated[
        Path | None,
        typer.Option("--merged", metavar="DIR", help="Write the whole model, with the mix added to its weights."),
    ] = None,
    gguf_merged: Annotated[
        Path | None,
        typer.Option(
            "--gguf-merged", metavar="FILE", help="Write the whole model as a GGUF file, with llama.cpp's converter."
        ),
    ] = None,
    ollama: Annotated[
        Path | None,
        typer.Option("--ollama", metavar="DIR", help="Write a Modelfile, with an adapter or a merged model."),
    ] = None,
    dequantised: Annotated[
        bool,
        typer.Option("--dequantised", help="Add the mix to the dequantised NF4 base (with a merged model)."),
    ] = False,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare answers of a merged model with those of the mix.")
    ] = True,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="TYPE",
            help="Store float16, float32, q8_0 (--gguf), or bfloat16, float16, float32 (merged models).",
        ),
    ] = None,
) -> None:
    """Export a mix for another program.

    Example: lora-align export helpful=1,harmless=0.5 --gguf mix.gguf
    """
    targets = {"--gguf": gguf, "--merged": merged, "--gguf-merged": gguf_merged, "--ollama": ollama}
    given_targets = [(option, target) for option, target in targets.items() if target is not None]
    if len(given_targets) != 1:
        raise UserError(f"export: give one of {', '.join(targets)}")
    [(option, target)] = given_targets
    _check_options(option, {"--each": each, "--dequantised": dequantised, "--no-check": not check, "--dtype": dtype})
    store.refuse_missing_parent(target, option)
    is_file = FORMATS[option].is_file and not each
    if is_file and target.suffix != ".gguf":
        raise UserError(f"{option} {str(target)!r}: expected a file name that ends in .gguf")
    for path, what in ((target, ""), *([(target.with_suffix(".md"), ", where the card would be")] if is_file else [])):
        if path.exists() or path.is_symlink():
            raise UserError(f"{option}: {path} exists{what}; delete it, or give another path")
    recipe = given.recipe_of_runs()
    chosen = find_policy(policy, recipe, given.runs_dir, given.screen)
    if not chosen.vectors:
        raise UserError(f"{policy}: this policy has no adapter to export; name weights, a run or an adapter folder")
    given.screen.loading(recipe.base.model)
    from lora_align.commands.merge import refuse_zero
    from lora_align.export.exporters import EXPORTERS
    from lora_align.export.source import find_source

    if each:
        chosen = split_mix(chosen, given.runs_dir, given.screen)
    source = find_source(chosen, recipe, given.runs_dir, given.screen)
    if not each:
        refuse_zero(source.merge, given.screen)
    how = ExportOptions(dtype, each=each, dequantised=dequantised, check=check)
    with store.report_write_errors(target, FULL_DISK):
        given.show(EXPORTERS[option](source, target, given.screen, how))


def _check_options(option: str, used: Mapping[str, object]) -> None:
    """Refuse options that a format does not read, and a type that it does not store."""
    for word in (word for word, value in used.items() if value and word not in FORMATS[option].options):
        others = [name for name, form in FORMATS.items() if word in form.options]
        raise UserError(f"{word} has no effect with {option}; it needs {' or '.join(others)}")
    if used["--dtype"] and used["--dtype"] not in FORMATS[option].dtypes:
        known = ", ".join(FORMATS[option].dtypes)
        raise UserError(f"--dtype {used['--dtype']!r}: with {option}, expected one of {known}")


@takes()
def push(
    given: Given,
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, as in runs/mix/helpful1.")],
    to: Annotated[
        str, typer.Option("--to", metavar="OWNER/NAME", help="The repository on the hub, created if it does not exist.")
    ],
    public: Annotated[
        bool, typer.Option("--public", help="Allow a public repository: create one, or push to an existing one.")
    ] = False,
) -> None:
    """Push a run to the Hugging Face hub, with a model card.

    Example: lora-align push runs/mix/helpful1 --to me/helpful
    """
    runs.read(run)
    given.screen.note("loading libraries …")
    from lora_align.commands.push_to_hub import push_run

    given.show(push_run(run, to, public=public, screen=given.screen))
