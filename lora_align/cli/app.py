"""The program: its commands, its signals, and how it ends."""

import inspect
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

from lora_align import __version__, processes, store
from lora_align.cli import measure_commands, mix_commands, start_commands, train_commands, use_commands
from lora_align.console import Screen, library_log, write
from lora_align.errors import RunFailedError, Stopped, UserError, nearest


class Grouped(TyperGroup):
    """The program's help lists its commands by what they are for."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write a section for each group."""
        longest = max(map(len, COMMANDS))
        for title, commands in GROUPS.items():
            with formatter.section(title):
                room = formatter.width - longest - 4
                rows = [(f"{name:<{longest}}", self.commands[name].get_short_help_str(room)) for name in commands]
                formatter.write_dl(rows)


app = typer.Typer(
    help="Turn preferences into LoRA adapters that add and subtract.",
    epilog="`lora-align help COMMAND` shows a command's options and an example.",
    cls=Grouped,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
GROUPS: dict[str, dict[str, Callable[..., None]]] = {
    "Start": {
        "demo": start_commands.demo,
        "recipes": start_commands.list_recipes,
        "init": start_commands.init,
        "doctor": start_commands.doctor,
        "plan": start_commands.plan,
    },
    "Data": {"data": start_commands.data},
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
        "reach": measure_commands.reach,
    },
    "Use": {"chat": use_commands.chat, "generate": use_commands.generate, "score": use_commands.score},
    "Measure": {"eval": measure_commands.evaluate, "sweep": measure_commands.sweep, "list": start_commands.list_runs},
    "Share": {"push": mix_commands.push},
}
COMMANDS = {name: command for commands in GROUPS.values() for name, command in commands.items()}
REPEATED = {"demo", "score", "generate", "eval", "sweep", "reach"}  # which go on by themselves, said once more
SIGNALLED = 128  # exit codes above it name a signal
LAST_WORD = 30.0  # seconds that the others wait for the first one, whose end is theirs, to say why
TRAINING = {"sft", "dpo", "reward", "rsf"}  # what several processes do together
for _name, _command in COMMANDS.items():
    app.command(_name)(_command)


@app.command("help", hidden=True)
def show_help(
    context: typer.Context,
    command: Annotated[str | None, typer.Argument(metavar="COMMAND", help="One of the program's commands.")] = None,
) -> None:
    """Show the help of a command."""
    above = context.parent
    assert above is not None
    assert isinstance(above.command, Grouped)
    if command is None:
        Screen().show(above.get_help())
        return
    if command not in above.command.commands:
        raise UserError(f"no command {command!r}{nearest(command, list(COMMANDS))} (see lora-align --help)")
    found = above.command.commands[command]
    Screen().show(found.get_help(typer.Context(found, parent=above, info_name=command)))


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
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Options of every command."""
    if context.invoked_subcommand is None:
        Screen().show(context.get_help())
    if debug:
        os.environ["LORA_ALIGN_DEBUG"] = "1"
    processes.check(context.invoked_subcommand or "help", trains=context.invoked_subcommand in TRAINING)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, by unwinding it."""

    def stop(number: int, _frame: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Run a command; every failure is one line on stderr and a known exit code."""
    run: Callable[..., Any] = typer.main.get_command(app)
    try:
        with _signals(), library_log(store.cache_folder() / "log.txt"):
            code = run(standalone_mode=False)
        if code == 130:  # Typer has made this of a KeyboardInterrupt
            raise Stopped(signal.SIGINT)
        sys.exit(code if isinstance(code, int) else 0)
    except UserError as fault:
        _complain(str(fault), fault.exit_code)
    except Stopped as stop:
        launched = " (or under the launcher again)" if processes.world_size() > 1 else ""
        command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
        goes_on = f"; to go on: {_going_on()}{launched}" if command in REPEATED | TRAINING else ""
        _complain(f"stopped; nothing unfinished was published{goes_on}", stop.exit_code)
    except TyperException as fault:
        told = fault.format_message() if hasattr(fault, "format_message") else str(fault)
        _complain(f"{told.rstrip('.')} (see lora-align --help, or --help behind a command)", 2)
    except Exception as fault:  # noqa: BLE001 - what nobody foresaw ends in one line too
        _complain(
            f"{type(fault).__name__}: {fault} (a traceback: --debug before the command)", RunFailedError.exit_code
        )


def _going_on() -> str:
    """The line that goes on with the command that was stopped; some go on by themselves."""
    words = [word for word in sys.argv[1:] if word not in ("--force", "--resume")]
    asked = any("resume" in inspect.signature(COMMANDS[word]).parameters for word in words if word in COMMANDS)
    return f"lora-align {shlex.join([*words, *(['--resume'] if asked else [])])}"


def _complain(text: str, code: int) -> None:
    if os.environ.get("LORA_ALIGN_DEBUG"):
        write(traceback.format_exc().rstrip(), sys.stderr)
    if processes.rank() == 0:
        Screen().say("\n".join(f"error: {line}" for line in text.split("\n")))
    elif code == RunFailedError.exit_code:  # the others were refused, or stopped, just as the first one was
        write(f"process {processes.rank()}: {text}", sys.stderr)
    if processes.rank() and code < SIGNALLED:  # all know of a signal: nobody has to be heard first
        time.sleep(LAST_WORD)
    sys.exit(code)
