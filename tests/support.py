"""Provide what tests share: the installed command, tiny random bases of several families, real data."""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import shutil
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import pytest
from filelock import FileLock

import forked
from lora_align import runs
from lora_align.console import Screen
from lora_align.data import pairs
from lora_align.recipe import Preference

if TYPE_CHECKING:
    from torch import Tensor

    from lora_align.data.rows import Pair
    from lora_align.model.tokenise import TokenPair
    from lora_align.train.token_rows import TokenRows

COMMAND = Path(sys.executable).with_name("lora-align")
PAIRS = ["--set", "dpo.limit=64"]
VLLM = os.environ.get("LORA_ALIGN_VLLM")
# with a seed, chunked prefill ends a CPU server
PARTS = "--max-num-batched-tokens 65536 --no-enable-chunked-prefill"
VLLM_OPTIONS = f"--dtype float32 --enforce-eager --enable-lora --max-lora-rank 64 --max-model-len 512 {PARTS}"


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Cli = Callable[..., Done]


@dataclass(frozen=True)
class Read:
    """Hold all of a preference's pairs."""

    train: "list[Pair]"
    held_out: "list[Pair]"
    dropped: Counter[str]


def pairs_of(preference: Preference, held_out: float = 0.0, limit: int | None = None) -> Read:
    """Read and rank the pairs, as training does."""
    read = Read([], [], Counter())
    for pair, aside in pairs.read_pairs(preference, held_out, limit, read.dropped):
        (read.held_out if aside else read.train).append(pair)
    return read


def material_of(preference: Preference, held_out: float = 0.0, limit: int | None = None) -> "TokenRows[TokenPair]":
    """Read the pairs as tokens for the demo base, and cache them."""
    from lora_align import recipe
    from lora_align.model import base
    from lora_align.train import token_rows

    return token_rows.read_token_pairs(
        preference, base.find(recipe.Base("demo")), held_out, limit, 512, Screen(quiet=True)
    )


def call(cwd: Path, *words: str, stdin: str | None = None) -> Done:
    """Run the command in a folder; see `forked`."""
    assert COMMAND.exists(), "install the project first: pip install -e '.[test]'"
    return Done(*forked.run(COMMAND, cwd, words, stdin or ""))


@contextmanager
def listening(answers: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Run a server on this machine; yield its address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


@contextmanager
def program_server(words: Sequence[str], port: int, log: Path, **settings: str) -> Iterator[str]:
    """Run another program's server until its health page answers; yield the address."""
    with log.open("a") as stream:
        child = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env={**os.environ, **settings})
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 300
    try:
        while time.monotonic() < until and child.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                    break
            time.sleep(0.5)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield url
    finally:
        child.terminate()
        child.wait(60)


@contextmanager
def vllm_server(folder: Path, model: Path, *options: str, **settings: str) -> Iterator[str]:
    """Serve a model as `demo` with vLLM; yield the address. The log is in the folder."""
    port = free_port()
    words = [str(VLLM), "serve", str(model), "--served-model-name", "demo", "--port", str(port)]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_CPU_KVCACHE_SPACE": "1", **settings}
    with program_server([*words, *VLLM_OPTIONS.split(), *options], port, folder / "log.txt", **settings) as url:
        yield url


INSTRUCTION = r'(FROM|PARAMETER|TEMPLATE|SYSTEM|ADAPTER|LICENSE|MESSAGE) (?:"""(.*?)"""|([^"\n][^\n]*))\n'


def instructions(modelfile: Path) -> list[tuple[str, str]]:
    """Parse a whole Modelfile: an instruction a line, whose value may be in three double quotes."""
    text, at, found = modelfile.read_text(), 0, []
    while at < len(text):
        match = re.compile(INSTRUCTION, re.DOTALL).match(text, at)
        assert match, f"no instruction: {text[at : at + 80]!r}"
        found.append((match[1], match[2] or match[3]))
        at = match.end()
    return found


def vllm_answer(url: str, model: str, question: str, tokens: int = 40) -> str:
    """Return a greedy answer of a vLLM server."""
    asked = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": tokens,
    }
    response = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=300)
    assert response.status_code == httpx.codes.OK, response.text
    return str(response.json()["choices"][0]["message"]["content"]).strip()


def greedy_answer(model: Any, question: str, tokens: int = 40) -> str:
    """Return the greedy answer of a transformers model with the demo base's tokenizer."""
    import torch

    from lora_align import recipe
    from lora_align.data.rows import Message
    from lora_align.model import base as bases

    chat = bases.find(recipe.Base("demo")).chat
    ids = torch.tensor([chat.prompt_ids([Message("user", question)])])
    made = model.generate(input_ids=ids, max_new_tokens=tokens, do_sample=False, eos_token_id=sorted(chat.stop_ids))
    return str(chat.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)).strip()


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that one test process fills and all test processes read."""
    shared = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        shared = shared.parent
    folder, done = shared / name, shared / f"{name}.done"
    with FileLock(shared / f"{name}.lock"):
        if not done.exists():
            if folder.exists():  # another process failed; try again, so that this test shows the cause, too
                shutil.rmtree(folder)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount a small disk that is soon full. Only root may mount it."""
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk: {mounted.stderr.decode()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def edit_manifest(folder: Path, **changed: Any) -> None:
    """Change values of a run's manifest, and renew its digest."""
    file = folder / runs.MANIFEST
    content = {**json.loads(file.read_text()), **changed}
    file.write_text(json.dumps({**content, "digest": runs.digest(content)}))


def fill(disk: Path) -> None:
    """Fill the disk to the last byte."""
    filled = subprocess.run(["dd", "if=/dev/zero", f"of={disk}/filler", "bs=4k"], capture_output=True, text=True)
    assert "No space left" in filled.stderr


class Terminal:
    """Simulate a user at a real terminal."""

    def __init__(self, cwd: Path, *words: str, columns: int = 0, program: str | Path = COMMAND) -> None:
        self.screen, child = pty.openpty()
        fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [str(program), *words],
            cwd=cwd,
            stdin=child,
            stdout=child,
            stderr=child,
            start_new_session=True,
            env={name: of for name, of in os.environ.items() if name not in ("COLUMNS", "LINES")},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(child)
        self.text = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def wait_for(self, what: str, start: int | None = None) -> str:
        """Wait until `what` is on the screen; return the screen from `start` (by default: from now)."""
        end, start = time.monotonic() + 60, len(self.text) if start is None else start
        while what not in self.text[start:]:
            assert time.monotonic() < end, f"{what!r} did not come:\n{self.text}"
            if select.select([self.screen], [], [], 0.2)[0]:
                self.text += self.decoder.decode(os.read(self.screen, 65536))
        return self.text[start:]

    def rest(self) -> str:
        """Return the screen from now until the program ends."""
        start = len(self.text)
        with suppress(OSError):  # reading fails when the program has closed the terminal
            while shown := os.read(self.screen, 65536):
                self.text += self.decoder.decode(shown)
        self.process.wait(timeout=60)
        return self.text[start:]

    def say(self, line: str) -> str:
        """Type a line; return the screen until the next prompt."""
        start = len(self.text)
        os.write(self.screen, f"{line}\n".encode())
        echoed = start + len(self.wait_for("\n", start).split("\n")[0])
        return self.wait_for("› ", echoed)


def make_base(folder: Path, family: str = "llama", positions: int = 256) -> Path:
    """Make a tiny random base of a family, with the demo tokenizer and template."""
    import torch
    import transformers

    from lora_align.demo import BASE as DEMO

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


def peft_adapter(base: Path, folder: Path, seed: int, **config: Any) -> dict[str, "Tensor"]:
    """Let PEFT make and save an adapter; return PEFT's own ΔW of every module."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **config))
    meant = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            torch.nn.init.normal_(module.lora_B["default"].weight, std=0.3)
            meant[name.removeprefix("base_model.model.")] = module.get_delta_weight("default").detach()
    model.save_pretrained(str(folder))
    return meant


def free_port() -> int:
    """Return a port that no process listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def real_data(name: str) -> Path:
    """Return a path in the folder that LORA_ALIGN_REAL_DATA names; skip the test if the variable is not set."""
    folder = os.environ.get("LORA_ALIGN_REAL_DATA")
    if not folder:
        pytest.skip("LORA_ALIGN_REAL_DATA is not set")
    return Path(folder) / name
