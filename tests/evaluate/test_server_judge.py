"""A served model as a judge: a verdict counts only if both orders of the answers have it."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from lora_align.evaluate import server_judge
from support import Cli, listening

FEW = ["eval.count=4", "eval.samples=2", "eval.pairs=4", "eval.max_new_tokens=30"]
SMALL = [word for setting in FEW for word in ("--set", setting)]
ANSWERS = re.compile(r"\[Answer 1\]\n(.*)\n\n\[Answer 2\]\n(.*)\n\nReply", re.DOTALL)


@contextmanager
def served(decide: Callable[[str, str], str]) -> Iterator[str]:
    """Serve an OpenAI-compatible judge that decides by a rule."""

    class Handler(BaseHTTPRequestHandler):
        def _reply(self, content: dict[str, Any]) -> None:
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self._reply({"data": [{"id": "judge"}]})

        def do_POST(self) -> None:
            prompt = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
            both = ANSWERS.search(prompt)
            assert both, prompt
            self._reply({"choices": [{"message": {"content": decide(*both.groups())}, "finish_reason": "stop"}]})

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as address:
        yield address


def wins(cli: Cli, url: str) -> dict[str, Any]:
    done = cli("eval", "helpful=1", "helpful=-1", "--judge", url, "--json", *SMALL)
    assert done.code == 0, done.err
    shares: dict[str, Any] = json.loads(done.out)["wins"]["helpful=-1"]
    return shares


def longer(first: str, second: str) -> str:
    return "0" if len(first) == len(second) else "12"[len(first) < len(second)]


def test_consistent_verdicts_decide_the_wins(workspace: Path, cli: Cli) -> None:
    from pyarrow.parquet import read_table

    with served(lambda first, second: f"Answer {longer(first, second)} is better.") as url:
        shares = wins(cli, url)
    texts: dict[str, dict[tuple[int, int], str]] = {}
    for folder in (workspace / "runs" / "eval").iterdir():
        name = json.loads((folder / "measured.json").read_text())["name"]
        rows = read_table(folder / "answers.parquet").to_pylist()
        texts[name] = {(row["prompt"], row["number"]): row["answer"] for row in rows}
    won = [longer(text, texts["helpful=-1"][place]) for place, text in texts["helpful=1"].items()]
    assert shares["judge"]["value"] == pytest.approx(sum({"1": 1.0, "2": 0.0, "0": 0.5}[one] for one in won) / len(won))
    assert 0 < shares["judge"]["value"] < 1
    assert shares["judge: order decided"]["value"] == 0
    assert shares["judge: unclear"]["value"] == 0


def test_verdicts_that_follow_the_order_count_as_ties(workspace: Path, cli: Cli) -> None:
    with served(lambda first, second: "1") as url:
        shares = wins(cli, url)
    assert shares["judge"]["value"] == 0.5
    assert shares["judge: order decided"]["value"] == 1


@pytest.mark.parametrize(
    ("reply", "share"),
    [("1", 1.0), ("**2**.", 0.0), ("0", 0.5), ("Answer 2 is better.", 0.0), ("Of the 2, answer 1.", 0.5), ("Ok", 0.5)],
)
def test_verdict_is_the_first_or_only_number_of_a_reply(reply: str, share: float) -> None:
    assert server_judge._share(server_judge._verdict(reply)) == share


def test_replies_without_a_verdict_are_counted(workspace: Path, cli: Cli) -> None:
    with served(lambda first, second: "Both are lovely.") as url:
        shares = wins(cli, url)
    assert (shares["judge"]["value"], shares["judge: unclear"]["value"]) == (0.5, 1)


def test_unreachable_judge_is_rejected_before_measuring(workspace: Path, cli: Cli) -> None:
    done = cli("eval", "helpful=1", "--judge", "http://127.0.0.1:9", *SMALL)
    assert (done.code, "no server at http://127.0.0.1:9" in done.err) == (2, True)
    assert "--judge 'nowhere': expected http" in cli("eval", "helpful=1", "--judge", "nowhere").err
    assert not (workspace / "runs" / "eval").exists()
