"""The entry point: registers the commands, and turns errors and Ctrl-C into messages and exit codes."""

import os
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from lora_align import __version__, distributed, runs, store
from lora_align.cli import measure_commands, mix_commands, prefer_command, setup_commands, train_commands, use_commands
from lora_align.console import Screen, library_log, write
from lora_align.errors import RunFailedError, Stopped, UserError, nearest


class Grouped(TyperGroup):
    """A group of commands whose help lists them by GROUPS."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        longest = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                width = formatter.width - longest - 4
                rows = [(f"{name:<{longest}}", self.commands[name].get_short_help_str(width)) for name in commands]
                formatter.write_dl(rows)


app = typer.Typer(
    help="Turn preferences into LoRA adapters that can be added and subtracted.",
    epilog="`lora-align help COMMAND` shows a command's options and an example.",
    cls=Grouped,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {
        "demo": setup_commands.demo,
        "recipes": setup_commands.list_recipes,
        "init": setup_commands.init,
        "doctor": setup_commands.doctor,
        "plan": setup_commands.plan,
    },
    "Data": {"data": setup_commands.data, "pairs": setup_commands.pairs},
    "Train": {
        "sft": train_commands.sft,
        "dpo": train_commands.dpo,
        "reward": train_commands.reward,
        "rsf": train_commands.rsf,
    },
    "Mix": {
        "merge": mix_commands.merge,
        "inspect": mix_commands.inspect,
        "tune": measure_commands.tune,
        "prefer": prefer_command.prefer,
        "reach": measure_commands.reach,
    },
    "Use": {
        "chat": use_commands.chat,
        "generate": use_commands.generate,
        "serve": use_commands.serve,
        "score": use_commands.score,
    },
    "Measure": {"eval": measure_commands.evaluate, "sweep": measure_commands.sweep, "list": measure_commands.list_runs},
    "Share": {"export": mix_commands.export, "push": mix_commands.push},
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}
SAME_LINE = {"demo", "pairs", "score", "generate", "eval", "sweep", "reach"}  # the same command line continues these
WITHOUT_RUN = {"chat", "serve", "prefer"}  # these publish nothing
SIGNALLED = 128  # exit codes above it name a signal
RANK_0_SECONDS = 30.0  # seconds that other ranks wait, so that rank 0 can print its error before it is ended
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.command("help", hidden=True)
def show_help(
    context: typer.Context,
    command: Annotated[
        str | None, typer.Argument(metavar="COMMAND", help="The command to explain; without it, the program.")
    ] = None,
) -> None:
    """Show the help of the program or of a command."""
    program = context.parent
    assert program is not None
    assert isinstance(program.command, Grouped)
    if command is None:
        Screen().show(program.get_help())
        return
    if command not in program.command.commands:
        raise UserError(f"no command {command!r}{nearest(command, list(COMMANDS))} (see `lora-align --help`)")
    subcommand = program.command.commands[command]
    Screen().show(subcommand.get_help(typer.Context(subcommand, parent=program, info_name=command)))


def _version(show: bool) -> None:
    if show:
        Screen().show(f"lora-align {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if context.invoked_subcommand is None:
        Screen().show(context.get_help())
    if debug:
        os.environ["LORA_ALIGN_DEBUG"] = "1"
    distributed.check(context.invoked_subcommand or "help", trains=context.invoked_subcommand in runs.TRAINING)


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `Stopped` on SIGTERM, so that a command cleans up as after Ctrl-C."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main() -> None:
    """Run a command. Every failure prints its message to stderr, one line for each fault, and sets an exit code."""
    run: Callable[..., Any] = typer.main.get_command(app)
    try:
        with _sigterm_as_exception(), library_log(store.cache_folder() / "log.txt"):
            code = run(standalone_mode=False)
        if code == 130:  # Typer returns this for a KeyboardInterrupt
            raise Stopped(signal.SIGINT)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as fault:
        _exit(str(fault), fault.exit_code)
    except Stopped as stop:
        launched = " (or under the launcher again)" if distributed.world_size() > 1 else ""
        line = _continuing_line(has_checkpoint=stop.has_checkpoint)
        if _typed_command() in WITHOUT_RUN:  # a signal is the usual end
            _exit("stopped", stop.exit_code, "")
        unpublished = "; no unfinished run was published"
        _exit(f"stopped{unpublished}{line and f'; to continue: {line}{launched}'}", stop.exit_code)
    except TyperException as fault:
        message = fault.format_message() if hasattr(fault, "format_message") else str(fault)
        if message.startswith("No such command"):
            message = message.replace("No such", "no", 1)
        _exit(f"{message.rstrip('.')} (see `lora-align --help`, or `--help` after a command)", 2)
    except Exception as fault:  # noqa: BLE001 - unforeseen errors also print one line
        message = f"{type(fault).__name__}: {fault} (for the traceback, put --debug before the command)"
        _exit(message, RunFailedError.exit_code)


def _continuing_line(*, has_checkpoint: bool) -> str:
    """Return the command line that continues the stopped command, or an empty text if none does.

    If --force was given and the new run has no checkpoint, --resume would continue the old run, so --force stays. `rsf`
    publishes its policies one by one, so it continues without --force.
    """
    typed, command = sys.argv[1:], _typed_command()
    new = [word for word in typed if word not in ("--force", "--resume")]
    if command == "rsf":
        return f"lora-align {shlex.join(new)}"
    if command in runs.TRAINING and (has_checkpoint or "--force" not in typed):
        return f"lora-align {shlex.join([*new, '--resume'])}"
    return f"lora-align {shlex.join(typed)}" if command in {*SAME_LINE, *runs.TRAINING} else ""


def _typed_command() -> str:
    return next((word for word in sys.argv[1:] if not word.startswith("-")), "")


def _exit(text: str, code: int, begin: str = "error: ") -> None:
    """Print an error and exit. Rank 0 prints; other ranks print only failures that rank 0 may not have."""
    if os.environ.get("LORA_ALIGN_DEBUG"):
        write(traceback.format_exc().rstrip(), sys.stderr)
    if distributed.rank() == 0:
        Screen().say("\n".join(f"{begin}{line}" for line in text.split("\n")))
    elif code == RunFailedError.exit_code:  # all other errors are raised on rank 0 as well
        write(f"rank {distributed.rank()}: {text}", sys.stderr)
    if distributed.rank() and code < SIGNALLED:  # a signal reaches all ranks
        time.sleep(RANK_0_SECONDS)
    sys.exit(code)
