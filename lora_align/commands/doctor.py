"""What this machine has, what will work on it, and what to do about the rest."""

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from lora_align import store
from lora_align.console import table

LIBRARIES = {"torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate"}
ENOUGH_DISK = 23e9  # a base of 8 B parameters, fetched and kept in 4-bit
# there with a driver, whatever torch says: on Linux, and in WSL
DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
MARKS = {"good": "✓", "warning": "!", "bad": "✗"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; what to do where it is not good."""

    what: str
    state: str
    found: str
    remedy: str = ""


def check_machine(runs_dir: Path) -> list[Finding]:
    """Look at everything. Nothing is downloaded and no base is loaded."""
    looks: list[Callable[[], Iterator[Finding]]] = [_system, _libraries, _device, _four_bit, _hub]
    return [*(finding for look in looks for finding in look()), *_disk(runs_dir)]


def summary(findings: list[Finding]) -> str:
    """A table, then what to do."""
    rows = [[MARKS[of.state], of.what, of.found] for of in findings]
    remedies = [f"{MARKS[of.state]} {of.what}: {of.remedy}" for of in findings if of.remedy]
    return "\n\n".join([table(["", "what", "found"], rows), *(["\n".join(remedies)] if remedies else [])])


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """As plain data."""
    return {"findings": [asdict(of) for of in findings], "good": all(of.state != "bad" for of in findings)}


def _system() -> Iterator[Finding]:
    release = platform.release()
    wsl = " in WSL" if "microsoft" in release.lower() else ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{platform.system()}{wsl}, Python {platform.python_version()}, {cores} cores"
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        found += f", {os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 1e9:.0f} GB of memory"
    if platform.system() == "Windows":
        yield Finding("system", "bad", found, "runs are published as Linux and macOS do it; use WSL, which is Linux")
    else:
        yield Finding("system", "good", found)


def _libraries() -> Iterator[Finding]:
    for needed in map(Requirement, requires("lora-align") or ()):
        if needed.name not in LIBRARIES or needed.marker:  # a marker: an extra asks for it
            continue
        try:
            has = version(needed.name)
        except PackageNotFoundError:
            yield Finding(needed.name, "bad", "not installed", "pip install lora-align brings it")
            continue
        if needed.specifier.contains(has, prereleases=True):
            yield Finding(needed.name, "good", has)
        else:
            yield Finding(needed.name, "bad", has, f"it has to be {needed.specifier}: pip install '{needed}'")


def _device() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 1e9
            found = f"{properties.name}, {memory:.0f} GB, compute {properties.major}.{properties.minor}{_driver()}"
            if not torch.cuda.is_bf16_supported(including_emulation=False):
                yield Finding("device", "warning", found, "no bfloat16: float16 is used, with its scaled gradients")
            elif memory < 11:
                yield Finding("device", "warning", found, "for 8B bases 24 GB are meant; llama-3.2-3b is for 12 GB")
            else:
                yield Finding("device", "good", found)
        return
    if any(driver.exists() for driver in DRIVERS):
        why = "this torch was built for CPUs" if torch.version.cuda is None else "the driver is older than torch's CUDA"
        remedy = f"{why}: install one for your driver, see https://pytorch.org/get-started/locally"
        yield Finding("device", "bad", f"an NVIDIA driver{_driver()}, but torch sees no card", remedy)
    else:
        remedy = "the built-in demo trains in minutes; bases of billions of parameters want a card"
        yield Finding("device", "warning", "no card: everything runs on the CPU", remedy)


def _driver() -> str:
    """Its version, where the driver says it."""
    said = DRIVERS[0].read_text(encoding="utf-8", errors="replace") if DRIVERS[0].exists() else ""
    found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", said)
    return f", driver {found[0]}" if found else ""


def _four_bit() -> Iterator[Finding]:
    """NF4 there and back, on the device that will be used."""
    import torch

    where = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        given = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(where)
        packed, state = quantize_4bit(given, quant_type="nf4")
        error = float((dequantize_4bit(packed, state) - given).norm() / given.norm())
    except Exception as fault:  # noqa: BLE001 - whatever it is, it is what a person has to be told
        yield Finding("4-bit", "bad", f"{type(fault).__name__}: {fault}", "python -m bitsandbytes says more")
        return
    if error < 0.2:
        yield Finding("4-bit", "good", f"NF4 on {where}, {error:.0%} off")
    else:
        yield Finding("4-bit", "bad", f"NF4 on {where} is {error:.0%} off", "another bitsandbytes for this device")


def _hub() -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        yield Finding("hub", "warning", "HF_HUB_OFFLINE is set", "bases and data have to be in the cache, or on disk")
    else:
        yield Finding("hub", "good", "logged in" if get_token() else "not logged in (gated bases: hf auth login)")


def _disk(runs_dir: Path) -> Iterator[Finding]:
    from huggingface_hub import constants

    places = {"cache": store.cache_folder(), "hub's cache": Path(constants.HF_HUB_CACHE), "runs": runs_dir.resolve()}
    for what, folder in places.items():
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        found = f"{folder}, {free / 1e9:,.0f} GB free"
        if not os.access(there, os.W_OK):
            yield Finding(
                what, "bad", f"{folder} cannot be written", "choose another: LORA_ALIGN_CACHE, HF_HOME, --runs"
            )
        elif free < ENOUGH_DISK and what != "runs":
            yield Finding(what, "warning", found, f"an 8B base takes {ENOUGH_DISK / 1e9:.0f} GB until it is in 4-bit")
        else:
            yield Finding(what, "good", found)
