"""Truncated adapters and flipped bits: always refused with a manifest, and never a crash without one."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from lora_align import run_writer
from lora_align.adapters import peft_format
from lora_align.adapters.delta import Factors
from lora_align.adapters.peft_config import BaseInfo
from lora_align.console import Screen
from lora_align.errors import UserError
from lora_align.policy import vectors
from lora_align.runs import Manifest

FILES = (peft_format.WEIGHTS, peft_format.CONFIG)
FLIPS = 3000


def adapter(folder: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    names = [f"model.layers.{layer}.mlp.{kind}" for layer in range(2) for kind in ("up_proj", "down_proj")]
    parts = {name: Factors(*(torch.randn(*s, generator=draw) for s in ((12, 2), (2, 10)))) for name in names}
    peft_format.save(folder, parts.items(), names, BaseInfo("b", targets=("up_proj", "down_proj")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    target = tmp_path / "run"
    with run_writer.staging_folder(target, Screen(quiet=True)) as staging:
        adapter(staging)
        run_writer.publish(staging, target, Manifest(stage="mix", base={"model": "b", "fingerprint": "f"}, recipe={}))
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def outcome(folder: Path) -> str:
    try:
        (parent,) = vectors.from_folder(folder, "a").parents
        dict(parent.open())
    except UserError as fault:
        return "refused in one line" if "\n" not in str(fault) else str(fault)
    return "accepted"


def truncated(folder: Path, name: str) -> Counter[str]:
    """Truncate the file at every length."""
    file = folder / name
    whole, outcomes = file.read_bytes(), Counter[str]()
    for length in reversed(range(len(whole))):
        os.truncate(file, length)
        outcomes[outcome(folder)] += 1
    file.write_bytes(whole)
    return outcomes


def flipped(folder: Path, name: str) -> Counter[str]:
    """Flip single bits, half of them in the header."""
    file, draw, outcomes = folder / name, random.Random(0), Counter[str]()
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name == peft_format.WEIGHTS else len(whole)
    for _ in range(FLIPS):
        damaged = bytearray(whole)
        damaged[draw.randrange(header if draw.random() < 0.5 else len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(damaged)
        outcomes[outcome(folder)] += 1
    file.write_bytes(whole)
    return outcomes


@pytest.mark.parametrize("name", FILES)
def test_damage_is_always_refused_with_a_manifest(name: str, run: Path) -> None:
    assert set(truncated(run, name)) == {"refused in one line"}
    assert set(flipped(run, name)) == {"refused in one line"}
    assert outcome(run) == "accepted"


@pytest.mark.parametrize("name", FILES)
def test_damage_without_a_manifest_never_crashes(name: str, folder: Path) -> None:
    """A changed number is still a number and cannot be detected; all other damage can."""
    assert set(truncated(folder, name)) == {"refused in one line"}
    outcomes = flipped(folder, name)
    assert set(outcomes) <= {"accepted", "refused in one line"}
    assert outcomes["refused in one line"] > FLIPS / 4
    assert outcome(folder) == "accepted"
