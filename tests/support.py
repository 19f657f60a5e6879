"""What tests share: the installed command, tiny random bases of several families, real material."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

COMMAND = Path(sys.executable).with_name("lora-align")
PAIRS = ["--set", "dpo.limit=64"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


def call(cwd: Path, *words: str, stdin: str | None = None) -> Done:
    """Run the installed command in a folder."""
    assert COMMAND.exists(), "install the project first: pip install -e '.[test]'"
    done = subprocess.run([str(COMMAND), *words], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)


def make_base(folder: Path, family: str = "llama", positions: int = 256) -> Path:
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
        "max_position_embeddings": positions,
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


def real_data(name: str) -> Path:
    """Real material from the folder LORA_ALIGN_REAL_DATA names; the test is skipped where that is not set."""
    folder = os.environ.get("LORA_ALIGN_REAL_DATA")
    if not folder:
        pytest.skip("LORA_ALIGN_REAL_DATA is not set")
    return Path(folder) / name
