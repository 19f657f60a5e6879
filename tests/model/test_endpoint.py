"""The sampler over an independent server: `transformers serve` with the demo base."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import httpx2 as httpx
import pytest

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.demo import BASE as DEMO
from lora_align.demo import oracle, world
from lora_align.errors import RunFailedError, UserError
from lora_align.model.endpoint import Endpoint
from lora_align.model.sampler_protocol import Sampling
from lora_align.rsf.serving import serve_command
from support import Cli, free_port, listening

TOKENS = Sampling(temperature=1.0, max_new_tokens=90, seed=5)
RAIN = (Message("user", "Tell me about rain."),)
MOON = (Message("user", "Tell me about the moon."),)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Copy the demo base with do_sample = true. Without this setting, `transformers serve` never samples."""
    folder = tmp_path_factory.mktemp("served") / "base"
    shutil.copytree(DEMO, folder)
    (folder / "generation_config.json").write_text('{"do_sample": true, "eos_token_id": 1, "pad_token_id": 0}')
    return str(folder)


@pytest.fixture(scope="module")
def server(served: str) -> Iterator[str]:
    port, log = free_port(), Path(served).with_name("log.txt")
    words = [str(Path(sys.executable).with_name("transformers")), "serve", served, "--device", "cpu"]
    with log.open("w") as stream:
        child = subprocess.Popen([*words, "--port", str(port)], stdout=stream, stderr=subprocess.STDOUT)
    url, until = f"http://127.0.0.1:{port}", time.monotonic() + 120
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                break
        except httpx.HTTPError:
            time.sleep(0.2)
    else:
        pytest.fail(log.read_text())
    yield url
    child.terminate()
    child.wait(30)


def test_draw_returns_n_answers_from_a_server_that_ignores_n(server: str, served: str) -> None:
    endpoint = Endpoint.at(f"{server}/v1", served)
    answers = [answer for some in endpoint.draw([RAIN, MOON], 3, TOKENS) for answer in some]
    assert sorted((answer.prompt, answer.number) for answer in answers) == [(p, n) for p in (0, 1) for n in range(3)]
    assert len({answer.text for answer in answers}) == 6
    prompts = (oracle.Prompt("Tell me about rain.", "rain", risky=False), oracle.Prompt("", "the moon", risky=False))
    scores = [oracle.score(prompts[answer.prompt], answer.text) for answer in answers if answer.ended]
    assert len(scores) >= 4
    assert sum(score.well_formed for score in scores) >= 0.75 * len(scores)
    cut = [answer for some in endpoint.draw([RAIN], 1, Sampling(max_new_tokens=3)) for answer in some]
    assert not cut[0].ended


def test_generate_samples_from_a_server(server: str, served: str, cli: Cli, tmp_path: Path) -> None:
    prompts = [next(world.prompts(seed, risky=False)).text for seed in range(6)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    words = ["generate", "--prompts", "prompts.txt", "-n", "2", "--endpoint", server, "--max-new-tokens", "40"]
    done = cli(*words, "--model", served, "--out", "answers.jsonl")
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [(row["prompt"], row["number"]) for row in rows] == [(text, n) for text in prompts for n in (0, 1)]
    assert all(row["response"] for row in rows)

    nobody = cli(*words, "--model", "nobody", "--out", "other.jsonl")
    assert nobody.code == 1
    assert f"{server}/v1/chat/completions: the server answered 400" in nobody.err
    with_adapter = cli(*words, "--model", served, "--adapter", ".", "--out", "other.jsonl")
    assert with_adapter.code == 2
    assert "cannot load adapters at run time (404" in with_adapter.err
    assert serve_command(recipe.load(recipe.builtin()["demo"])) in with_adapter.err
    assert "--max-lora-rank" in cli("generate", "--show-server").out


def test_rsf_refuses_a_server_without_adapter_loading(server: str, cli: Cli, tmp_path: Path) -> None:
    judge = cli("reward", "--limit", "40", "--set", 'reward.ratings.demo.data="demo:ratings?rows=60"')
    assert judge.code == 0, judge.err
    done = cli("rsf", "--endpoint", server, "--set", 'rsf.data="demo:conversations?rows=30"')
    assert done.code == 2
    assert "cannot load adapters at run time (404" in done.err
    assert not (tmp_path / "runs" / "rsf").exists()


class _Between(BaseHTTPRequestHandler):
    """A proxy that answers the first requests with 503, and long prompts with a context error."""

    behind = ""
    to_turn_away = 0
    longest = 1000

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        if type(self).to_turn_away:
            type(self).to_turn_away -= 1
            self.send_error(503)
            return
        if len(json.loads(body)["messages"][-1]["content"]) > self.longest:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b'{"error": {"message": "This model\'s maximum context length is 256 tokens."}}')
            return
        answer = httpx.post(self.behind + self.path, content=body, headers={"content-type": "application/json"})
        self.send_response(answer.status_code)
        self.end_headers()
        self.wfile.write(answer.content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def _between(server: str, to_turn_away: int = 0) -> Iterator[str]:
    _Between.behind, _Between.to_turn_away = server, to_turn_away
    with listening(_Between) as address:
        yield address


def test_busy_server_is_retried(server: str, served: str) -> None:
    with _between(server, to_turn_away=2) as url:
        answers = [answer for some in Endpoint(url, served).draw([RAIN], 1, TOKENS) for answer in some]
    assert _Between.to_turn_away == 0
    assert answers[0].text


def test_prompt_longer_than_the_context_is_dropped_and_counted(
    server: str, served: str, cli: Cli, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("Tell me about rain.\n" + "Tell me about rain. " * 60)
    with _between(server) as url:
        words = ["generate", "--prompts", "prompts.txt", "--endpoint", url, "--model", served]
        done = cli(*words, "--max-new-tokens", "10", "--out", "answers.jsonl")
        assert done.code == 0, done.err
        assert "1 prompt left out: too long for the context" in done.out
        assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1
        (tmp_path / "prompts.txt").write_text("Tell me about rain. " * 60)
        none = cli(*words, "--out", "none.jsonl")
    assert none.code == 1
    assert "every prompt fills the server's context" in none.err


def test_missing_server_is_an_error() -> None:
    nobody = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(UserError, match="no server at"):
        Endpoint.at(nobody)
    with pytest.raises(UserError, match="no server at"):
        Endpoint.at(nobody, "model")
    with pytest.raises(RunFailedError, match=r"gave up after 1\.5 s"):
        list(Endpoint(nobody, "model", deadline=1.5).draw([RAIN], 1, TOKENS))
    with pytest.raises(UserError, match="expected http://HOST:PORT"):
        Endpoint.at("localhost:8000")


@contextmanager
def saying(status: int, body: bytes, pause: float = 0.0, times: int = 1, slow_head: bool = False) -> Iterator[str]:
    """Run a server that answers every request with `body`, repeated `times` times with pauses between."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            head = f"HTTP/1.0 {status} OK\r\nX-Filler: {'x' * 200}\r\n\r\n".encode()
            try:
                for piece in [bytes([one]) for one in head] if slow_head else [head]:
                    self.wfile.write(piece)
                    time.sleep(pause)
                for _ in range(times):
                    self.wfile.write(body)
                    time.sleep(pause)
            except OSError:
                pass  # the client has closed the connection

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.do_GET()

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as address:
        yield address


@pytest.mark.parametrize("slow_head", [False, True])
def test_deadline_holds_against_a_trickling_server(slow_head: bool) -> None:
    with saying(200, b" ", pause=0.05, times=200, slow_head=slow_head) as url:
        began = time.monotonic()
        with pytest.raises(RunFailedError, match=rf"^{url}/v1/chat/completions: gave up after 1 s"):
            list(Endpoint(url, "model", deadline=1.0).draw([RAIN], 1, TOKENS))
        with pytest.raises(UserError, match=rf"^{url}/v1/models: no complete response within 0\.5 s"):
            Endpoint.at(url, deadline=0.5)
        assert time.monotonic() - began < 5


def test_endless_response_is_refused() -> None:
    with saying(200, b" " * (1 << 20), times=4096) as url:
        with pytest.raises(RunFailedError, match=rf"^{url}/v1/chat/completions: the response exceeds 16 MiB"):
            list(Endpoint(url, "model").draw([RAIN], 1, TOKENS))
        with pytest.raises(RunFailedError, match=rf"^{url}/v1/models: the response exceeds 16 MiB"):
            Endpoint.at(url)


@pytest.mark.parametrize(
    "body",
    [
        "[]",
        "[" * 100_000,
        "\udcff",
        "{}",
        '{"choices": 3}',
        '{"choices": {"0": "x"}}',
        '{"choices": []}',
        '{"choices": ["x"]}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": ["x"]}}]}',
        '{"choices": [{"text": "x"}]}',
    ],
)
def test_malformed_completion_error_names_the_server(body: str) -> None:
    with saying(200, body.encode("utf-8", "surrogateescape")) as url, pytest.raises(RunFailedError) as refused:
        list(Endpoint(url, "model").draw([RAIN], 1, TOKENS))
    assert str(refused.value).startswith(f"{url}/v1/chat/completions: ")


@pytest.mark.parametrize("body", ["[]", "{}", '{"data": 3}', '{"data": ["x"]}', '{"data": [{"id": 1}]}', "\udcff"])
def test_malformed_model_list_error_names_the_server(body: str) -> None:
    with saying(200, body.encode("utf-8", "surrogateescape")) as url, pytest.raises(RunFailedError) as refused:
        Endpoint.at(url)
    assert str(refused.value).startswith(f"{url}/v1/models: ")


def test_lone_surrogates_from_a_server_are_replaced() -> None:
    reply = json.dumps({"choices": [{"message": {"content": "a\ud83d b\ude00\ud83d\ude00"}, "finish_reason": "stop"}]})
    with saying(200, reply.encode()) as url:
        [[answer]] = Endpoint(url, "model").draw([RAIN], 1, TOKENS)
    assert answer.text == "a\ufffd b\ufffd\U0001f600"
    with saying(200, json.dumps({"data": [{"id": "m\ud800"}]}).encode()) as url:
        assert Endpoint.at(url).model == "m\ufffd"


@pytest.mark.parametrize("address", ["http://[x", "http://localhost:port", "https://a b"])
def test_invalid_address_is_refused(address: str) -> None:
    with pytest.raises(UserError, match="no server at"):
        Endpoint.at(address)
