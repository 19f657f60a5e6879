"""A real server answers real clients: weights in each form, streams, errors, signals."""

import asyncio
import json
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx2 as httpx
import openai
import pytest

from serve_support import SECONDS, Served, serving
from support import COMMAND, Cli, call, free_port

HELLO = [{"role": "user", "content": "Tell me about rain."}]


def _until(true: Any) -> None:
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_models_are_the_policies(server: Served) -> None:
    names = [model["id"] for model in server.get("/v1/models")["data"]]
    assert names == ["helpful=1", "base", "start", "helpful", "harmless"]


def test_weights_may_be_given_in_four_ways(server: Served) -> None:
    ids = {vector["name"]: vector["id"] for vector in server.get("/v1/vectors")["vectors"]}
    mixes = [
        server.text(model="helpful=1,harmless=-0.5"),
        server.text(weights={"helpful": 1, "harmless": -0.5}),
        server.text(model="base", weights={"harmless": -0.5, "helpful": 1}),  # there is no SFT
        server.text(lora=[{"id": ids["helpful"], "scale": 1}, {"id": ids["harmless"], "scale": -0.5}]),
    ]
    assert len(set(mixes)) == 1
    assert server.text(model="harmless=9", weights={"helpful": 1, "harmless": -0.5}) == mixes[0]  # weights replace it
    assert server.text() == server.text(model="helpful") == server.text(model="helpful=1") != mixes[0]
    assert server.text(weights={}) == server.text(model="start") == server.text(model="base")  # no SFT


def test_answers_equal_those_of_chat(server: Served) -> None:
    words = ["--weights", "helpful=1,harmless=-0.5", "--temperature", "0", "--max-new-tokens", "30"]
    done = subprocess.run(
        [COMMAND, "chat", *words, "--prompt", "Tell me about rain."], cwd=server.folder, capture_output=True, text=True
    )
    assert server.text(model="helpful=1,harmless=-0.5").strip() == done.stdout.strip()


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "helpfull"}, 404, "did you mean 'helpful'? (known: helpful=1, base, start, helpful, harmless)"),
        ({"model": "helpfull=1"}, 404, "no vector 'helpfull', did you mean 'helpful'? (known: helpful, harmless)"),
        ({"weights": {"../../etc": 1}}, 404, "no vector '../../etc'"),
        ({"model": "runs/dpo/helpful/pos"}, 404, "no model"),
        ({"model": "/etc/passwd=1"}, 404, "no vector"),
        ({"model": "helpful="}, 400, "expected NAME=NUMBER"),
        ({"want": {"helpfulness": 1}}, 404, "no conditioned policy"),
        ({"model": "nobody", "weights": {"helpful": 1}}, 404, "no model 'nobody'"),
        ({"messages": [{"role": "user", "content": "\ud83d"}]}, 400, "not JSON in UTF-8"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format is not supported"),
        ({"messages": [{"role": "user", "content": "x " * 2000}]}, 400, "tokens, and the context of the base"),
        ({"messages": [{"role": "user", "content": "x" * 500_000}]}, 400, "the prompt has 500,000 characters"),
        ({"model": "helpful=1e39"}, 400, "helpful=1e+39: expected a weight from -64 to 64"),
        ({"model": "profile:nobody"}, 404, "no profile 'nobody'"),
        ({"lora": [{"id": 99, "scale": 1}]}, 404, "no vector has the id 99"),
        ({"top_k": 5}, 400, "top_k is not supported"),
    ],
)
def test_errors_have_the_form_of_openai(fields: dict[str, Any], status: int, message: str, server: Served) -> None:
    response = server.post("/v1/chat/completions", {"messages": HELLO, **fields})
    assert response.status_code == status
    error = response.json()["error"]
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    assert "Traceback" not in response.text


def test_unknown_paths_methods_and_bodies_are_refused(server: Served) -> None:
    for response, status in [
        (httpx.get(server.url + "/../../etc/passwd"), 404),
        (httpx.get(server.url + "/page.js.map"), 404),
        (httpx.get(server.url + "/v1/chat/completions"), 405),
        (
            httpx.post(server.url + "/v1/chat/completions", content=b"{", headers={"content-type": "application/json"}),
            400,
        ),
        (
            httpx.post(
                server.url + "/v1/chat/completions",
                content=b"[" * 100_000,
                headers={"content-type": "application/json"},
            ),
            400,
        ),
        (httpx.post(server.url + "/v1/chat/completions", content=b"{}", headers={"content-type": "text/plain"}), 415),
    ]:
        assert response.status_code == status, response.text
        assert response.json()["error"]["message"]


def test_a_stream_has_the_text_of_the_whole_answer(server: Served) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="-")
    asked: Any = {"model": "helpful=0.5", "messages": HELLO, "temperature": 0, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    stream = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content
    assert stream[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in stream if c.choices][-1] == whole.choices[0].finish_reason
    assert stream[-1].usage == whole.usage
    assert len({chunk.id for chunk in stream}) == 1
    assert len(stream) > 4


def test_n_answers_differ_and_a_seed_repeats_them(server: Served) -> None:
    asked = {"n": 4, "temperature": 1.0, "seed": 5, "logprobs": True, "top_logprobs": 2}
    first, again = (server.chat(**asked)["choices"] for _ in range(2))
    texts = [choice["message"]["content"] for choice in first]
    assert texts == [choice["message"]["content"] for choice in again]
    assert len(set(texts)) > 1
    assert [choice["index"] for choice in first] == [0, 1, 2, 3]
    tokens = first[0]["logprobs"]["content"]
    assert "".join(token["token"] for token in tokens).strip() == texts[0].strip()
    assert all(len(token["top_logprobs"]) == 2 and token["logprob"] <= 0 for token in tokens)
    assert server.chat(temperature=1.0, seed=6)["choices"][0]["message"]["content"] != texts[0]


def test_completions_continue_texts_and_tokens(server: Served) -> None:
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="-")
    one = client.completions.create(model="start", prompt="Rain is", temperature=0, max_tokens=8, logprobs=2)
    two = client.completions.create(model="start", prompt=["Rain is", "Soup is"], temperature=0, max_tokens=8, n=2)
    assert [choice.index for choice in two.choices] == [0, 1, 2, 3]
    assert two.choices[0].text == two.choices[1].text == one.choices[0].text
    logprobs = one.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len(logprobs.top_logprobs) == 8
    assert one.usage is not None
    assert one.usage.completion_tokens == 8
    assert server.post("/v1/completions", {"prompt": [99_999]}).status_code == 400


def test_many_async_clients_get_their_own_answers(server: Served) -> None:
    client = openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="-")
    mixes = [f"helpful={3 * i},harmless={-2 * i}" for i in range(12)]

    async def ask(model: str) -> str:
        made = await client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Tell me about rain."}], temperature=0, max_tokens=20
        )
        return str(made.choices[0].message.content)

    async def ask_all() -> list[str]:
        return await asyncio.gather(*map(ask, mixes))

    together = asyncio.run(ask_all())
    assert together == [server.text(model=mix, max_tokens=20) for mix in mixes]
    assert len(set(together)) > 2


def test_stop_sequences_end_answers(server: Served) -> None:
    whole = server.text(max_tokens=60)
    word = whole.split()[4]
    cut = server.chat(max_tokens=60, stop=[word, "never"])["choices"][0]
    assert cut["message"]["content"] == whole[: whole.index(word)]
    assert cut["finish_reason"] == "stop"


def test_stop_sequences_end_each_of_several_answers(server: Served) -> None:
    asked = {"n": 4, "temperature": 1, "seed": 3, "max_tokens": 60}
    whole = [choice["message"]["content"] for choice in server.chat(**asked)["choices"]]
    choices = server.chat(**asked, stop=["a"])["choices"]
    assert [choice["message"]["content"] for choice in choices] == [text.partition("a")[0] for text in whole]
    assert len({choice["message"]["content"] for choice in choices}) > 1


def test_token_ids_are_returned_on_request(server: Served) -> None:
    choice = server.chat(return_token_ids=True)["choices"][0]
    assert len(choice["token_ids"]) >= 5
    assert "token_ids" not in server.chat()["choices"][0]


def test_weights_far_from_training_answer_with_a_warning(server: Served) -> None:
    response = server.post("/v1/chat/completions", {"messages": HELLO, "max_tokens": 3, "weights": {"helpful": 9}})
    assert response.status_code == 200
    assert "helpful=9 is far beyond 1" in response.headers["x-lora-align-warning"]
    assert any("helpful=9" in warning for warning in response.json()["warnings"])


def test_weights_of_a_running_answer_change(server: Served) -> None:
    asked = {"messages": HELLO, "max_tokens": 400, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=asked, timeout=SECONDS) as stream:
        lines = stream.iter_lines()
        identity = json.loads(next(lines).removeprefix("data: "))["id"]
        changed = server.post(f"/v1/requests/{identity}/weights", {"weights": {"harmless": -1}})
        assert changed.status_code == 200, changed.text
        assert changed.json()["model"] == "harmless=-1"
        refused = server.post(f"/v1/requests/{identity}/weights", {"weights": {"nobody": 1}})
        assert refused.status_code == 404
        assert list(lines)[-2] == "data: [DONE]"
    gone = server.post(f"/v1/requests/{identity}/weights", {"weights": {"harmless": 1}})
    assert gone.status_code == 404
    assert "no answer" in gone.json()["error"]["message"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_when_its_client_leaves(stream: bool, server: Served) -> None:
    asked = {"messages": HELLO, "max_tokens": 400, "stream": stream, "n": 8, "ignore_eos": True}

    async def leave() -> None:
        async with httpx.AsyncClient() as client:
            request = asyncio.create_task(client.post(server.url + "/v1/chat/completions", json=asked, timeout=SECONDS))
            while not (await client.get(server.url + "/health")).json()["running"]:
                await asyncio.sleep(0.02)
            request.cancel()

    asyncio.run(leave())
    _until(lambda: not server.get("/health")["running"])


def test_vectors_have_norms_and_angles(server: Served) -> None:
    facts = server.get("/v1/vectors")
    assert [vector["name"] for vector in facts["vectors"]] == ["helpful", "harmless"]
    for place, vector in enumerate(facts["vectors"]):
        assert vector["id"] == place
        assert vector["norm"] > 0
        assert vector["cosines"][vector["name"]] == pytest.approx(1)
        assert vector["safe"] is None
    assert facts["default"]["weights"] == {"helpful": 1}
    assert facts["map"] is None


def test_a_damaged_vector_hides_no_other(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    with serving(tmp_path, "--weights", "helpful=1") as server:
        (tmp_path / "runs/dpo/harmless/pos/adapter_model.safetensors").write_bytes(b"damaged")
        assert [vector["name"] for vector in server.get("/v1/vectors")["vectors"]] == ["helpful"]
        before = server.get("/health")["content"]
        shutil.rmtree(tmp_path / "runs/dpo/harmless")
        _until(lambda: server.get("/health")["content"] != before)


def test_runs_appear_and_vanish_without_a_restart(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    with serving(tmp_path) as server:
        assert server.get("/v1/models")["data"][0]["id"] == "start"
        shutil.copytree(tmp_path / "runs" / "dpo" / "helpful", tmp_path / "runs" / "dpo" / "new")
        _until(lambda: "new" in [model["id"] for model in server.get("/v1/models")["data"]])
        assert server.text(model="new=1") == server.text(model="helpful=1")
        shutil.rmtree(tmp_path / "runs" / "dpo" / "new")
        _until(lambda: server.post("/v1/chat/completions", {"messages": HELLO, "model": "new=1"}).status_code == 404)
        shutil.rmtree(tmp_path / "runs")
        _until(lambda: [model["id"] for model in server.get("/v1/models")["data"]] == ["start", "base"])
        assert server.text(model="start")


def test_own_commands_use_the_server(server: Served, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Tell me about rain.\nTell me about soup.\n")
    words = ["--endpoint", server.url, "--weights", "helpful=1,harmless=-0.5", "--temperature", "0"]
    command = [str(COMMAND), "generate", "--prompts", "prompts.txt", "--out", "answers.jsonl", "--max-new-tokens", "30"]
    done = subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert rows[0]["response"] == server.text(model="helpful=1,harmless=-0.5").strip()


@pytest.mark.parametrize("words", [(), ("--log-texts",)])
def test_log_has_texts_only_on_request(words: tuple[str, ...], trained: Path) -> None:
    with serving(trained, *words) as server:
        answer = server.text("Tell me about \x1b[31mrain.", model="prompt:Be discreet.")
        server.process.send_signal(signal.SIGINT)
        assert server.process.stderr is not None
        log = server.process.stderr.read()
    assert "tokens, " in log
    assert ("answer: " in log and answer.strip() in log and "rain" in log) == bool(words)
    assert ("discreet" in log) == bool(words)
    assert "\x1b[31m" not in log


def test_ctrl_c_ends_the_server_with_an_answer_under_way(trained: Path) -> None:
    with serving(trained) as server:
        asked = {"messages": HELLO, "max_tokens": 400, "stream": True, "ignore_eos": True, "n": 16}
        with httpx.stream("POST", server.url + "/v1/chat/completions", json=asked, timeout=SECONDS) as stream:
            next(stream.iter_lines())
            began = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(SECONDS) == 130
            assert time.monotonic() - began < 20  # the aim is 5 s on an idle machine
        assert server.process.stderr is not None
        errors = server.process.stderr.read()
        assert "Traceback" not in errors
        assert errors.splitlines()[-1] == "stopped"


def test_a_killed_server_leaves_nothing(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    before = sorted(tmp_path.rglob("*"))
    with serving(tmp_path, "--weights", "helpful=1") as server:
        assert server.text()
        server.process.kill()
        server.process.wait(SECONDS)
        with serving(tmp_path, port=server.url.rpartition(":")[2]) as again:
            assert again.text(model="helpful=1")
    assert sorted(tmp_path.rglob("*")) == before


def test_a_request_has_a_deadline(trained: Path) -> None:
    with serving(trained, "--deadline", "1") as server:
        asked = {"messages": HELLO, "n": 64, "max_tokens": 200, "ignore_eos": True}
        with ThreadPoolExecutor(8) as clients:  # 100,000 tokens: more than a CPU computes within a second
            answers = list(clients.map(lambda _: server.post("/v1/chat/completions", asked), range(8)))
        late = [answer for answer in answers if answer.status_code == 504]
        assert late, answers[0].text
        assert late[0].json()["error"]["code"] == "timeout"
        assert server.text()


def test_a_port_in_use_and_other_addresses_are_refused(cli: Cli) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = cli("serve", "--port", str(port))
    assert done.code == 2
    assert done.err.strip().splitlines()[-1] == f"error: port {port} is in use; choose another with --port"
    done = cli("serve", "--host", "0.0.0.0", "--port", str(free_port()))
    assert done.code == 2
    assert "other machines could use this server; set --api-key KEY, or allow it with --no-auth" in done.err


def test_a_server_for_other_machines_demands_its_key(trained: Path) -> None:
    with serving(trained, "--host", "0.0.0.0", "--api-key", "secret") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/v1/models").status_code == 401
        assert httpx.get(url + "/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(url + "/").status_code == 200


def test_a_server_without_a_key_answers_other_machines_if_told_so(trained: Path) -> None:
    with serving(trained, "--host", "0.0.0.0", "--no-auth") as server:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.get(url + "/v1/models").status_code == 200
        assert httpx.get(url + "/v1/models", headers={"host": "elsewhere.example"}).status_code == 403


def test_long_headers_are_refused(server: Served) -> None:
    import socket

    at = urlsplit(server.url)
    with socket.create_connection((str(at.hostname), at.port), timeout=SECONDS) as client, suppress(ConnectionError):
        client.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nX-Long: " + b"a" * 200_000)
        assert client.recv(12) in (b"HTTP/1.1 400", b"")
    assert server.text()


def test_safe_weights_and_the_map_come_from_reach_and_sweep(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs", tmp_path / "runs")
    few = ["eval.count=4", "eval.samples=1", "eval.pairs=6", "eval.max_new_tokens=30"]
    small = [word for setting in few for word in ("--set", setting)]
    for words in (["reach", "helpful", "--kl", "1e-4"], ["sweep", "helpful=0:1:1", "harmless=0:1:1"]):
        done = call(tmp_path, *words, *small)
        assert done.code == 0, done.err
    with serving(tmp_path) as server:
        facts = server.get("/v1/vectors")
        assert facts["map"]["axes"] == ["helpful", "harmless"]
        assert sorted(point["weights"] for point in facts["map"]["points"]) == [[0, 0], [0, 1], [1, 0], [1, 1]]
        safe = {vector["name"]: vector["safe"] for vector in facts["vectors"]}
        assert safe["harmless"] is None
        beyond = server.chat(weights={"helpful": safe["helpful"]["high"] + 1})
        assert "helpful" in beyond["warnings"][0]


def test_a_slow_client_does_not_stay_connected(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    at = urlsplit(server.url)
    assert at.hostname
    with socket.create_connection((at.hostname, at.port), timeout=SECONDS) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
        assert slow.recv(1) == b""  # closed by the server


def test_prompted_policies_and_profiles_are_served(server: Served) -> None:
    asked = "Your response should be rated helpfulness 0.9"
    [prompted, same, plain] = [server.text(model=f"prompt{strength}:{asked}") for strength in ("", "@1", "@0")]
    assert prompted == same
    assert plain == server.text(model="start")
    messages = [{"role": "system", "content": asked}, {"role": "user", "content": "Tell me about rain."}]
    assert prompted == server.text(model="start", messages=messages)
    assert server.text(model=f"prompt@2:{asked}")
    refused = server.post("/v1/chat/completions", {"model": "prompt:", "messages": messages})
    assert refused.status_code == 400
    assert "expected prompt:TEXT" in refused.text
    unknown = server.post("/v1/chat/completions", {"model": "profile:me", "messages": messages})
    assert "no profile 'me'" in unknown.text
