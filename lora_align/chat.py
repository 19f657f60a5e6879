"""Talk to a mix, and turn its weights while it talks."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transformers import PreTrainedModel

from lora_align import runs
from lora_align.adapters import vectors
from lora_align.adapters.vectors import Vector
from lora_align.console import Screen, inert
from lora_align.data.rows import Message
from lora_align.errors import UserError
from lora_align.model.base import Base
from lora_align.model.generate import Memory, Sampling, stream, text_pieces
from lora_align.model.mixer import Mixer
from lora_align.preference import parse_weights
from lora_align.recipe import Recipe
from lora_align.runs import Run
from lora_align.stages import start as start_policy

HELP = """\
/w helpful=0.3          turn a weight, at once; names that are not given keep theirs
/w                      show the weights
/compare a=1 | a=-1     answer the last question at several weights side by side
/retry   /undo          answer again; take the last exchange back
/system TEXT            set the system message, or with no text remove it
/save FILE              write the conversation as JSON
/help    /quit"""


@dataclass(frozen=True)
class Blend:
    """What to load over the start policy, and at which weights."""

    found: Mapping[str, Vector]
    weights: Mapping[str, float]
    contains_start: bool = False

    def doubts(self) -> list[str]:
        """Why it may not do what its names say."""
        return [doubt for vector in self.found.values() for doubt in vector.doubts()]


def choose(
    runs_dir: Path,
    recipe: Recipe,
    screen: Screen,
    weights: Mapping[str, float] | None = None,
    adapter: Path | None = None,
) -> Blend:
    """The vectors behind `--weights`, the adapter behind `--adapter`, or the newest mix taken apart again."""
    if weights is not None:
        return Blend({name: vectors.find(name, runs_dir, recipe.preferences) for name in weights}, weights)
    if adapter is not None:
        inside = runs_dir / adapter
        return _whole(vectors.at(inside if runs.is_run(inside) else adapter.expanduser(), adapter.name))
    mixes = [run for run in runs.every(runs_dir, screen) if run.manifest.stage == "mix"]
    if not mixes:
        screen.note(f"no mix in {runs_dir}/ yet: this is the start policy; `lora-align merge --weights …` makes one")
        return Blend({}, {})
    screen.note(f"mix: {mixes[-1].path}")
    return _taken_apart(mixes[-1], runs_dir, screen)


def _whole(vector: Vector) -> Blend:
    """One adapter at weight 1, which may hold the start adapter too."""
    contains_start = any(run.manifest.contains_start for run in vector.known_runs())
    return Blend({vector.name: vector}, {vector.name: 1.0}, contains_start)


def _taken_apart(mix: Run, runs_dir: Path, screen: Screen) -> Blend:
    """The mix as its vectors, so that each weight can be turned; whole where it was compressed or they are gone."""
    whole = _whole(vectors.at(mix.path, mix.path.name))
    if mix.manifest.metrics["left_out"]:
        screen.note("it was compressed: /w turns it as a whole")
        return whole
    try:
        found = {parent["name"]: vectors.find(parent["name"], runs_dir) for parent in mix.manifest.parents}
        same = all([p.lineage() for p in found[m["name"]].parents] == m["adapters"] for m in mix.manifest.parents)
    except UserError:
        same = False
    if not same:
        screen.note("the adapters it was made from are gone or were trained anew: /w turns it as a whole")
        return whole
    return Blend(found, {parent["name"]: parent["weight"] for parent in mix.manifest.parents})


@dataclass
class Session:
    """A conversation with one loaded model."""

    base: Base
    model: PreTrainedModel
    runs_dir: Path
    recipe: Recipe
    sampling: Sampling
    start: str = ""
    mixer: Mixer | None = None
    turns: list[Message] = field(default_factory=list)
    system: str = ""
    memory: Memory = field(default_factory=Memory)
    tokens: int = 0

    @property
    def weights(self) -> dict[str, float]:
        """The weights in force."""
        return dict(self.mixer.weights) if self.mixer else {}

    def turn(self, weights: Mapping[str, float]) -> list[str]:
        """Change weights from the next answer on; a vector not loaded yet joins the others. Returns doubts about it."""
        loaded = self.mixer.updates if self.mixer else {}
        new = {
            name: vectors.find(name, self.runs_dir, self.recipe.preferences) for name in weights if name not in loaded
        }
        merged = {**self.weights, **weights}
        if new:
            vectors.refuse_start_inside(new.values())
            check_stands_on(self.base, self.start, new.values())
            updates = {**loaded, **{name: vector.load() for name, vector in new.items()}}
            mixer = Mixer(self.model, updates, merged)
            if self.mixer:
                self.mixer.remove()
            self.mixer = mixer
        elif self.mixer:
            self.mixer.set(merged)
        self.memory.forget()
        return [doubt for vector in new.values() for doubt in vector.doubts()]

    def answer(self, sampling: Sampling | None = None) -> Iterator[str]:
        """The assistant's next words, piece by piece; `tokens` counts them."""
        system = [Message("system", self.system)] if self.system else []
        prompt = self.base.chat.prompt_ids([*system, *self.turns])
        room = self.base.max_length - len(prompt)
        if room < 1:
            raise UserError(f"the conversation fills the base's {self.base.max_length} tokens; /undo, or start anew")
        sampling = sampling or self.sampling
        sampling = replace(sampling, max_new_tokens=min(room, sampling.max_new_tokens))
        self.tokens = 0
        drawn = stream(self.model, prompt, self.base.chat.stop_ids, sampling, self.memory)
        yield from text_pieces(self.base.chat.tokenizer, self._counted(drawn))

    def _counted(self, drawn: Iterator[int]) -> Iterator[int]:
        for token in drawn:
            self.tokens += 1
            yield token


def open_session(
    base: Base, runs_dir: Path, recipe: Recipe, blend: Blend, sampling: Sampling, screen: Screen
) -> Session:
    """Load the start policy and lay the blend over it."""
    start = None if blend.contains_start else start_policy.adapter(recipe, runs_dir)
    if blend.contains_start:
        _, start_id = vectors.common(blend.found.values())
    else:
        start_id = start_policy.identity(start)
        vectors.refuse_start_inside(blend.found.values())
    check_stands_on(base, start_id, blend.found.values())
    if recipe.sft is not None:
        screen.note("start adapter: " + ("part of the mix" if start is None else f"{start.path}, added"))
    for doubt in [*blend.doubts(), *_differences(base, blend.found.values())]:
        screen.warn(doubt)
    session = Session(base, start_policy.load(base, start), runs_dir, recipe, sampling, start_id)
    if blend.found:
        session.mixer = Mixer(session.model, {n: v.load() for n, v in blend.found.items()}, blend.weights)
    return session


def check_stands_on(base: Base, start: str, found: Iterable[Vector]) -> None:
    """Refuse vectors of another base, or of another start adapter than the one laid under them."""
    theirs, start_id = vectors.common(found)
    if theirs and theirs["fingerprint"] != base.fingerprint:
        raise UserError(
            f"this was made on the base {theirs['model']} ({theirs['fingerprint'][:12]}), "
            f"the recipe names {base.recipe.model} ({base.fingerprint[:12]}); choose its recipe with --recipe"
        )
    if theirs and start != start_id:
        raise UserError("the start adapter in the runs folder is not the one these vectors stand on")


def _differences(base: Base, found: Iterable[Vector]) -> list[str]:
    """What of the base's surroundings is not as it was in training."""
    theirs, _ = vectors.common(found)
    words = {"chat_format": "chat template or tokenizer", "quantization": "quantisation"}
    ours = base.identity
    return [
        f"trained with another {name} than the recipe has now; answers may suffer"
        for key, name in words.items()
        if theirs and theirs.get(key) != ours[key]
    ]


def once(session: Session, prompt: str, screen: Screen) -> None:
    """One answer to one prompt."""
    session.turns.append(Message("user", prompt))
    if screen.as_json:
        text = "".join(session.answer())
        screen.result(text, {"answer": text, "tokens": session.tokens, "weights": session.weights})
        return
    for piece in session.answer():
        sys.stdout.write(inert(piece))
        sys.stdout.flush()
    sys.stdout.write("\n")


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
        if line in ("/quit", "/exit"):
            return
        try:
            if line.startswith("/"):
                command, _, argument = line[1:].partition(" ")
                _obey(session, command, argument.strip(), screen)
            elif line:
                _speak(session, [*session.turns, Message("user", line)])
        except UserError as fault:
            screen.say(str(fault))
        except KeyboardInterrupt:
            screen.say("(stopped)")


def _obey(session: Session, command: str, argument: str, screen: Screen) -> None:
    commands: dict[str, Callable[[], None]] = {
        "w": lambda: _turn(session, argument, screen),
        "compare": lambda: _compare(session, argument, screen),
        "retry": lambda: _retry(session),
        "undo": lambda: _undo(session, screen),
        "system": lambda: _system(session, argument, screen),
        "save": lambda: _save(session, argument, screen),
        "help": lambda: screen.say(HELP),
    }
    if command not in commands:
        raise UserError(f"no command /{command}; /help lists them")
    commands[command]()


def _speak(session: Session, turns: list[Message]) -> None:
    """Stream an answer to these turns; Ctrl-C keeps what was said so far, an error leaves all as it was."""
    before, session.turns = session.turns, turns
    said = []
    try:
        for piece in session.answer():
            said.append(piece)
            sys.stdout.write(inert(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        sys.stdout.write(" …")
        session.memory.forget()
    except UserError:
        session.turns = before
        raise
    sys.stdout.write("\n")
    sys.stdout.flush()
    session.turns = [*turns, Message("assistant", "".join(said))]


def _turn(session: Session, argument: str, screen: Screen) -> None:
    for doubt in session.turn(parse_weights(argument)) if argument else ():
        screen.warn(doubt)
    screen.say(_shown(session.weights))


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
            session.turn({**dict.fromkeys(session.weights, 0.0), **weights})
            text = "".join(session.answer(replace(session.sampling, seed=session.sampling.seed or 0)))
            answers.append(Text(inert(f"{text}\n({session.tokens} tokens)")))
            table.add_column(Text(setting), ratio=1)
    finally:
        session.turns = turns
        session.turn({**dict.fromkeys(session.weights, 0.0), **before})
    table.add_row(*answers)
    Console().print(table)


def _retry(session: Session) -> None:
    asked = [i for i, turn in enumerate(session.turns) if turn.role == "user"]
    if not asked:
        raise UserError("nothing to answer again yet")
    _speak(session, session.turns[: asked[-1] + 1])


def _undo(session: Session, screen: Screen) -> None:
    while session.turns and session.turns.pop().role != "user":
        pass
    screen.say(f"{len(session.turns)} turns left")


def _system(session: Session, argument: str, screen: Screen) -> None:
    session.system = argument
    screen.say("system message set" if argument else "no system message")


def _save(session: Session, argument: str, screen: Screen) -> None:
    if not argument:
        raise UserError("/save takes a file name")
    system = [Message("system", session.system)] if session.system else []
    messages = [{"role": m.role, "content": m.content} for m in [*system, *session.turns]]
    record = {"messages": messages, "weights": session.weights, "base": session.base.identity}
    try:
        Path(argument).expanduser().write_text(json.dumps(record, indent=2, ensure_ascii=False), encoding="utf-8")
    except OSError as fault:
        raise UserError(f"cannot write {argument}: {fault.strerror}") from fault
    screen.say(f"saved {len(messages)} messages to {argument}")


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

    history = runs.cache_folder() / "chat_history"
    history.parent.mkdir(parents=True, exist_ok=True)
    if history.exists():
        readline.read_history_file(history)
    readline.set_history_length(1000)
    atexit.register(readline.write_history_file, history)
