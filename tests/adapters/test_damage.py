"""An adapter cut at every byte or with a bit turned: with a manifest none is accepted, without one none is a crash."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from lora_align import runs
from lora_align.adapters import peft_format
from lora_align.adapters.delta import Factors
from lora_align.adapters.peft_config import About
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
    peft_format.save(folder, parts.items(), names, About("b", targets=("up_proj", "down_proj")))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    target = tmp_path / "run"
    with runs.claim(target, Screen(quiet=True)) as staging:
        adapter(staging)
        runs.publish(staging, target, Manifest(stage="mix", base={"model": "b", "fingerprint": "f"}, recipe={}))
    return target


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def outcome(folder: Path) -> str:
    try:
        (parent,) = vectors.at(folder, "a").parents
        dict(parent.open())
    except UserError as fault:
        return "refused in a line" if "\n" not in str(fault) else str(fault)
    return "accepted"


def cut_everywhere(folder: Path, name: str) -> Counter[str]:
    """From the end to nothing."""
    file = folder / name
    whole, found = file.read_bytes(), Counter[str]()
    for length in reversed(range(len(whole))):
        os.truncate(file, length)
        found[outcome(folder)] += 1
    file.write_bytes(whole)
    return found


def flipped(folder: Path, name: str) -> Counter[str]:
    """One bit at a time, half of them in the first part, where a header would be."""
    file, draw, found = folder / name, random.Random(0), Counter[str]()
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little") if name == peft_format.WEIGHTS else len(whole)
    for _ in range(FLIPS):
        spoilt = bytearray(whole)
        spoilt[draw.randrange(header if draw.random() < 0.5 else len(whole))] ^= 1 << draw.randrange(8)
        file.write_bytes(spoilt)
        found[outcome(folder)] += 1
    file.write_bytes(whole)
    return found


@pytest.mark.parametrize("name", FILES)
def test_with_a_manifest_none_is_accepted(name: str, run: Path) -> None:
    assert set(cut_everywhere(run, name)) == {"refused in a line"}
    assert set(flipped(run, name)) == {"refused in a line"}
    assert outcome(run) == "accepted"


@pytest.mark.parametrize("name", FILES)
def test_without_one_none_is_a_crash_and_none_that_is_cut_is_accepted(name: str, folder: Path) -> None:
    """A number that was changed to another number cannot be noticed; anything else can."""
    assert set(cut_everywhere(folder, name)) == {"refused in a line"}
    found = flipped(folder, name)
    assert set(found) <= {"accepted", "refused in a line"}
    assert found["refused in a line"] > FLIPS / 4
    assert outcome(folder) == "accepted"
