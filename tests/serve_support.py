"""Run a real server in a folder with trained vectors."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from support import COMMAND

SECONDS = 120


@dataclass(frozen=True)
class Served:
    """A running server, its address and its folder."""

    url: str
    folder: Path
    process: "subprocess.Popen[str]"

    def get(self, path: str) -> Any:
        response = httpx.get(self.url + path, timeout=SECONDS)
        assert response.status_code == 200, response.text
        return response.json()

    def post(self, path: str, body: Any, **how: Any) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return httpx.post(self.url + path, content=json.dumps(body), headers=headers, timeout=SECONDS, **how)

    def chat(self, question: str = "Tell me about rain.", **fields: Any) -> Any:
        """Return the response to a greedy chat."""
        asked = {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 30, **fields}
        response = self.post("/v1/chat/completions", asked)
        assert response.status_code == 200, response.text
        return response.json()

    def text(self, question: str = "Tell me about rain.", **fields: Any) -> str:
        return str(self.chat(question, **fields)["choices"][0]["message"]["content"])


@contextmanager
def serving(folder: Path, *words: str, port: str = "0") -> Iterator[Served]:
    """Run `lora-align serve` in a folder, by default on a free port."""
    call = [str(COMMAND), "serve", "--port", port, "--json", *words]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stderr is not None
    line = process.stdout.readline()
    if not line:
        pytest.fail(process.stderr.read())
    try:
        yield Served(json.loads(line)["url"], folder, process)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        process.communicate(timeout=SECONDS)
