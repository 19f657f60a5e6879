"""Check the README, the docs and the benchmarks' pages: commands, options, recipe keys, links and length."""

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from lora_align import recipe
from lora_align.cli.app import app
from lora_align.recipe import reading

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
READ_BY_USERS = [README, GUIDE, *DOCS]
PAGES = [*READ_BY_USERS, ROOT / "tests/benchmarks/README.md", ROOT / "tests/benchmarks/evidence/README.md"]
GENERATED = ("architecture.md", "cli.md", "recipes.md")  # as long as what they list
PREFERENCES = ("good", "brief", "helpful", "harmless", "warm")  # which examples of recipes rely on
MOST_WORDS = {README: 1500}  # of others 1600
SHORT = [README, *(page for page in DOCS if page.name not in GENERATED)]
FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:\$ )?(?:.* && )?(?:\.venv/bin/)?lora-align (.+)$|^.* -m lora_align (.+)$")
ROOT_OPTIONS = ("--debug", "--help", "--version")
program: Any = typer.main.get_command(app)


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Yield the language and the text of each fenced block."""
    for indent, language, text in FENCED.findall(page.read_text()):
        yield language, re.sub(rf"^{indent}", "", text, flags=re.MULTILINE)


def _outside_blocks(page: Path) -> str:
    return FENCED.sub("", page.read_text())


def _spans(page: Path) -> list[str]:
    """Return inline code; a bar in a table is escaped."""
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", _outside_blocks(page))]


def _typed(pages: list[Path]) -> list[str]:
    """Return what follows `lora-align` in every command of a block, and inline if it has more than a name."""
    lines = {line for page in pages for _, text in _blocks(page) for line in text.splitlines()}
    lines |= {span for page in pages for span in _spans(page) if span.startswith("lora-align ") and span.count(" ") > 1}
    matches = filter(None, map(COMMAND.match, lines))
    return sorted(words for match in matches for words in match.groups() if words)


def _names(pages: list[Path]) -> list[str]:
    """Return commands that are named inline without options."""
    spans = {span for page in pages for span in _spans(page)}
    return sorted(span.removeprefix("lora-align ") for span in spans if re.fullmatch(r"lora-align [^ ]+", span))


def _anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ (.+)$", _outside_blocks(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _options() -> set[str]:
    """Return every option of the program and its commands."""
    commands = (program, *program.commands.values())
    options = {name for command in commands for of in command.params for name in (*of.opts, *of.secondary_opts)}
    return {*options, "-h", "--help"}


@pytest.mark.parametrize("line", _typed(READ_BY_USERS))
def test_a_command_takes_what_the_docs_give_it(line: str) -> None:
    """Parse, do not run: unknown names, options and recipe keys are refused."""
    words = shlex.split(line, comments=True)
    while words and words[0] in ROOT_OPTIONS:
        words.pop(0)
    if not words:
        return
    name, *words = words
    command = program.commands[name]
    parameters = command.make_context(name, words).params
    known = recipe.builtin()
    if parameters.get("recipe") and Path(parameters["recipe"]).suffix != ".toml" and parameters["recipe"] != "NAME":
        assert parameters["recipe"] in known
    recipe.load(known["demo"], parameters.get("overrides") or [])


@pytest.mark.parametrize("name", _names(READ_BY_USERS))
def test_a_named_command_exists(name: str) -> None:
    assert name in (*program.commands, *ROOT_OPTIONS)


@pytest.mark.parametrize("page", READ_BY_USERS, ids=lambda page: page.name)
def test_options_and_recipe_keys_exist(page: Path) -> None:
    """Check inline code that begins with an option, or is a key of a recipe."""
    options = _options()
    for span in _spans(page):
        if span.startswith("-"):
            unknown = {word for word in span.split() if re.fullmatch(r"--?[a-z][a-z-]*", word)} - options
            assert not unknown, span
        for table, key in re.findall(r"^(?:--set )?(base|lora|sft|dpo|reward|rsf|eval)\.(\w+)\b", span):
            assert key in reading.TABLES[table], span


@pytest.mark.parametrize("page", READ_BY_USERS, ids=lambda page: page.name)
def test_recipe_examples_are_valid(page: Path) -> None:
    """Read every block that begins with a table of a recipe, on top of the preferences that examples rely on."""
    for language, text in _blocks(page):
        if language in ("", "toml") and re.match(r"\[[a-z]", text):
            table = tomllib.loads(text)
            added = {name: {"data": "pairs.jsonl"} for name in PREFERENCES}
            merged = {"base": {"model": "demo"}, **table, "preferences": {**added, **table.get("preferences", {})}}
            if "rsf" in merged:
                merged["rsf"].setdefault("data", "prompts.jsonl")
            recipe.from_dict(merged, page.name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Follow links to files that are there, and to headings that they have."""
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert targets or page.name == "glossary.md"
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(path / "README.md" if path.is_dir() else path), target


def test_the_readme_links_every_page_of_the_docs() -> None:
    linked = set(re.findall(r"\]\(docs/([^)#\s]+)", README.read_text()))
    assert {page.name for page in DOCS} <= linked


def test_the_readme_has_the_two_set_up_lines_of_ci() -> None:
    lines = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv .venv && ")]
    assert [line.rpartition("&& ")[2] for line in lines] == [".venv/bin/lora-align demo", ".venv/bin/pytest"]


@pytest.mark.parametrize("page", SHORT, ids=lambda page: page.name)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text().split()) <= MOST_WORDS.get(page, 1600)


def test_readme_says_how_large_the_package_is() -> None:
    lines = sum(len(file.read_text().splitlines()) for file in (ROOT / "lora_align").rglob("*.py"))
    assert f"about {round(lines, -3):,} lines of Python" in README.read_text()


def test_card_table_has_the_figures_of_the_recorded_plans() -> None:
    """Rows: recipe, pairs and tokens, card, GB, whether it fits, hours."""
    [table] = re.findall(r"\| recipe \| pairs per.*?\n\n", README.read_text(), re.DOTALL)
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    plans = json.loads((ROOT / "tests/benchmarks/results/plans.json").read_text())["figures"]
    [recorded] = plans.values()
    figures = {(row["recipe"], row["card"].replace("-", " ").upper(), row["cards"]): row for row in recorded}
    for name, pairs, card, gigabytes, fits, hours in rows:
        number = 2 if card.startswith("2 ×") else 1
        plan = figures[name, card.removeprefix("2 × ").partition(",")[0].upper(), number]
        assert (float(gigabytes.split()[0]), fits.startswith("yes"), float(hours)) == (
            plan["GB"],
            plan["fits"],
            plan["hours"],
        ), name
        dpo = recipe.load(recipe.builtin()[name]).dpo
        assert pairs == f"{dpo.limit:,}, {dpo.max_length}"
    assert len(rows) >= 7
