"""The conversation on a terminal: reading lines, obeying commands, showing answers."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from lora_align import store
from lora_align.chat.session import Session
from lora_align.console import Screen, count, inert
from lora_align.data.rows import Message
from lora_align.errors import RunFailedError, UserError
from lora_align.model.decoding import Sampling
from lora_align.policy.policy import Conditioned
from lora_align.weights import parse_weights

LEAVING = ("/quit", "/exit")
HELP = """\
/w helpful=0.3          turn a weight, at once; names that are not given keep theirs
/w                      show the weights
/want a=0.8,b=-0.6      ask a conditioned policy for another direction
/compare a=1 | a=-1     answer the last question at several weights side by side
/retry                  answer again; under --seed with the next seed
/undo                   take the last exchange back
/system TEXT            set the system message, or with no text remove it
/save FILE              write the conversation: FILE.md as Markdown, others as JSON
/help    /quit"""


def once(session: Session, prompt: str, screen: Screen) -> None:
    """One answer to one prompt."""
    session.turns.append(Message("user", prompt))
    if screen.as_json:
        text = "".join(session.answer())
        about = {"tokens": session.tokens, "weights": session.weights, "want": session.want}
        screen.result(text, {"answer": text, **about})
        return
    with screen.streaming() as show:
        for piece in session.answer():
            show(piece)


def script(session: Session, lines: Iterable[str], screen: Screen) -> None:
    """Obey lines that are piped in, as they would be on a terminal; the first that fails ends it."""
    for number, line in enumerate(map(str.strip, lines), 1):
        if line in LEAVING:
            return
        try:
            _take(session, line, screen)
        except UserError as fault:
            raise RunFailedError(f"line {number}: {fault}") from fault


def talk(session: Session, screen: Screen) -> None:
    """Read, answer, obey commands, until /quit or the end of input."""
    _line_editing()
    screen.note(f"{session.base.recipe.model} · {_shown(session.weights)} · /help for commands, Ctrl-D to leave")
    while True:
        try:
            line = input("› ").strip()
        except EOFError:
            screen.note("")
            return
        except KeyboardInterrupt:
            screen.note("(Ctrl-D or /quit to leave)")
            continue
        if line in LEAVING:
            return
        try:
            _take(session, line, screen)
        except UserError as fault:
            screen.say(str(fault))
        except KeyboardInterrupt:
            screen.say("(stopped)")


def _take(session: Session, line: str, screen: Screen) -> None:
    """Obey a command, or answer a message."""
    if line.startswith("/"):
        command, _, argument = line[1:].partition(" ")
        _obey(session, command, argument.strip(), screen)
    elif line:
        session.retries = 0
        _speak(session, [*session.turns, Message("user", line)], screen)


def _obey(session: Session, command: str, argument: str, screen: Screen) -> None:
    commands: dict[str, Callable[[], None]] = {
        "w": lambda: _turn(session, argument, screen),
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


def _speak(session: Session, turns: list[Message], screen: Screen) -> None:
    """Stream an answer to these turns; Ctrl-C keeps what was said so far, an error leaves all as it was."""
    before, session.turns = session.turns, turns
    said: list[str] = []
    stopped = False
    try:
        with screen.streaming() as show:
            try:
                for piece in session.answer(_sampling(session)):
                    said.append(piece)
                    show(piece)
            except KeyboardInterrupt:
                stopped = True
                show(" …")
                session.memory.forget()
    except UserError:
        session.turns = before
        raise
    session.turns = [*turns, Message("assistant", "".join(said))]
    if stopped:
        raise KeyboardInterrupt


def _sampling(session: Session) -> Sampling:
    """Return the session's sampling; a question that is asked again has another seed each time."""
    chosen = session.sampling
    return chosen if chosen.seed is None else replace(chosen, seed=chosen.seed + session.retries)


def _turn(session: Session, argument: str, screen: Screen) -> None:
    for doubt in session.turn(parse_weights(argument)) if argument else ():
        screen.warn(doubt)
    screen.say(_shown(session.weights))


def _want(session: Session, argument: str, screen: Screen) -> None:
    conditioned = session.conditioned
    if conditioned is None:
        raise UserError("nothing here can be asked for a direction; start with chat --want")
    if argument:
        conditioned = Conditioned.parse(conditioned.name, conditioned.run, argument, screen)
        session.conditioned = conditioned
    screen.say(str(conditioned.want))


def _compare(session: Session, argument: str, screen: Screen) -> None:
    """The last question answered at each set of weights, from the same seed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    settings = [part.strip() for part in argument.split("|") if part.strip()]
    if len(settings) < 2:
        raise UserError("/compare takes two or more sets of weights: /compare helpful=1 | harmless=1")
    asked = [i for i, turn in enumerate(session.turns) if turn.role == "user"]
    if not asked:
        raise UserError("/compare answers your last question again: ask one first")
    before, turns = session.weights, session.turns
    table = Table(expand=True)
    answers = []
    try:
        session.turns = turns[: asked[-1] + 1]
        for setting in settings:
            weights = parse_weights(setting)
            for doubt in session.turn(session.nothing_but(weights)):
                screen.warn(doubt)
            text = "".join(session.answer(replace(session.sampling, seed=session.sampling.seed or 0)))
            answers.append(Text(inert(f"{text}\n({count(session.tokens, 'token')})")))
            table.add_column(Text(inert(setting)), ratio=1)
    finally:
        session.turns = turns
        session.turn(session.nothing_but(before))
    table.add_row(*answers)
    Console().print(table)


def _retry(session: Session, screen: Screen) -> None:
    asked = [i for i, turn in enumerate(session.turns) if turn.role == "user"]
    if not asked:
        raise UserError("nothing to answer again yet")
    session.retries += 1
    _speak(session, session.turns[: asked[-1] + 1], screen)


def _undo(session: Session, screen: Screen) -> None:
    if not session.turns:
        raise UserError("nothing to take back: no question was asked yet")
    while session.turns and session.turns.pop().role != "user":
        pass
    screen.say(f"{count(len(session.turns), 'turn')} left")


def _system(session: Session, argument: str, screen: Screen) -> None:
    session.system = argument
    screen.say("system message set" if argument else "no system message")


def _save(session: Session, argument: str, screen: Screen) -> None:
    if not argument:
        raise UserError("/save takes a file name")
    system = [Message("system", session.system)] if session.system else []
    messages = [{"role": m.role, "content": m.content} for m in [*system, *session.turns]]
    about = {"weights": session.weights, "want": session.want, "base": session.base.identity}
    text = json.dumps({"messages": messages, **about}, indent=2, ensure_ascii=False)
    if argument.endswith(".md"):
        heading = f"{session.base.recipe.model} · {_shown(session.weights)}"
        turns = [f"**{message['role']}**\n\n{message['content'].strip()}" for message in messages]
        text = inert("\n\n".join([f"# {heading}", *turns])) + "\n"
    try:
        Path(argument).expanduser().write_text(text, encoding="utf-8")
    except OSError as fault:
        raise UserError(f"cannot write {argument}: {fault.strerror}") from fault
    screen.say(f"saved {count(len(messages), 'message')} to {argument}")


def _shown(weights: Mapping[str, float]) -> str:
    return " ".join(f"{name}={weight:g}" for name, weight in weights.items()) or "start policy, no weights"


def _line_editing() -> None:
    """Arrow keys and a history that outlives the session, where the platform has readline."""
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
