"""Run the examples of docs/architecture.md: rows of other packages, found by their entry points."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lora_align.adapters import peft_format
from lora_align.adapters.delta import Factors, LoraDelta
from lora_align.adapters.peft_config import BaseInfo

MODULE = "model.layers.0.mlp.up_proj"
ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
EXAMPLE = re.compile(
    r"^```python\n# (?P<file>\w+\.py)\n(?P<module>.*?)^```$.*?"
    r'^\[project\.entry-points\."lora_align\.(?P<group>\w+)"\]\n(?P<name>\w+) = "(?P<target>[\w:]+)"\n```$'
    r"(?P<preference>.*?)(?=^##)",
    re.MULTILINE | re.DOTALL,
)
EXAMPLES = {match["group"]: match for match in EXAMPLE.finditer(ARCHITECTURE.read_text())}
PAIRS = [{"prompt": f"Hi {i}?", "chosen": "Fine.", "rejected": "Why? Who asks?"} for i in range(40)]
VOTES = [{"question": f"Hi {i}?", "winner": f"Good {i}.", "loser": "Bad."} for i in range(40)]


def install(site: Path, group: str, entry_point: str, file: str, module: str) -> None:
    """Lay a module and its entry point into a folder, as pip would."""
    about = site / f"{file.removesuffix('.py')}-1.0.dist-info"
    about.mkdir(parents=True)
    (site / file).write_text(module)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {file.removesuffix('.py')}\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[lora_align.{group}]\n{entry_point}\n")


def example(group: str, folder: Path) -> Path:
    """Install an example, and write the recipe that uses it; return where packages lie."""
    match = EXAMPLES[group]
    install(folder / "site", group, f"{match['name']} = {match['target']}", match["file"], match["module"])
    tables = "".join(re.findall(r"^```toml\n# lora-align\.toml\n(.*?)^```$", match["preference"], re.M | re.S))
    (folder / "lora-align.toml").write_text(f'[base]\nmodel = "demo"\n\n{tables}')
    for name, rows in (("pairs.jsonl", PAIRS), ("votes.jsonl", VOTES)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "site"


def run(folder: Path, site: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(site) if site else "", os.environ.get("PYTHONPATH", "")]))
    return subprocess.run(
        [sys.executable, "-m", "lora_align", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def adapter(tmp_path: Path) -> float:
    """Write an adapter to the folder `one`; return the norm of its update."""
    update = LoraDelta.of({MODULE: Factors(torch.ones(4, 2), torch.ones(2, 3))})
    (tmp_path / "one").mkdir()
    peft_format.save(tmp_path / "one", update.items(), [MODULE], BaseInfo("base"), torch.float32)
    return update.norm()


DATA = ("data", "--show", "1", "--pref")
FEW = [
    word
    for setting in ('prompts="pairs.jsonl"', "count=2", "samples=1", "max_new_tokens=4")
    for word in ("--set", f"eval.{setting}")
]
USES = {  # group → the words of a command, what it prints, and what it says without the package
    "sources": ((*DATA, "sums"), "sums:200 by label: 200 rows, 200 pairs", "data 'sums:200' is neither"),
    "rankers": ((*DATA, "asking"), "pairs.jsonl by questions: 40 rows, 40 pairs", "no ranker 'questions'; use one of"),
    "forms": ((*DATA, "voted"), "votes.jsonl by label: 40 rows, 40 pairs", "no pair of answers in columns question, w"),
    "merge_methods": (
        ("merge", "-w", "./one=1", "--method", "sharpen", "--option", "gain=2", "--out", "mix"),
        "mix  rank 2",
        "no method 'sharpen' (known: exact, svd, soup, tsv, ties, dare)",
    ),
    "judges": (("eval", "start", *FEW), "shouting: capitals", ""),  # without the package, there is just no such row
}


def test_every_example_has_a_use() -> None:
    assert EXAMPLES.keys() == USES.keys()


@pytest.mark.parametrize("group", USES)
def test_row_of_another_package_is_used_by_the_command(group: str, tmp_path: Path, adapter: float) -> None:
    words, printed, _ = USES[group]
    done = run(tmp_path, example(group, tmp_path), *words)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    shown = {"sources": "What is 0 plus 0?", "rankers": "⟦Why? Who asks?", "forms": "⟦Good 0."}
    assert shown.get(group, "") in done.stdout
    if group == "merge_methods":
        assert peft_format.load(tmp_path / "mix").norm() == pytest.approx(2 * adapter)


@pytest.mark.parametrize("group", [group for group in USES if group != "judges"])
def test_row_that_is_not_installed_is_refused(group: str, tmp_path: Path, adapter: float) -> None:
    words, _, refused = USES[group]
    example(group, tmp_path)
    done = run(tmp_path, None, *words)
    assert done.returncode == 2
    assert refused in done.stderr


def test_messages_list_registered_names_without_importing_their_packages(tmp_path: Path) -> None:
    install(tmp_path / "a", "merge_methods", "average = other:method", "other.py", "raise SystemExit('imported')")
    done = run(tmp_path, tmp_path / "a", "merge", "-w", "a=1", "--method", "averag")
    assert done.returncode == 2
    assert (
        "no method 'averag', did you mean 'average'? (known: exact, svd, soup, tsv, ties, dare, average)" in done.stderr
    )


@pytest.mark.parametrize(
    ("module", "why"),
    [("import nothing_of_the_kind", "No module named 'nothing_of_the_kind'"), ("method = 3", "not a Method")],
)
def test_entry_point_that_cannot_be_used_is_refused(module: str, why: str, tmp_path: Path) -> None:
    install(tmp_path / "a", "merge_methods", "average = other:method", "other.py", module)
    done = run(tmp_path, tmp_path / "a", "merge", "-w", "a=1", "--method", "average")
    assert done.returncode == 2
    assert f"entry point average = other:method of lora_align.merge_methods: {why}; update or uninstall other" in (
        done.stderr
    )


def test_help_and_import_read_no_entry_points(tmp_path: Path) -> None:
    program = (
        "import sys, lora_align.plugins as plugins\n"
        "plugins.entry_points = lambda **_: sys.exit(77)\n"
        "import lora_align\n"
        "from lora_align.cli import main\n"
        "sys.argv = ['lora-align', '--help']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0


def test_code_of_other_packages_is_known_to_the_cache_of_rows(tmp_path: Path) -> None:
    site = example("rankers", tmp_path)
    program = "from lora_align.rankers import RANKERS; print(RANKERS.code())"
    outputs = []
    for more in ("", "\n# changed"):
        with (site / "lora_align_questions.py").open("a") as stream:
            stream.write(more)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60
        )
        outputs.append(done.stdout)
    assert outputs[0].startswith("[['questions', 'lora_align_questions:questions', '1.0', ")
    assert outputs[0] != outputs[1]
