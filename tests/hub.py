"""Serve datasets and files of models from this machine, over the HTTP requests of the hub's own libraries."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

from support import listening

Files = Mapping[str, bytes]  # path → contents


READ = """
import json, sys, time
from lora_align import recipe
from lora_align.data import sources
from lora_align.errors import UserError
from lora_align.model import base

time.sleep = lambda _: None  # libraries wait before they try again
for table in map(json.loads, sys.argv[1:]):
    try:
        if "model" in table:
            result = base.find(recipe.Base(**table)).identity["model"]
        else:
            result = len(list(sources.rows(recipe.Preference(**table))))
    except UserError as error:
        result = str(error)
    print(json.dumps(result))
"""


def read(endpoint: str, home: Path, *tables: Mapping[str, str], offline: bool = False) -> list[int | str]:
    """Find each base and read each data source, in one process that uses this hub and this cache of it.

    Return the name of the base or the number of rows; or the error.
    """
    settings = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": str(int(offline)), "HF_HOME": str(home)}
    program = [sys.executable, "-c", READ, *map(json.dumps, tables)]
    done = subprocess.run(
        program, cwd=home, env={**os.environ, **settings}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@contextmanager
def serving(sets: Mapping[str, Mapping[str, Files]]) -> Iterator[str]:
    """Serve datasets and files of models by name and revision; yield the address for HF_ENDPOINT."""

    class Hub(_Hub):
        commits: ClassVar = {
            (name, revision): (hashlib.sha1(f"{name} {revision}".encode()).hexdigest(), files)
            for name, revisions in sets.items()
            for revision, files in revisions.items()
        }

    with listening(Hub) as address:
        yield address


class _Hub(BaseHTTPRequestHandler):
    commits: Mapping[tuple[str, str], tuple[str, Files]]

    def do_GET(self) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        match words:
            case ["api", "datasets", owner, name, *segments]:
                self._about(f"{owner}/{name}", segments)
            case ["datasets", owner, name, "resolve", revision, *path] | [owner, name, "resolve", revision, *path]:
                self._file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._refuse("EntryNotFound")

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self) -> None:
        words = unquote(urlsplit(self.path).path).strip("/").split("/")
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        commit = self._commit("/".join(words[2:4]), words[-1])
        if commit and words[4] == "paths-info":
            self._say([entry for entry in _tree(commit[1]) if entry["path"] in paths])
        else:
            self._refuse("RevisionNotFound")

    def _about(self, name: str, segments: list[str]) -> None:
        commit = self._commit(name, segments[1] if len(segments) > 1 else "main")
        if not commit:
            self._refuse("RevisionNotFound")
        elif segments[:1] == ["tree"]:
            below = "/".join(segments[2:])
            self._say([entry for entry in _tree(commit[1]) if str(entry["path"]).startswith(below)])
        else:
            files = [{"rfilename": path} for path in commit[1]]
            self._say({"id": name, "sha": commit[0], "private": False, "tags": [], "siblings": files})

    def _file(self, name: str, revision: str, path: str) -> None:
        commit = self._commit(name, revision)
        if not commit or path not in commit[1]:
            self._refuse("EntryNotFound" if commit else "RevisionNotFound")
            return
        headers = {"ETag": f'"{_name(commit[1][path])}"', "X-Repo-Commit": commit[0]}
        self._answer(200, commit[1][path], headers)

    def _commit(self, name: str, revision: str) -> tuple[str, Files] | None:
        for (of, known), (commit, files) in self.commits.items():
            if of == name and revision in (known, commit):
                return commit, files
        return None

    def _refuse(self, why: str) -> None:
        self._answer(404, b"", {"X-Error-Code": why, "X-Error-Message": why})

    def _say(self, what: object) -> None:
        self._answer(200, json.dumps(what).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _name(contents: bytes) -> str:
    return hashlib.sha1(contents).hexdigest()


def _tree(files: Files) -> list[dict[str, object]]:
    folders = {"/".join(path.split("/")[:depth]) for path in files for depth in range(1, path.count("/") + 1)}
    folder_entries: list[dict[str, object]] = [
        {"type": "directory", "path": folder, "oid": _name(folder.encode()), "size": 0} for folder in sorted(folders)
    ]
    return folder_entries + [
        {"type": "file", "path": path, "oid": _name(contents), "size": len(contents)}
        for path, contents in files.items()
    ]
