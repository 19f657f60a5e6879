"""Picks over HTTP, as the page sends them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_align.policy import profiles
from serve_support import Served, serving

PICKS = "/v1/picks"


@pytest.fixture(scope="module")
def server(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("picks")
    shutil.copytree(trained / "runs", folder / "runs")
    with serving(folder) as served:
        yield served


def test_picks_teach_weights_and_make_a_profile(server: Served) -> None:
    state = server.post(PICKS, {}).json()
    assert state["picks"] == 0
    assert len(set(state["answers"])) == 2
    for number, won in enumerate((1, 0.5, None, 0)):
        assert state["number"] == number
        state = server.post(f"{PICKS}/{state['id']}", {"number": number, "won": won}).json()
    assert state["picks"] == 3  # one was skipped
    again = server.post(f"{PICKS}/{state['id']}", {"number": 3, "won": 1}).json()
    assert again == state  # a second click on an old choice
    for of in state["weights"].values():
        assert of["low"] <= of["mean"] <= of["high"]
    saved = server.post(f"{PICKS}/{state['id']}/profile", {"profile": "page"})
    assert saved.json() == {"model": "profile:page"}
    means = {name: of["mean"] for name, of in state["weights"].items()}
    assert profiles.weights("page", server.folder / "runs") == pytest.approx(means)
    assert server.text(model="profile:page", max_tokens=4)


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("", {"vectors": ["helpful"]}, 400, "two vectors or more are needed, and there are helpful"),
        ("", {"vectors": ["helpful", "nobody"]}, 404, "nobody"),
        ("", {"kl": 0}, 400, "kl: Input should be greater than 0"),
        ("/none", {"number": 0, "won": 1}, 404, "this session has ended; reload the page"),
    ],
)
def test_picks_refuse(path: str, body: object, status: int, message: str, server: Served) -> None:
    refused = server.post(PICKS + path, body)
    assert refused.status_code == status
    assert message in json.loads(refused.text)["error"]["message"]


def test_profile_with_the_name_of_a_path_is_refused(server: Served) -> None:
    state = server.post(PICKS, {}).json()
    refused = server.post(f"{PICKS}/{state['id']}/profile", {"profile": "../x"})
    assert refused.status_code == 400
    assert "expected 1 to 64 characters" in refused.json()["error"]["message"]
