"""`lora-align demo`: the main commands one after the other on the built-in base, and what they say."""

import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_align import recipe, runs
from lora_align.adapters import vectors
from lora_align.chat.session import Blend, open_session
from lora_align.console import Screen, inert
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model.generate import Sampling
from lora_align.preference import Direction
from lora_align.stages import dpo, mix

STAGES = (("helpful", "pos"), ("helpful", "neg"), ("harmless", "both"))
MIX = {"helpful": 1.0, "harmless": 0.5}
SETTINGS: tuple[Mapping[str, float], ...] = (
    {},
    {"helpful": 1},
    {"helpful": -1},
    {"harmless": 1},
    {"harmless": -1},
    MIX,
)
QUESTIONS = ("Can you explain trains?", "How can I open a letter that is not mine?")


def tell(runs_dir: Path, screen: Screen) -> None:
    """Train what is missing, mix, and answer two questions at several weights."""
    project = recipe.load(recipe.builtin()["demo"])
    program = "lora-align" if shutil.which("lora-align") else shlex.quote(os.path.relpath(sys.argv[0]))
    where = f"--runs {shlex.quote(str(runs_dir))}"
    for preference, wanted in STAGES:
        screen.note(f"\n$ {program} dpo --pref {preference} --direction {wanted} {where}")
        _train(project, preference, list(Direction) if wanted == "both" else [Direction(wanted)], runs_dir, screen)
    screen.note(f"\n$ {program} merge --weights helpful=1,harmless=0.5 {where}")
    target = runs_dir / "mix" / mix.default_name(MIX)
    mixed = runs.read(target) if runs.is_run(target) else mix.run(MIX, project, runs_dir, screen)
    screen.note(mix.told(mixed))
    screen.note(f"\n$ {program} chat {where}")
    answers = _ask(project, runs_dir, screen)
    next_steps = (
        f"{program} chat {where}",
        f"{program} chat {where} --weights helpful=-1 --prompt 'Tell me about rain.'",
        f"{program} merge {where} --weights helpful=0.5,harmless=-1 --rank 8",
        f"{program} list {where}",
    )
    lines = "".join(f"\n  {line}" for line in next_steps)
    screen.result(f"\nTry next:{lines}", {"mix": str(mixed.path), "answers": answers, "next": next_steps})


def _train(project: recipe.Recipe, preference: str, sides: list[Direction], runs_dir: Path, screen: Screen) -> None:
    folder = runs_dir / "dpo" / preference
    missing = [side for side in sides if not runs.is_run(folder / side.value)]
    if missing:
        dpo.run(project, [preference], missing, runs_dir, screen)
    for side in sides:
        screen.note(dpo.told(runs.read(folder / side.value)) + ("" if side in missing else "  (trained before)"))


def _ask(project: recipe.Recipe, runs_dir: Path, screen: Screen) -> list[dict[str, Any]]:
    """The same questions, from the same seed, at every setting of the weights."""
    answers = []
    blend = Blend({name: vectors.find(name, runs_dir) for name in MIX}, MIX)
    sampling = Sampling(temperature=0.7, max_new_tokens=80, seed=1)
    session = open_session(bases.find(project.base), runs_dir, project, blend, sampling, screen)
    for question in QUESTIONS:
        session.turns = [Message("user", question)]
        if not screen.as_json:
            sys.stdout.write(f"› {question}\n")
        for weights in SETTINGS:
            session.turn({**dict.fromkeys(MIX, 0.0), **weights})
            text = "".join(session.answer())
            shown = ", ".join(f"{name} {weight:+g}" for name, weight in weights.items()) or "no weights"
            answers.append({"question": question, "weights": dict(weights), "answer": text})
            if not screen.as_json:
                sys.stdout.write(f"  {shown:<26}  {inert(text)}\n")
        sys.stdout.flush()
    return answers
