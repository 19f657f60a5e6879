"""A sweep on one page that opens anywhere: pictures inside, no script, no network."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment

from lora_align.console import inert
from lora_align.evaluate.sweep_point import SweepPoint
from lora_align.metrics.intervals import Estimate

SHOWN, ANSWERED = 3, 9  # prompts whose answers are shown, and of how many points
PICTURES = {
    "curves.png": "What each weight does, the others at 0 or as said; the shade is the 95 % interval.",
    "map.png": "Two weights together.",
    "front.png": "Every point by two scores; the dashed line joins those that no other beats.",
    "length.png": "How often a point beats the start policy, against how long its answers are.",
    "asked.png": "What a policy makes of the direction it is asked for.",
    "cost.png": "What it is paid with: loss of ordinary text, facts, distance from the start policy (the star).",
}
TEMPLATE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.4rem } h2 { font-size: 1.1rem; margin-top: 2.2rem }
figure { margin: 1rem 0 } figcaption, .small { color: #5b6472; font-size: .85rem } img { max-width: 100% }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .8rem; white-space: nowrap }
td, th { padding: .15rem .6rem; text-align: right; border-bottom: 1px solid #e6e9ee } th { text-align: right }
td:first-child, th:first-child { text-align: left; position: sticky; left: 0; background: white }
tr.best td:first-child { font-weight: 600; color: #1f4e9c }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(16rem, 1fr)); gap: 1rem }
.answers div { border-left: 3px solid #b9c7e0; padding-left: .7rem }
</style>
<h1>{{ title }}</h1>
<p class="small">{{ points }} points on {{ base }}. In brackets: 95 % intervals over prompts.</p>
{% for picture in pictures %}<figure><img alt="{{ picture.says }}" src="data:image/png;base64,{{ picture.data }}">
<figcaption>{{ picture.says }}</figcaption></figure>
{% endfor %}
<h2>All figures</h2>
<p class="small">Bold: no other point beats it by {{ best }}.</p>
<div class="wide"><table><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row.best %} class="best"{% endif %}><td>{{ row.word }}</td>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Answers</h2>
{% for question in questions %}<p><b>{{ question.asked }}</b></p>
<div class="answers">{% for answer in question.answers %}<div><span class="small">{{ answer.word }}</span><br>
{{ answer.text }}</div>{% endfor %}</div>
{% endfor %}</html>
"""


def write(
    folder: Path, title: str, base: str, result: Mapping[str, Any], covered: str, points: Sequence[SweepPoint]
) -> None:
    """`report.html`, with all that lies in the folder as a picture."""
    names = list(dict.fromkeys(name for point in points for name in point.figures))
    best = {point["word"] for point in result["front"]}
    start, *others = points
    shown = [start, *(point for point in others if point.word in best or point.weights is None)][:ANSWERED]
    text = (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=title,
            base=base,
            points=len(points),
            best="; ".join(filter(None, [" and ".join(result["scores"].values()), covered])),
            pictures=[
                {"says": says, "data": base64.b64encode((folder / name).read_bytes()).decode()}
                for name, says in PICTURES.items()
                if (folder / name).exists()
            ],
            names=names,
            rows=[
                {"word": point.word, "best": point.word in best, "cells": [_cell(point.figures.get(n)) for n in names]}
                for point in points
            ],
            questions=_questions(shown),
        )
    )
    (folder / "report.html").write_text(text, encoding="utf-8")


def _questions(points: Sequence[SweepPoint]) -> list[dict[str, Any]]:
    """The same few prompts, answered by each."""
    asked = list(dict.fromkeys((row["kind"], row["asked"]) for point in points for row in point.measured.answers))
    of_kind: dict[str, list[str]] = {}
    for kind, text in asked:
        of_kind.setdefault(kind, []).append(text)
    few = [text for texts in of_kind.values() for text in texts[: -(-SHOWN // len(of_kind))]]
    answers = {
        (point.word, row["asked"]): row["answer"]
        for point in points
        for row in reversed(point.measured.answers)  # the first of each stays
    }
    return [
        {"asked": inert(text), "answers": [{"word": p.word, "text": inert(answers[p.word, text])} for p in points]}
        for text in few
    ]


def _cell(figure: Estimate | None) -> str:
    return f"{figure.value:.2f} ({figure.low:.2f}–{figure.high:.2f})" if figure else ""
