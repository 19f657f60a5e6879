"""Clients that other people wrote: curl, llm, and lm-evaluation-harness. test_server.py has the `openai` package."""

import json
import os
import subprocess
import sys
from pathlib import Path

from serve_support import Served

QUESTION = "Tell me about rain."
TASK = """
task: says
dataset_path: json
dataset_kwargs: {{data_files: {questions}}}
test_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], temperature: 0, max_gen_toks: 30}}
metric_list:
  - metric: exact_match
"""
HARNESS = """
import json, sys
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
model = {"base_url": sys.argv[1] + "/v1/chat/completions", "model": sys.argv[2], "num_concurrent": 2}
done = simple_evaluate("local-chat-completions", model, ["says"], apply_chat_template=True, log_samples=False,
                       bootstrap_iters=0, task_manager=TaskManager(include_path=sys.argv[3], include_defaults=False))
print(json.dumps(done["results"]["says"]))
"""


def test_curl_gets_an_answer_and_a_stream(server: Served) -> None:
    body = {"model": "helpful=1", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    words = [
        "curl",
        "--silent",
        "--show-error",
        f"{server.url}/v1/chat/completions",
        "-H",
        "content-type: application/json",
    ]
    whole = subprocess.run([*words, "-d", json.dumps({**body, "max_tokens": 30})], capture_output=True, check=True)
    text = json.loads(whole.stdout)["choices"][0]["message"]["content"]
    assert text == server.text(QUESTION, model="helpful=1")
    streamed = {**body, "max_tokens": 30, "stream": True}
    events = subprocess.run([*words, "-d", json.dumps(streamed)], capture_output=True, check=True).stdout.decode()
    data = [line.removeprefix("data: ") for line in events.splitlines() if line]
    assert data[-1] == "[DONE]"
    deltas = [choice["delta"] for chunk in data[:-1] for choice in json.loads(chunk)["choices"]]
    assert "".join(delta.get("content", "") for delta in deltas) == text


def test_llm_gets_an_answer(server: Served, tmp_path: Path) -> None:
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: mix\n  model_name: helpful=1\n  api_base: {server.url}/v1\n"
    )
    words = [Path(sys.executable).with_name("llm"), "-m", "mix", "--key", "none", "-o", "temperature", "0"]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
    for more in (["-o", "max_tokens", "30"], ["-o", "max_tokens", "30", "--no-stream"]):
        done = subprocess.run([*words, *more, QUESTION], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == server.text(QUESTION, model="helpful=1").strip()


def test_lm_evaluation_harness_gets_answers(server: Served, tmp_path: Path) -> None:
    answer = server.text(QUESTION, model="helpful=1")
    rows = [{"question": QUESTION, "answer": answer}, {"question": QUESTION, "answer": "something else"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "says.yaml").write_text(TASK.format(questions=tmp_path / "questions.jsonl"))
    words = [sys.executable, "-c", HARNESS, server.url, "helpful=1", str(tmp_path)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["exact_match,none"] == 0.5
