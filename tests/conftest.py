"""Define the fixtures: trained runs, a workspace to spoil, a tiny base.

Tests use real NF4, real trainers and the installed command.
"""

import os
import shutil
import signal
from pathlib import Path

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores SIGINT in background jobs
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several test processes share the machine

import pytest
from hypothesis import settings

from support import PAIRS, Cli, call, made_once, make_base

settings.register_profile("repeatable", derandomize=True)  # the same examples in every run
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LORA_ALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return lambda *words, **how: call(tmp_path, *words, **how)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two preferences on a few pairs, by the commands a user types."""

    def make(folder: Path) -> None:
        for words in (["helpful", "pos"], ["helpful", "neg"], ["harmless", "both"]):
            done = call(folder, "dpo", "--pref", words[0], "--direction", words[1], *PAIRS)
            assert done.code == 0, done.err

    return made_once(tmp_path_factory, "trained", make)


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    """Copy the trained folder, so that a test may spoil it."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"))
