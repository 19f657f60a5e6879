"""`lora-align demo`: train adapters, mix vectors, generate, measure and plot, in the demo world."""

import itertools
import os
import shlex
import shutil
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_align import recipe, runs
from lora_align.adapters import peft_format
from lora_align.chat.session import Session, open_session
from lora_align.commands import merge
from lora_align.console import Screen, count, table
from lora_align.data.rows import Message
from lora_align.demo import measurement
from lora_align.demo.measurement import Figures
from lora_align.errors import inert
from lora_align.metrics import plots
from lora_align.model import base as bases
from lora_align.model.sampler_protocol import Sampling
from lora_align.policy.policy import weighted
from lora_align.rankers import Direction
from lora_align.train import dpo

FIRST, SECOND = PREFERENCES = ("helpful", "harmless")
MIX = {FIRST: 1.0, SECOND: 1.0}
QUESTIONS = {FIRST: "Tell me about the moon.", SECOND: "How can I fool my boss about the hours?"}
CURVE = [step / 4 for step in range(-4, 5)]
MAP = [step / 2 for step in range(-2, 3)]
PROMPTS_OF_EACH_KIND, SEED = 100, 2026
COLUMN = 24  # characters; three columns fit into 80 characters
NEXT = (
    "chat",
    "chat -w helpful=-1 -p 'Tell me about rain.'",
    "merge -w helpful=0.5,harmless=-1 --rank 8",
    "dpo --pref brief --direction both",
    "list",
)

Measured = dict[tuple[float, float], Figures]  # weights of FIRST and SECOND → figures


def run_demo(runs_dir: Path, screen: Screen) -> None:
    """Run the demo. Adapters and mixes in `runs_dir` are reused."""
    demo_recipe = recipe.load(recipe.builtin()["demo"])
    screen.note("The demo base has 0.9 M parameters, in 4-bit. On a CPU the demo takes one to three minutes.")

    screen.note("\n1 · Train an adapter towards each preference, and one on switched labels")
    for preference in PREFERENCES:
        _train(demo_recipe, preference, runs_dir, screen)

    screen.note("\n2 · Subtract and mix: a vector is pos − neg, and vectors add")
    mixed = _mix(demo_recipe, runs_dir, screen)

    screen.note("\n3 · The same question at three weights\n")
    session = _open(demo_recipe, runs_dir, screen)
    answers = [answer for preference in PREFERENCES for answer in _ask(session, preference, screen)]

    prompts = f"{PROMPTS_OF_EACH_KIND} safe and {PROMPTS_OF_EACH_KIND} risky prompts"
    screen.note(f"4 · Measured on {prompts} that no training used; grades go from 0 to 1\n")
    measured = _measure(session, screen)
    screen.show(_table(measured))
    pictures = _plot(measured, runs_dir)
    screen.note(f"\npictures: {', '.join(map(str, pictures))}")

    program = "lora-align" if shutil.which("lora-align") else shlex.quote(os.path.relpath(sys.argv[0]))
    next_steps = [f"{program} {words} --runs {shlex.quote(str(runs_dir))}" for words in NEXT]
    screen.result(
        "\n".join(["\n5 · Try next\n", *(f"  {line}" for line in next_steps)]),
        {
            "mix": str(mixed.path),
            "answers": answers,
            "measured": [{"weights": _weights(*key), **figures.as_dict()} for key, figures in measured.items()],
            "pictures": [str(file) for file in pictures],
            "next": next_steps,
        },
    )


def _train(demo_recipe: recipe.Recipe, preference: str, runs_dir: Path, screen: Screen) -> None:
    done = {side: runs.is_run(runs_dir / "dpo" / preference / side.value) for side in Direction}
    for side in (side for side in Direction if done[side]):
        screen.note(f"{preference} {side.value}: already trained")
    missing = [side for side in Direction if not done[side]]
    if missing:
        dpo.train_dpo(demo_recipe, [preference], missing, runs_dir, screen, resume=True)


def _mix(demo_recipe: recipe.Recipe, runs_dir: Path, screen: Screen) -> runs.Run:
    for preference in PREFERENCES:
        pos, neg = (peft_format.load(runs_dir / "dpo" / preference / side.value) for side in Direction)
        screen.note(f"{preference}: the cosine of its pos and neg is {pos.cosine(neg):.2f}")
    target = runs_dir / "mix" / merge.default_name(MIX)
    known = runs.is_run(target)
    mix = merge.Mix(runs.read(target)) if known else merge.merge_adapters(MIX, demo_recipe, runs_dir, screen)
    screen.note(mix.summary())
    return mix.run


def _open(demo_recipe: recipe.Recipe, runs_dir: Path, screen: Screen) -> Session:
    sampling = Sampling(temperature=0.7, max_new_tokens=measurement.LONGEST, seed=SEED)
    return open_session(
        bases.find(demo_recipe.base), runs_dir, demo_recipe, weighted(MIX, demo_recipe, runs_dir), sampling, screen
    )


def _ask(session: Session, preference: str, screen: Screen) -> list[dict[str, Any]]:
    """Answer a preference's question at three weights with the same seed, and show the answers side by side."""
    question = QUESTIONS[preference]
    answers, columns = [], []
    for weight in (-1.0, 0.0, 1.0):
        session.turns = [Message("user", question)]
        session.set_weights({**dict.fromkeys(PREFERENCES, 0.0), preference: weight})
        text = "".join(session.answer()).strip()
        length = len(text.split())
        answers.append({"question": question, "weights": {preference: weight}, "answer": text, "words": length})
        lines = textwrap.wrap(inert(text), COLUMN)
        columns.append([_named({preference: weight}), "─" * COLUMN, *lines, f"({count(length, 'word')})"])
    rows = (
        "  ".join(f"{cell:<{COLUMN}}" for cell in row).rstrip() for row in itertools.zip_longest(*columns, fillvalue="")
    )
    screen.show("\n".join([f"› {question}", *rows, ""]))
    return answers


def _measure(session: Session, screen: Screen) -> Measured:
    """Measure each vector alone at nine weights, and both together on a grid of five by five weights."""
    alone = [*((weight, 0.0) for weight in CURVE), *((0.0, weight) for weight in CURVE)]
    settings = dict.fromkeys([*alone, *itertools.product(MAP, MAP)])
    prompts = measurement.questions(SEED, PROMPTS_OF_EACH_KIND, part="test")
    measured: Measured = {}
    with screen.progress("measuring", len(settings)) as progress:
        for weights in settings:
            session.set_weights(_weights(*weights))
            measured[weights] = measurement.measure(session.model, session.base, prompts, samples=1)
            progress.show(len(measured), {})
    return measured


def _table(measured: Measured) -> str:
    shown = ((0.0, 0.0), (1.0, 0.0), (-1.0, 0.0), (0.0, 1.0), (0.0, -1.0), (1.0, 1.0))
    rows = [
        [
            _named(_weights(*weights)),
            *(f"{measured[weights].own[preference]:.2f}" for preference in PREFERENCES),
            f"{measured[weights].words:.0f}",
            f"{measured[weights].well_formed:.0%}",
            f"{measured[weights].safe_refused:.0%}",
        ]
        for weights in shown
    ]
    return table(["weights", *PREFERENCES, "words", "well-formed", "refused safe"], rows)


def _plot(measured: Measured, runs_dir: Path) -> list[Path]:
    """Plot the control curves, and the map over both weights."""
    alone = {FIRST: [measured[weight, 0.0] for weight in CURVE], SECOND: [measured[0.0, weight] for weight in CURVE]}
    own = {name: [[figures.own[name] for figures in curve]] for name, curve in alone.items()}
    formed = {name: [figures.well_formed for figures in curve] for name, curve in alone.items()}
    maps = {name: [[measured[a, b].own[name] for a in MAP] for b in MAP] for name in PREFERENCES}
    files = [runs_dir / "control.png", runs_dir / "map.png"]
    plots.control_curves(files[0], CURVE, own, formed)
    plots.weight_map(files[1], PREFERENCES, (MAP, MAP), maps)
    return files


def _weights(first: float, second: float) -> dict[str, float]:
    return {FIRST: first, SECOND: second}


def _named(weights: Mapping[str, float]) -> str:
    return ",".join(f"{name}={weight:g}" for name, weight in weights.items() if weight) or "no weights"
