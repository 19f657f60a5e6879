"""Run the notebook of the docs, cell by cell."""

import json
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tour.ipynb"


def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, object] = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
    assert names["mix"] + 0.5 * names["harmless"] == names["helpful"]  # type: ignore[operator]
    assert len(names["answers"][0]) == 3  # type: ignore[index]
    assert (tmp_path / "mix" / "adapter_config.json").is_file()
    assert "helpful=1,harmless=-0.5: rank " in capsys.readouterr().out
