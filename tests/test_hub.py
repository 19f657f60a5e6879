"""Errors of the hub are explained in one line. A real server on this machine plays the hub."""

import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from support import COMMAND, listening

ANSWERS = {"gated": (403, "GatedRepo"), "absent": (404, "RepoNotFound"), "old": (404, "RevisionNotFound")}


class Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        which = next((name for name in ANSWERS if f"/{name}" in self.path), "absent")
        status, code = ANSWERS[which]
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", f"the hub says {code}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with listening(Hub) as address:
        yield address


def _dpo(cwd: Path, endpoint: str, setting: str) -> "subprocess.CompletedProcess[str]":
    home = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cwd / "hf")}
    words = [str(COMMAND), "dpo", "--pref", "helpful", "--set", setting]
    return subprocess.run(words, cwd=cwd, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("base.model=meta/gated", "base 'meta/gated' is gated and this account has no access: request access at"),
        ("base.model=meta/absent", "no model 'meta/absent' on the hub"),
        ("base.model=meta/old", "has no revision"),
        ("preferences.helpful.data=owner/gated", "data 'owner/gated' is gated: accept its terms at"),
        ("preferences.helpful.data=owner/absent", "data 'owner/absent': Dataset 'owner/absent' doesn't exist"),
    ],
)
def test_errors_of_the_hub_are_explained(setting: str, message: str, hub: str, tmp_path: Path) -> None:
    done = _dpo(tmp_path, hub, setting)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("setting", ["base.model=some/model", "preferences.helpful.data=some/data"])
def test_missing_network_is_explained(setting: str, tmp_path: Path) -> None:
    done = _dpo(tmp_path, "http://127.0.0.1:9", setting)  # nothing listens there
    assert done.returncode == 2, done.stderr
    assert "not in the cache" in done.stderr
    assert "Traceback" not in done.stderr
