"""The report of a sweep: one HTML page with its plots inside, without scripts or network access."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment

from lora_align.errors import inert
from lora_align.evaluate.sweep_result import SweepPolicy, SweepResult
from lora_align.metrics.intervals import Estimate

MAX_PROMPTS, MAX_POLICIES = 3, 9  # prompts and policies in the section of answers
PLOTS = {
    "curves.png": "Scores against each weight. The other weights are 0, or as stated. Shaded: 95 % intervals.",
    "map.png": "Scores against two weights.",
    "front.png": "Every policy by two scores. The dashed line joins the policies that no other policy beats.",
    "length.png": "Wins against the start policy, by the length of answers relative to the start policy's.",
    "asked.png": "Scores against the requested direction.",
    "equal_kl.png": "Scores against the KL from the start policy, for the swept preference and its rivals.",
    "cost.png": "Cost: text loss, facts known, and KL from the start policy (star).",
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
<p class="small">{{ count }} on {{ base }}. In brackets: 95 % bootstrap intervals.</p>
{% for plot in plots %}<figure><img alt="{{ plot.caption }}" src="data:image/png;base64,{{ plot.data }}">
<figcaption>{{ plot.caption }}</figcaption></figure>
{% endfor %}
<h2>All figures</h2>
{% if scores %}<p class="small">Bold: policies that no other policy beats in {{ scores }}.</p>
{% endif %}{% if hypervolume %}<p class="small">{{ hypervolume }}</p>
{% endif %}<div class="wide"><table><tr><th></th>{% for name in names %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}<tr{% if row.best %} class="best"{% endif %}><td>{{ row.name }}</td>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table></div>
<h2>Answers</h2>
{% for prompt in prompts %}<p><b>{{ prompt.text }}</b></p>
<div class="answers">{% for answer in prompt.answers %}<div><span class="small">{{ answer.policy }}</span><br>
{{ answer.text }}</div>{% endfor %}</div>
{% endfor %}</html>
"""


def write_report(folder: Path, title: str, base: str, result: SweepResult, policies: Sequence[SweepPolicy]) -> None:
    """Write `report.html` with the plots in the folder, all figures, and some answers."""
    names = list(dict.fromkeys(name for one in policies for name in one.figures))
    start, *others = policies
    shown = [start, *(one for one in others if one.name in result.front or one.weights is None)][:MAX_POLICIES]
    html = (
        Environment(autoescape=True)
        .from_string(TEMPLATE)
        .render(
            title=title,
            base=base,
            count="1 policy" if len(policies) == 1 else f"{len(policies):,} policies",
            scores=" and ".join(map(str, result.scores.values())),
            hypervolume=result.hypervolume_text(),
            plots=[
                {"caption": caption, "data": base64.b64encode((folder / name).read_bytes()).decode()}
                for name, caption in PLOTS.items()
                if (folder / name).exists()
            ],
            names=names,
            rows=[
                {
                    "name": one.name,
                    "best": one.name in result.front,
                    "cells": [_cell(one.figures.get(n)) for n in names],
                }
                for one in policies
            ],
            prompts=_prompts(shown),
        )
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _prompts(policies: Sequence[SweepPolicy]) -> list[Mapping[str, object]]:
    """Return a few prompts, equally many of each kind, with one answer of every policy."""
    prompts = dict.fromkeys((row["kind"], row["asked"]) for one in policies for row in one.measurement.answers)
    of_kind: dict[str, list[str]] = {}
    for kind, text in prompts:
        of_kind.setdefault(kind, []).append(text)
    few = [text for texts in of_kind.values() for text in texts[: -(-MAX_PROMPTS // len(of_kind))]]
    answers = {
        (one.name, row["asked"]): row["answer"]
        for one in policies
        for row in reversed(one.measurement.answers)  # the first answer to a prompt remains
    }
    return [
        {"text": inert(text), "answers": [{"policy": p.name, "text": inert(answers[p.name, text])} for p in policies]}
        for text in few
    ]


def _cell(figure: Estimate | None) -> str:
    return f"{figure.value:.2f} ({figure.low:.2f}–{figure.high:.2f})" if figure else ""
