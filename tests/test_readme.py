"""What the READMEs promise to lead to: commands that exist, with their options, and links that go somewhere."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from lora_align.cli.app import app

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "tests/benchmarks/README.md", ROOT / "tests/benchmarks/evidence/README.md"]


def _typed() -> Iterator[str]:
    """Lines that a reader would type."""
    for line in PAGES[0].read_text().splitlines():
        before, command, words = line.lstrip("$ ").partition("lora-align ")
        if command and not before.strip():
            yield words
        elif "-m lora_align " in line:
            yield line.partition("-m lora_align ")[2]


def _anchors(page: Path) -> set[str]:
    """As GitHub names headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("line", sorted(set(_typed())))
def test_a_command_takes_what_the_readme_gives_it(line: str) -> None:
    """Parsed, not run: a name or an option that does not exist is refused."""
    name, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    command.make_context(name, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """To files that are there, and to headings that they have."""
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert targets
    for target in targets:
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        if anchor:
            assert anchor in _anchors(found / "README.md" if found.is_dir() else found), target
