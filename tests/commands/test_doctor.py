"""`doctor`: what it says of this machine is so, and what is wrong is told with its remedy."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lora_align import runs
from lora_align.commands import doctor
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


VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n"


@pytest.mark.parametrize(
    ("where", "cuda", "says", "remedy"),
    [
        (0, None, "an NVIDIA driver, driver 550.54.14, but torch sees no card", "this torch was built for CPUs"),
        (0, "12.8", "driver 550.54.14", "the driver is older than torch's CUDA"),
        (1, None, "an NVIDIA driver, but torch sees no card", "this torch was built for CPUs"),
    ],
    ids=["a CPU's torch", "an old driver", "WSL"],
)
def test_a_card_that_torch_does_not_see(
    where: int, cuda: str | None, says: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a card that it sees")
    drivers = [tmp_path / "proc", tmp_path / "wsl"]
    drivers[where].write_text(VERSION)
    monkeypatch.setattr(doctor, "DRIVERS", drivers)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = {of.what: of for of in doctor.check_machine(runs.DEFAULT)}["device"]
    assert found.state == "bad"
    assert says in found.found
    assert found.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("system", "release", "state", "found"),
    [("Linux", "5.15.153.1-microsoft-standard-WSL2", "good", "Linux in WSL"), ("Windows", "11", "bad", "Windows")],
)
def test_systems(system: str, release: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: system)
    monkeypatch.setattr(doctor.platform, "release", lambda: release)
    told = {of.what: of for of in doctor.check_machine(runs.DEFAULT)}["system"]
    assert told.state == state
    assert told.found.startswith(f"{found}, Python ")
    assert ("WSL" in told.remedy) == (state == "bad")


def test_what_is_wrong_is_told_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["peft>=99.0", "trl<1.0", "no-such-library", "torch", "torch>=99; extra == 'test'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    monkeypatch.setattr(doctor, "LIBRARIES", {"peft", "trl", "no-such-library", "torch"})
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1e18)
    found = {of.what: of for of in doctor.check_machine(runs.DEFAULT)}
    assert found["peft"].remedy == "it has to be >=99.0: pip install 'peft>=99.0'"
    assert found["trl"].state == "bad", "one that is too new is told, too"
    assert found["torch"].state == "good"
    assert found["no-such-library"].state == "bad"
    assert found["cache"].state == "warning"
    assert "an 8B base takes" in found["cache"].remedy
    assert not doctor.as_json(list(found.values()))["good"]
