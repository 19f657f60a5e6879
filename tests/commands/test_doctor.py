"""`doctor`: its findings are true, and every fault has a remedy."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from lora_align import runs
from lora_align.commands import doctor
from support import Cli


def test_findings_describe_this_machine(cli: Cli, tmp_path: Path) -> None:
    done = cli("doctor", "--json")
    findings = {finding["what"]: finding for finding in json.loads(done.out)["findings"]}
    assert findings["torch"]["found"] == version("torch")
    assert findings["4-bit"]["state"] == "good"
    assert findings["hub"]["found"] == "HF_HUB_OFFLINE is set"
    assert findings["runs"]["found"].startswith(str(tmp_path / "runs"))
    assert (done.code == 0) == all(finding["state"] != "bad" for finding in findings.values())
    text = cli("doctor").out
    assert all(finding["found"] in text and finding["remedy"] in text for finding in findings.values())


def _findings() -> dict[str, doctor.Finding]:
    return {finding.what: finding for finding in doctor.check_machine(runs.DEFAULT).findings}


VERSION = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22 01:44:30 UTC 2024\n"


@pytest.mark.parametrize(
    ("where", "cuda", "says", "remedy"),
    [
        (0, None, "an NVIDIA card, driver 550.54.14, but torch sees none", "this torch was built for CPUs"),
        (0, "12.8", "driver 550.54.14", "the driver may be too old, or CUDA_VISIBLE_DEVICES hides the card"),
        (1, None, "an NVIDIA card, but torch sees none", "this torch was built for CPUs"),
    ],
    ids=["a CPU's torch", "an old driver", "WSL"],
)
def test_card_that_torch_does_not_see_is_a_fault(
    where: int, cuda: str | None, says: str, remedy: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("torch sees a card on this machine")
    drivers = [tmp_path / "proc", tmp_path / "wsl"]
    drivers[where].write_text(VERSION)
    monkeypatch.setattr(doctor, "DRIVERS", drivers)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    finding = _findings()["device"]
    assert finding.state == "bad"
    assert says in finding.found
    assert finding.remedy.startswith(remedy)


@pytest.mark.parametrize(
    ("system", "release", "state", "found"),
    [("Linux", "5.15.153.1-microsoft-standard-WSL2", "good", "Linux in WSL"), ("Windows", "11", "bad", "Windows")],
)
def test_windows_is_a_fault_and_wsl_is_not(
    system: str, release: str, state: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor.platform, "system", lambda: system)
    monkeypatch.setattr(doctor.platform, "release", lambda: release)
    finding = _findings()["system"]
    assert finding.state == state
    assert finding.found.startswith(f"{found}, Python ")
    assert ("WSL" in finding.remedy) == (state == "bad")


def test_wrong_versions_and_full_disks_have_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["peft>=99.0", "trl<1.0", "no-such-library", "torch", "torch>=99; extra == 'test'"]
    monkeypatch.setattr(doctor, "requires", lambda name: needed)
    monkeypatch.setattr(doctor, "LIBRARIES", {"peft", "trl", "no-such-library", "torch"})
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1e18)
    diagnosis = doctor.check_machine(runs.DEFAULT)
    findings = {finding.what: finding for finding in diagnosis.findings}
    assert findings["peft"].remedy == "lora-align needs >=99.0: pip install 'peft>=99.0'"
    assert findings["trl"].state == "bad", "trl is too new"
    assert findings["torch"].state == "good"
    assert findings["no-such-library"].state == "bad"
    assert findings["cache"].state == "warning"
    assert "an 8B base takes" in findings["cache"].remedy
    assert not diagnosis.good


def test_untested_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device("mps"))
    [finding] = doctor._device()
    assert (finding.state, finding.found) == ("warning", "a GPU of type mps")
    assert 'base.quantization = "none"' in finding.remedy
