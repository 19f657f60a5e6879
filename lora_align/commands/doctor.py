"""The command `doctor`: check system, libraries, device, 4-bit arithmetic, hub and disks, with remedies."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lora_align import store
from lora_align.console import count, table

LIBRARIES = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
ENOUGH_DISK = 23e9  # bytes of an 8B base: its 16-bit download and its 4-bit copy
# files that exist if an NVIDIA driver is installed: on Linux, and in WSL
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
MARKS = {"good": "✓", "warning": "!", "bad": "✗"}


@dataclass(frozen=True)
class Finding:
    """The result of one check, with a remedy if its state is not good."""

    what: str
    state: str
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The results of all checks."""

    findings: Sequence[Finding]

    @property
    def good(self) -> bool:
        """Return whether no check failed."""
        return all(finding.state != "bad" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "good": self.good}

    def summary(self) -> str:
        """Return a table of all findings, then the remedies."""
        marked = [(MARKS[finding.state], finding) for finding in self.findings]
        rows = [[mark, finding.what, finding.found] for mark, finding in marked]
        remedies = [f"{mark} {finding.what}: {finding.remedy}" for mark, finding in marked if finding.remedy]
        return "\n\n".join(filter(None, [table(["", "check", "found"], rows), "\n".join(remedies)]))


def check_machine(runs_dir: Path) -> Diagnosis:
    """Run all checks. Nothing is downloaded and no base is loaded."""
    checks: list[Callable[[], Iterator[Finding]]] = [_system, _libraries, _device, _four_bit, _hub]
    return Diagnosis([*(finding for check in checks for finding in check()), *_disk(runs_dir)])


def _system() -> Iterator[Finding]:
    release = platform.release()
    wsl = " in WSL" if "microsoft" in release.lower() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()}{wsl}, Python {platform.python_version()}, {count(cores or 1, 'core')}"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        system += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of memory"
    if platform.system() == "Windows":
        yield Finding("system", "bad", system, "lora-align needs Linux: use WSL")
    else:
        yield Finding("system", "good", system)


def _libraries() -> Iterator[Finding]:
    for needed in map(Requirement, requires("lora-align") or ()):
        if needed.name not in LIBRARIES or needed.marker:  # a marker belongs to an extra
            continue
        try:
            installed = version(needed.name)
        except PackageNotFoundError:
            yield Finding(needed.name, "bad", "not installed", "pip install lora-align installs it")
            continue
        if needed.specifier.contains(installed, prereleases=True):
            yield Finding(needed.name, "good", installed)
        else:
            yield Finding(needed.name, "bad", installed, f"lora-align needs {needed.specifier}: pip install '{needed}'")


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 1e9
            card = f"{properties.name}, {memory:.0f} GB, compute {properties.major}.{properties.minor}{_driver()}"
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                yield Finding("device", "warning", card, "no bfloat16: training uses float16 with loss scaling")
            elif memory < 11:
                yield Finding("device", "warning", card, "`lora-align recipes` lists those for the least memory first")
            else:
                yield Finding("device", "good", card)
        return
    if gpu := torch.accelerator.current_accelerator(check_available=True):
        remedy = "never tested; please report how it went"
        if gpu.type == "mps":
            remedy = f'4-bit bases run on the CPU; set base.quantization = "none" to use the GPU ({remedy})'
        yield Finding("device", "warning", f"a GPU of type {gpu.type}", remedy)
        return
    if any(driver.exists() for driver in DRIVERS):
        why = (
            "this torch was built for CPUs"
            if torch.version.cuda is None
            else "the driver may be too old, or CUDA_VISIBLE_DEVICES hides the card"
        )
        remedy = f"{why}: install a build of torch for your driver, see https://pytorch.org/get-started/locally"
        yield Finding("device", "bad", f"an NVIDIA card{_driver()}, but torch sees none", remedy)
    else:
        remedy = "the demo base trains in minutes on a CPU; a base of billions of parameters needs a card"
        yield Finding("device", "warning", "no card: everything runs on the CPU", remedy)


def _driver() -> str:
    """Return the driver's version for a message, "" if it is unknown."""
    text = DRIVERS[0].read_text(encoding="utf-8", errors="replace") if DRIVERS[0].exists() else ""
    version = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return f", driver {version[0]}" if version else ""


def _four_bit() -> Iterator[Finding]:
    """Quantise to NF4 and back on the device that training will use."""
    import torch

    gpu = torch.accelerator.current_accelerator(check_available=True)
    where = gpu.type if gpu and gpu.type != "mps" else "cpu"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        original = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(where)
        packed, state = quantize_4bit(original, quant_type="nf4")
        error = float((dequantize_4bit(packed, state) - original).norm() / original.norm())
    except Exception as fault:  # noqa: BLE001 - any failure is a finding
        yield Finding("4-bit", "bad", f"{type(fault).__name__}: {fault}", "for details: python -m bitsandbytes")
        return
    if error < 0.2:
        yield Finding("4-bit", "good", f"NF4 on {where}, relative error {error:.0%}")
    else:
        yield Finding(
            "4-bit",
            "bad",
            f"NF4 on {where}, relative error {error:.0%}",
            "install a build of bitsandbytes that supports this device",
        )


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding(
            "hub",
            "warning",
            "HF_HUB_OFFLINE is set",
            "bases and data must be in the cache or on disk",
        )
    else:
        yield Finding("hub", "good", "logged in" if get_token() else "not logged in (gated bases need `hf auth login`)")


def _disk(runs_dir: Path) -> Iterator[Finding]:
    from huggingface_hub import constants

    places = {  # name → folder, and what sets another one
        "cache": (store.cache_folder(), "LORA_ALIGN_CACHE=DIR"),
        "hub's cache": (Path(constants.HF_HUB_CACHE), "HF_HOME=DIR"),
        "runs": (runs_dir.resolve(), "--runs DIR"),
    }
    for what, (folder, option) in places.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(existing).free
        space = f"{folder}, {free / 1e9:,.0f} GB free"
        if not os.access(existing, os.W_OK):
            yield Finding(what, "bad", f"{folder} cannot be written", f"choose another folder: {option}")
        elif free < ENOUGH_DISK and what != "runs":
            yield Finding(what, "warning", space, f"an 8B base takes {ENOUGH_DISK / 1e9:.0f} GB with its 4-bit copy")
        else:
            yield Finding(what, "good", space)
