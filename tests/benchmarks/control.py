"""What turning a weight does: the demo's two vectors from -1 to 1 and their mix, scored by the world's own oracle."""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from matplotlib.figure import Figure
from report import RESULTS, save
from transformers import PreTrainedModel

from lora_align import recipe
from lora_align.adapters.vectors import find
from lora_align.console import Screen
from lora_align.data.rows import Message
from lora_align.demo import world
from lora_align.model import base as bases
from lora_align.model.base import Base
from lora_align.model.mixer import Mixer
from lora_align.preference import Direction
from lora_align.stages import dpo

STEPS = [i / 4 for i in range(-4, 5)]
MIXES = [{"helpful": 1.0, "harmless": 0.5}, {"helpful": 1.0, "harmless": 1.0}, {"helpful": 0.5, "harmless": -0.5}]
PROMPTS, SAMPLES, SEED = 100, 2, 99


@torch.no_grad()
def answers(model: PreTrainedModel, base: Base, prompts: list[world.Prompt]) -> list[str]:
    """One sample a prompt at temperature 1."""
    rows = [base.chat.prompt_ids([Message("user", prompt.text)]) for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    drawn = model.generate(ids, attention_mask=seen, max_new_tokens=64, do_sample=True, temperature=1.0, top_k=0)
    return base.chat.tokenizer.batch_decode(drawn[:, width:], skip_special_tokens=True)


def measure(model: PreTrainedModel, base: Base) -> dict[str, float]:
    """Helpfulness and refusals on safe prompts, harmlessness on risky ones, form on both."""
    torch.manual_seed(0)
    figures, formed = {}, []
    for risky in (False, True):
        source = world.prompts(SEED, risky=risky)
        asked = [next(source) for _ in range(PROMPTS)] * SAMPLES
        scores = [world.score(p, text) for p, text in zip(asked, answers(model, base, asked), strict=True)]
        formed += [s.well_formed for s in scores]
        if risky:
            figures["harmless"] = sum(s.harmlessness for s in scores) / len(scores)
        else:
            figures["helpful"] = sum(s.helpfulness for s in scores) / len(scores)
            figures["safe prompts refused"] = sum(s.refused for s in scores) / len(scores)
            figures["words"] = sum(s.words for s in scores) / len(scores)
    figures["well-formed"] = sum(formed) / len(formed)
    return {name: round(value, 3) for name, value in figures.items()}


def draw(curves: dict[str, list[dict[str, Any]]]) -> None:
    """Each preference's own score against its weight."""
    picture = Figure(figsize=(7.2, 2.9), layout="constrained")
    for axis, (name, colour) in zip(
        picture.subplots(1, 2), (("helpful", "#1f4e9c"), ("harmless", "#2a7f4f")), strict=True
    ):
        other = "harmless" if name == "helpful" else "helpful"
        for score, style in (
            (name, {"color": colour, "linewidth": 2.4}),
            (other, {"color": "#b5b5b5", "linewidth": 1.4}),
        ):
            axis.plot(STEPS, [point[score] for point in curves[name]], marker="o", markersize=3.5, label=score, **style)
        axis.set(ylim=(0, 1), xlabel=f"weight of {name}", ylabel="score (0 to 1)")
        axis.axvline(0, color="#dddddd", linewidth=1, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    picture.savefig(RESULTS / "control.png", dpi=130)


def main() -> None:
    """Train the demo's two preferences as the demo does, then turn their weights."""
    project = recipe.load(recipe.builtin()["demo"])
    with tempfile.TemporaryDirectory() as folder:
        for preference in ("helpful", "harmless"):
            dpo.run(project, [preference], list(Direction), Path(folder), Screen())
        vectors = {name: find(name, Path(folder)).load() for name in ("helpful", "harmless")}
    base = bases.find(project.base)
    model = base.load()
    mixer = Mixer(model, vectors, {})
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in vectors:
        for step in STEPS:
            mixer.set({name: step})
            curves.setdefault(name, []).append({"weight": step, **measure(model, base)})
    mixes = []
    for mix in MIXES:
        mixer.set(mix)
        mixes.append({**mix, "measured": measure(model, base)})
    save(
        "control",
        {"curves": curves, "mixes": mixes, "cos(helpful, harmless)": vectors["helpful"].cosine(vectors["harmless"])},
    )
    draw(curves)


if __name__ == "__main__":
    main()
