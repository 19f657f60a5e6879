"""Errors of the hub are explained in one line. A real server on this machine plays the hub."""

import os
import subprocess
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from hub import read
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


MESSAGES = {
    ("model", "meta/gated"): "base 'meta/gated' is gated and this account has no access: request access at",
    ("model", "meta/absent"): "no model 'meta/absent' on the hub",
    ("model", "meta/old"): "has no revision",
    ("data", "owner/gated"): "data 'owner/gated' is gated: accept its terms at",
    ("data", "owner/absent"): "data 'owner/absent': Dataset 'owner/absent' doesn't exist",
}


def test_errors_of_the_hub_are_explained(hub: str, tmp_path: Path) -> None:
    errors = read(hub, tmp_path, *({key: name} for key, name in MESSAGES))
    for error, message in zip(errors, MESSAGES.values(), strict=True):
        assert message in str(error)


def test_missing_network_is_explained(tmp_path: Path) -> None:
    nobody = "http://127.0.0.1:9"
    for error in read(nobody, tmp_path, {"model": "some/model"}, {"data": "some/data"}):
        assert "not in the cache" in str(error)


def test_error_of_the_hub_reaches_the_screen_and_the_exit_code(hub: str, tmp_path: Path) -> None:
    home = {"HF_ENDPOINT": hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    words = [str(COMMAND), "dpo", "--pref", "helpful", "--set", "base.model=meta/gated"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, **home}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert MESSAGES["model", "meta/gated"] in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
