"""Small real things for the tests: random bases of several families, real NF4, trained runs, the installed command."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several test processes share the machine

import pytest

COMMAND = Path(sys.executable).with_name("lora-align")
PAIRS = ["--set", "dpo.limit=64"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["LORA_ALIGN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cli(tmp_path: Path) -> Cli:
    return lambda *words, **how: call(tmp_path, *words, **how)


def call(cwd: Path, *words: str, stdin: str | None = None) -> Done:
    """Run the installed command in a folder."""
    assert COMMAND.exists(), "install the project first: pip install -e '.[test]'"
    done = subprocess.run([str(COMMAND), *words], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two preferences were trained on a few pairs, by the commands a person types."""
    folder = tmp_path_factory.mktemp("trained")
    for words in (["helpful", "pos"], ["helpful", "neg"], ["harmless", "both"]):
        done = call(folder, "dpo", "--pref", words[0], "--direction", words[1], *PAIRS)
        assert done.code == 0, done.err
    return folder


@pytest.fixture
def workspace(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained folder that a test may spoil."""
    shutil.copytree(trained / "runs", tmp_path / "runs")
    return tmp_path


def make_base(folder: Path, family: str = "llama") -> Path:
    """A tiny random base of a family, with the built-in tokenizer and template."""
    import torch
    import transformers

    from lora_align.model.base import DEMO

    torch.manual_seed(0)
    shape = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64 if family == "gemma" else 32,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    names = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral", "gemma": "Gemma", "gemma2": "Gemma2"}
    config = getattr(transformers, f"{names[family]}Config")(**shape)
    model = getattr(transformers, f"{names[family]}ForCausalLM")(config)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(DEMO).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("llama"))


def real_data(name: str) -> Path:
    """Real material from the folder LORA_ALIGN_REAL_DATA names; the test is skipped where that is not set."""
    folder = os.environ.get("LORA_ALIGN_REAL_DATA")
    if not folder:
        pytest.skip("LORA_ALIGN_REAL_DATA is not set")
    return Path(folder) / name
