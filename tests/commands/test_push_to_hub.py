"""`push` against a local server that answers the hub's requests and stores the uploaded files."""

import base64
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lora_align import run_writer, runs
from lora_align.commands.push_to_hub import model_card, push_run
from lora_align.console import Screen
from lora_align.errors import UserError
from support import COMMAND, Done, call, made_once


class Hub(ThreadingHTTPServer):
    """A server with repositories: name → whether it is private, and name → its files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.private: dict[str, bool] = {"me/public": False, "me/private": True}
        self.files: dict[str, dict[str, bytes]] = {}


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/").partition("/revision")[0].partition("?")[0]
        if name in self.server.private:
            self.answer({"id": name, "private": self.server.private[name], "siblings": []})
        else:
            self.answer({}, 404, "RepoNotFound")

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != "Bearer hf_mine":
            self.answer({}, 401, "Unauthorized")
        elif self.path == "/api/repos/create":
            request = json.loads(content)
            name = f"{request['organization']}/{request['name']}"
            self.server.private[name] = request["visibility"] == "private"
            self.answer({"url": f"{self.address}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(content)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            name = self.path.removeprefix("/api/models/").partition("/commit")[0]
            lines = [json.loads(line)["value"] for line in content.splitlines()]
            files = {line["path"]: base64.b64decode(line["content"]) for line in lines if "path" in line}
            self.server.files.setdefault(name, {}).update(files)
            self.answer({"commitUrl": f"{self.address}/{name}/commit/1", "commitOid": "1" * 40, "success": True})
        else:
            self.answer({}, 404)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, body: dict[str, Any], status: int = 200, code: str = "") -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if code:
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", f"the hub says {code}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with both adapters of a preference and a mix."""

    def make(folder: Path) -> None:
        for words in (["dpo", "--pref", "helpful", "--limit", "64"], ["merge", "--weights", "helpful=0.5"]):
            done = call(folder, *words)
            assert done.code == 0, done.err

    return made_once(tmp_path_factory, "to-push", make)


def push(folder: Path, hub: Hub | None, *words: str, token: str = "hf_mine") -> Done:
    address = f"http://127.0.0.1:{hub.server_port}" if hub else "http://127.0.0.1:9"
    home = {"HF_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf"), "HF_TOKEN": token}
    done = subprocess.run(
        [str(COMMAND), "push", *words],
        cwd=folder,
        env={**os.environ, **home},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Done(done.returncode, done.stdout, done.stderr)


MIX = "runs/mix/helpful0p5"


def test_push_uploads_all_files_to_a_private_repository(made: Path, hub: Hub) -> None:
    done = push(made, hub, MIX, "--to", "me/half-helpful")
    assert done.code == 0, done.err
    assert "me/half-helpful (private): " in done.err
    assert done.out.strip().endswith("/me/half-helpful")
    assert hub.private["me/half-helpful"]
    sent = hub.files["me/half-helpful"]
    known = runs.read(made / MIX).manifest.files
    assert set(sent) == {*known, runs.MANIFEST, "README.md"}
    assert all(sent[name] == (made / MIX / name).read_bytes() for name in (*known, runs.MANIFEST))


def test_card_describes_the_run(made: Path, hub: Hub, tmp_path: Path) -> None:
    for path, expected in (
        (MIX, ["A merge of preference vectors", "Merged by `exact` from:", "- `helpful`: weight 0.5"]),
        ("runs/dpo/helpful/neg", ["away from the preference `helpful`", "64 rows (dropped: "]),
    ):
        assert push(made, hub, path, "--to", "me/it").code == 0
        text = hub.files["me/it"]["README.md"].decode()
        card = ModelCard(text)
        assert card.data.library_name == "peft"
        assert "lora-align" in card.data.tags
        assert card.data.base_model is None, "the demo's base is not on the hub"
        for words in [*expected, 'PeftModel.from_pretrained(base, "me/it")', "# it"]:
            assert words in text, text


@pytest.mark.parametrize(
    ("words", "token", "code", "message"),
    [
        ([MIX], "hf_mine", 2, "--to"),
        ([MIX, "--to", "mine"], "hf_mine", 2, "--to 'mine': expected a repository on the hub, OWNER/NAME"),
        ([MIX, "--to", "me/a b"], "hf_mine", 2, "--to 'me/a b'"),
        ([MIX, "--to", "me/public"], "hf_mine", 2, "me/public exists and is public; add --public"),
        ([MIX, "--to", "me/new"], "hf_other", 2, "this account may not write there"),
        (["runs/mix", "--to", "me/new"], "hf_mine", 2, "no run in runs/mix"),
    ],
)
def test_push_refusals(words: list[str], token: str, code: int, message: str, made: Path, hub: Hub) -> None:
    done = push(made, hub, *words, token=token)
    assert done.code == code
    assert message in done.err
    assert "Traceback" not in done.err
    assert not hub.files


def test_public_option_makes_a_new_repository_public(made: Path, hub: Hub) -> None:
    assert push(made, hub, MIX, "--to", "me/public", "--public").code == 0
    assert push(made, hub, MIX, "--to", "me/open", "--public").code == 0
    assert hub.private["me/open"] is False
    into_private = push(made, hub, MIX, "--to", "me/private")
    assert into_private.code == 0
    assert set(hub.files) == {"me/public", "me/open", "me/private"}


def test_push_refuses_a_damaged_run_and_a_missing_network(made: Path, hub: Hub, tmp_path: Path) -> None:
    unreachable = push(made, None, MIX, "--to", "me/new")
    assert unreachable.code == 2
    assert "the hub cannot be reached" in unreachable.err
    shutil.copytree(made / MIX, tmp_path / MIX)  # other tests read the shared one
    file = tmp_path / MIX / "adapter_model.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    done = push(tmp_path, hub, MIX, "--to", "me/new")
    assert done.code == 2
    assert "sha256" in done.err
    assert not hub.files


def test_push_refuses_a_report(tmp_path: Path) -> None:
    target, quiet = tmp_path / "sweep" / "a", Screen(quiet=True)
    with run_writer.staging_folder(target, quiet) as staging:
        run_writer.publish(staging, target, runs.Manifest(stage="sweep", base={"model": "demo", "fingerprint": "f"}))
    with pytest.raises(UserError, match="is a run of `sweep`, without an adapter"):
        push_run(target, "me/it", public=False, screen=quiet)


@pytest.mark.parametrize(("steer", "about"), [("", "takes a direction"), ("scores: {{ listed }}", "takes scores")])
def test_card_says_what_a_policy_of_rsf_takes(steer: str, about: str, tmp_path: Path) -> None:
    manifest = runs.Manifest("rsf", {"model": "demo", "fingerprint": "f"}, method={"steer": steer})
    card = model_card(runs.Run(tmp_path, manifest), "me/it")
    assert f"policy that {about} in its system message. A LoRA adapter" in card


def test_recipe_text_on_a_card_is_inert(tmp_path: Path) -> None:
    hostile = "<script>x</script> ![i](http://e) **b** `c` ``d`` {{ 1 + 1 }}\n\n# h\n- l \x1b[31m\u202e"
    about = {"model": hostile, "fingerprint": hostile, "quantization": hostile}
    data = {"a": {"source": hostile, "rows": 1, "dropped": {hostile: 2}}}
    parents = ({"name": hostile, "weight": 1.0, "adapters": []},)
    for kind in ("dpo", "mix"):
        manifest = runs.Manifest(kind, about, preference=hostile, start=hostile, data=data, parents=parents)
        manifest = replace(manifest, method={"name": hostile})
        manifest = replace(manifest, unconverged=(hostile,), versions={hostile: hostile})
        text = model_card(runs.Run(tmp_path, manifest), "me/it").split("---\n", 2)[2]
        tokens = MarkdownIt().parse(text)
        kinds = {inner.type for token in tokens for inner in [token, *(token.children or [])]}
        assert not kinds & {"html_inline", "html_block", "image", "link_open"}
        assert [tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open"] == ["it"]
        assert not {"\x1b", "\u202e"} & set(text)
        assert "`1 row`" not in text
        assert "1 row" in text
