"""Chat on a terminal or from a pipe: read lines, run commands such as /w, and print answers."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lora_align import store
from lora_align.chat.commands import EXIT, HELP
from lora_align.chat.session import Session
from lora_align.console import Screen, count
from lora_align.data.rows import Message
from lora_align.errors import RunFailedError, UserError, inert
from lora_align.mix_weights import parse_weights
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import Conditioned


def answer_once(session: Session, prompt: str, screen: Screen) -> None:
    """Answer one prompt."""
    session.turns.append(Message("user", prompt))
    if screen.as_json:
        text = "".join(session.answer())
        state = {"tokens": session.tokens, "weights": session.weights, "want": session.want}
        screen.result(text, {"answer": text, **state})
        return
    with screen.streaming() as show:
        for piece in session.answer():
            show(piece)


def run_script(session: Session, lines: Iterable[str], screen: Screen) -> None:
    """Process lines from a pipe as if they were typed. The first error ends the script."""
    for number, line in enumerate(map(str.strip, lines), 1):
        if line in EXIT:
            return
        try:
            _process_line(session, line, screen)
        except UserError as fault:
            raise RunFailedError(f"line {number} of the input: {fault}") from fault


def run_terminal(session: Session, screen: Screen) -> None:
    """Read and process lines until /quit or the end of input."""
    _enable_line_editing()
    screen.note(
        f"{session.base.recipe.model} · {_format_weights(session.weights)} · /help for commands, Ctrl-D to leave"
    )
    while True:
        try:
            line = input("› ").strip()
        except EOFError:
            screen.note("")
            return
        except KeyboardInterrupt:
            screen.note("(Ctrl-D or /quit to leave)")
            continue
        if line in EXIT:
            return
        try:
            _process_line(session, line, screen)
        except UserError as fault:
            screen.say(str(fault))
        except KeyboardInterrupt:
            screen.say("(stopped)")


def _process_line(session: Session, line: str, screen: Screen) -> None:
    """Run a command, or answer a message."""
    if line.startswith("/"):
        command, _, argument = line[1:].partition(" ")
        _run_command(session, command, argument.strip(), screen)
    elif line:
        session.retries = 0
        _stream_answer(session, [*session.turns, Message("user", line)], screen)


def _run_command(session: Session, command: str, argument: str, screen: Screen) -> None:
    commands: dict[str, Callable[[], None]] = {
        "w": lambda: _set_weights(session, argument, screen),
        "want": lambda: _want(session, argument, screen),
        "compare": lambda: _compare(session, argument, screen),
        "retry": lambda: _retry(session, screen),
        "undo": lambda: _undo(session, screen),
        "system": lambda: _system(session, argument, screen),
        "save": lambda: _save(session, argument, screen),
        "help": lambda: screen.say(HELP),
    }
    if command not in commands:
        raise UserError(f"no command /{command}; /help lists them")
    commands[command]()


def _stream_answer(session: Session, turns: list[Message], screen: Screen) -> None:
    """Print the answer to these turns as it is sampled. Ctrl-C keeps the text so far; an error restores the session."""
    before, session.turns = session.turns, turns
    pieces: list[str] = []
    stopped = False
    try:
        with screen.streaming() as show:
            try:
                for piece in session.answer(_sampling(session)):
                    pieces.append(piece)
                    show(piece)
            except KeyboardInterrupt:
                stopped = True
                show(" …")
                session.cache.forget()
    except UserError:
        session.turns = before
        raise
    session.turns = [*turns, Message("assistant", "".join(pieces))]
    if stopped:
        raise KeyboardInterrupt


def _sampling(session: Session) -> Sampling:
    """Return the session's sampling, with another seed for each retry."""
    sampling = session.sampling
    return sampling if sampling.seed is None else replace(sampling, seed=sampling.seed + session.retries)


def _set_weights(session: Session, argument: str, screen: Screen) -> None:
    for warning in session.set_weights(parse_weights(argument)) if argument else ():
        screen.warn(warning)
    screen.say(_format_weights(session.weights))


def _want(session: Session, argument: str, screen: Screen) -> None:
    conditioned = session.conditioned
    if conditioned is None:
        raise UserError("/want needs a conditioned policy; start the chat with --want")
    if argument:
        conditioned = Conditioned.parse(conditioned.name, conditioned.run, argument, screen)
        session.conditioned = conditioned
    screen.say(str(conditioned.want))


def _compare(session: Session, argument: str, screen: Screen) -> None:
    """Answer the last question at each set of weights, with the same seed."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    settings = [part.strip() for part in argument.split("|") if part.strip()]
    if len(settings) < 2:
        raise UserError("/compare takes two or more sets of weights: /compare helpful=1 | harmless=1")
    question = _last_question(session)
    if question is None:
        raise UserError("/compare: there is no question; type one first")
    weights_before, turns = session.weights, session.turns
    table = Table(expand=True, box=SIMPLE_HEAD)
    answers = []
    try:
        session.turns = turns[: question + 1]
        for setting in settings:
            weights = parse_weights(setting)
            for warning in session.set_weights(session.only(weights)):
                screen.warn(warning)
            text = "".join(session.answer(replace(session.sampling, seed=session.sampling.seed or 0)))
            answers.append(Text(inert(f"{text}\n({count(session.tokens, 'token')})")))
            table.add_column(Text(inert(setting)), ratio=1)
    finally:
        session.turns = turns
        session.set_weights(session.only(weights_before))
    table.add_row(*answers)
    Console().print(table)


def _retry(session: Session, screen: Screen) -> None:
    question = _last_question(session)
    if question is None:
        raise UserError("/retry: there is no question; type one first")
    session.retries += 1
    _stream_answer(session, session.turns[: question + 1], screen)


def _last_question(session: Session) -> int | None:
    """Return the index of the last user message."""
    return max((i for i, turn in enumerate(session.turns) if turn.role == "user"), default=None)


def _undo(session: Session, screen: Screen) -> None:
    if not session.turns:
        raise UserError("/undo: there is no question to remove")
    while session.turns and session.turns.pop().role != "user":
        pass
    screen.say(f"removed the last question; {count(len(session.turns), 'message')} remain")


def _system(session: Session, argument: str, screen: Screen) -> None:
    session.system = argument
    screen.say("system message set" if argument else "no system message")


def _save(session: Session, argument: str, screen: Screen) -> None:
    if not argument:
        raise UserError("/save needs a file name, as in /save chat.md")
    system = [Message("system", session.system)] if session.system else []
    messages = [{"role": m.role, "content": m.content} for m in [*system, *session.turns]]
    state = {"weights": session.weights, "want": session.want, "base": session.base.identity}
    text = json.dumps({"messages": messages, **state}, indent=2, ensure_ascii=False)
    if argument.endswith(".md"):
        heading = f"{session.base.recipe.model} · {_format_weights(session.weights)}"
        turns = [f"**{message['role']}**\n\n{message['content'].strip()}" for message in messages]
        text = inert("\n\n".join([f"# {heading}", *turns])) + "\n"
    try:
        Path(argument).expanduser().write_text(text, encoding="utf-8")
    except OSError as fault:
        raise UserError(f"cannot write {argument}: {fault.strerror}; choose another file") from fault
    screen.say(f"saved {count(len(messages), 'message')} to {argument}")


def _format_weights(weights: Mapping[str, float]) -> str:
    return " ".join(f"{name}={weight:g}" for name, weight in weights.items()) or "start policy, no weights"


def _enable_line_editing() -> None:
    """Enable arrow keys and a stored history, if the platform has readline."""
    if not sys.stdin.isatty():
        return
    try:
        import readline
    except ImportError:  # Windows has none
        return
    import atexit

    history = store.cache_folder() / "chat_history"
    history.parent.mkdir(parents=True, exist_ok=True)
    if history.exists():
        readline.read_history_file(history)
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, history)
