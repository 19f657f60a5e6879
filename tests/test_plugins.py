"""Run the example of docs/architecture.md: a data source in another package, found by its entry point."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ARCHITECTURE = Path(__file__).parent.parent / "docs" / "architecture.md"
BLOCK = re.compile(r"^```(python|toml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """Install the example's package in a folder beside a recipe that uses it."""
    (_, module), (_, registered), (_, preference) = BLOCK.findall(ARCHITECTURE.read_text())
    [group] = re.findall(r'^\[project\.entry-points\."(.+)"\]$', registered, re.MULTILINE)
    [(name, target)] = re.findall(r'^(\w+) = "(.+)"$', registered, re.MULTILINE)
    site = tmp_path / "site"
    about = site / "lora_align_sums-1.0.dist-info"
    about.mkdir(parents=True)
    (site / f"{target.partition(':')[0]}.py").write_text(module)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: lora-align-sums\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(f"[{group}]\n{name} = {target}\n")
    (tmp_path / "lora-align.toml").write_text(f'[base]\nmodel = "demo"\n\n{preference}')
    return tmp_path


def _data(workspace: Path, site: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "lora_align", "data", "--pref", "exact", "--show", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))}
    return subprocess.run(words, cwd=workspace, env=environment, capture_output=True, text=True, timeout=120)


def test_source_of_another_package_is_read_by_data(workspace: Path) -> None:
    done = _data(workspace, str(workspace / "site"))
    assert done.returncode == 0, done.stderr
    assert "sums:200 by label: 200 rows, 200 pairs of 200 prompts" in done.stdout
    assert "What is 0 plus 0?" in done.stdout


def test_source_that_is_not_installed_is_refused(workspace: Path) -> None:
    done = _data(workspace, str(workspace))
    assert done.returncode == 2
    assert "data 'sums:200' is neither" in done.stderr
