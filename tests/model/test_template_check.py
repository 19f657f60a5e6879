"""Chat templates that do harm are refused before anything is rendered with them."""

import json
import sys
import time
from pathlib import Path

import pytest

from lora_align import store
from lora_align.errors import UserError
from lora_align.model import template_check
from lora_align.model.template_check import check_template

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GOOD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
DOUBLING = "{% set n = namespace(x='x') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
HARMFUL = {
    LOOP: "does not end",
    "{{ 10 ** (10 ** 9) }}": "does not end",
    "{{ 'x' * 10 ** 10 }}": "takes more than 1 GiB of memory",
    DOUBLING: "(takes more than 1 GiB of memory|does not end)",
    "{{ 'x' * 10 ** 8 }}": "renders more than 16 million characters",
    "{{ messages|length // 0 }}": "divides by zero",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "recurses without end",
    "{% if messages|length > 30 %}" + LOOP + "{% endif %}": "does not end",
    "{% if messages|length == 2 %}" + LOOP + "{% endif %}": "does not end",
    "{% if messages|length == 1 %}{{ 1 + '' }}{% endif %}" + LOOP: "does not end",
    "{% if messages[0].role == 'system' %}{{ 1 // 0 }}{% endif %}": "divides by zero",
    "{% generation %}{{ 1 // (messages|length - 1) }}{% endgeneration %}": "divides by zero",
}


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_ALIGN_CACHE", str(tmp_path))


@pytest.mark.parametrize("template", HARMFUL)
def test_harmful_chat_template_is_refused_within_ten_seconds(template: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"^the chat template of base\.model 'x' {HARMFUL[template]} .*chat_template"):
        check_template(template, {}, "the chat template of base.model 'x'")
    assert time.monotonic() - began < 10
    assert not list(store.cache_folder().rglob("*"))


def test_good_chat_template_is_tested_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_template(GOOD, {"eos_token": "</s>"}, "x")
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    check_template(GOOD, {"eos_token": "</s>"}, "x")
    with pytest.raises(OSError, match="nowhere"):
        check_template(GOOD, {"eos_token": "<end>"}, "x")


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no system message') }}", "{{ messages[7].content.x }}", "{% for %}", "{{ 1 + '' }}"],
)
def test_error_raised_by_the_template_passes_the_check(template: str) -> None:
    check_template(template, {}, "x")


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("a warning\\n' + 'ZeroDivisionError", "divides by zero"),
        ("Traceback\\nImportError: no jinja", r"fails \(ImportError: no jinja\)"),
    ],
)
def test_every_failure_of_the_trial_is_a_refusal(
    ending: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = tmp_path / "trial.py"
    trial.write_text(f"import sys\nsys.exit('{ending}')\n")
    monkeypatch.setattr(template_check, "RENDER", trial)
    with pytest.raises(UserError, match=rf"^x {message} "):
        check_template(GOOD, {}, "x")


def test_warnings_of_libraries_are_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "trial.py"
    trial.write_text("import sys\nprint('a warning', file=sys.stderr)\n")
    monkeypatch.setattr(template_check, "RENDER", trial)
    check_template(GOOD, {}, "x")


def test_recipe_variables_reach_the_template() -> None:
    with pytest.raises(UserError, match="divides by zero"):
        check_template("{{ 1 // (size - 3) }}", json.loads('{"size": 3}'), "x")
