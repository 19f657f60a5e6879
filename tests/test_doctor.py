"""`doctor`: what it says of this machine is so, and what is wrong is told with its remedy."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lora_align import doctor, runs
from support import Cli


def test_what_it_finds_here(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json")
    told = {of["what"]: of for of in json.loads(done.out)["findings"]}
    assert told["torch"]["found"] == version("torch")
    assert told["4-bit"]["state"] == "good"
    assert told["hub"]["found"] == "HF_HUB_OFFLINE is set"
    assert told["runs"]["found"].startswith(str(tmp_path / "runs"))
    assert (done.code == 0) == all(of["state"] != "bad" for of in told.values())
    shown = cli("doctor").out
    assert all(of["found"] in shown and of["remedy"] in shown for of in told.values())


def test_what_is_wrong_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card")
    monkeypatch.setattr(doctor, "NVIDIA", tmp_path)  # a driver leaves a file there
    monkeypatch.setitem(doctor.FLOORS, "peft", "99.0")
    monkeypatch.setitem(doctor.FLOORS, "no-such-library", "1.0")
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1e18)
    found = {of.what: of for of in doctor.run(runs.DEFAULT)}
    assert "torch sees no card" in found["device"].found
    assert found["peft"].remedy == "99.0 or newer: pip install -U peft"
    assert found["no-such-library"].state == "bad"
    assert found["cache"].state == "warning"
    assert "an 8B base takes" in found["cache"].remedy
    assert not doctor.facts(list(found.values()))["good"]
