"""`generate` answers every prompt exactly once, however the work is interrupted."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from lora_align import recipe
from lora_align.cli import use_commands
from lora_align.console import Screen
from lora_align.data import row_reader, shards, sources
from lora_align.errors import UserError
from lora_align.policy.policy import select_policy
from support import COMMAND, call


def _rows(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_generate_resumes_after_a_kill_with_the_same_answers(workspace: Path) -> None:
    words = ["generate", "--prompts", "demo:conversations?rows=150&part=dev", "-n", "4", "-w", "helpful=1"]
    child = subprocess.Popen([str(COMMAND), *words, "--out", "killed.jsonl", "--quiet"], cwd=workspace)
    parts, until = workspace / ".killed.jsonl.parts", time.monotonic() + 120
    while not list(parts.glob("part-*.parquet")) and time.monotonic() < until:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait(60)
    part_count = len(list(parts.glob("part-*.parquet")))
    assert 1 <= part_count < 150 / 64
    other = call(workspace, *words[:-2], "-w", "helpful=0.5", "--out", "killed.jsonl")
    assert other.code == 2
    assert "was begun with other settings (model)" in other.err

    resumed = call(workspace, *words, "--out", "killed.jsonl")
    assert resumed.code == 0, resumed.err
    assert f"generate: done before: {part_count * 64} of " in resumed.err
    assert not parts.exists()
    whole = call(workspace, *words, "--out", "whole.jsonl")
    assert whole.code == 0, whole.err
    assert _rows(workspace / "killed.jsonl") == _rows(workspace / "whole.jsonl")
    assert len(_rows(workspace / "whole.jsonl")) == 600


def test_shares_divide_the_prompts(workspace: Path) -> None:
    words = ["generate", "--prompts", "demo:pairs?rows=40", "--adapter", "dpo/helpful/pos", "--max-new-tokens", "60"]
    for share in ("1/2", "2/2"):
        done = call(workspace, *words, "--share", share, "--out", f"{share[0]}.parquet")
        assert done.code == 0, done.err
    whole = call(workspace, *words, "--out", "whole.parquet", "--json")
    printed = json.loads(whole.out)
    assert (printed["prompts"], printed["answers"], printed["too_long"]) == (40, 40, 0)
    shares = [read_table(workspace / f"{name}.parquet").to_pylist() for name in ("1", "2")]
    assert all(shares)
    merged = read_table(workspace / "whole.parquet").to_pylist()
    both = {(row["prompt"], row["response_0"]): row["response"] for rows in shares for row in rows}
    assert both == {(row["prompt"], row["response_0"]): row["response"] for row in merged}
    again = [
        row_reader.prompt(row, where)[0].content
        for where, row in sources.rows_or_raise(str(workspace / "whole.parquet"))
    ]
    assert again == [row["prompt"] for row in merged]


def test_old_answer_in_a_row_is_removed(workspace: Path) -> None:
    turns = [{"role": "user", "content": "Tell me about rain."}, {"role": "assistant", "content": "It is wet."}]
    rows = [{"messages": turns, "id": "a"}, {"prompt": "What is fog?", "response": "Wet.", "warmth": 3, "topic": "fog"}]
    for number, row in enumerate(rows):
        (workspace / f"{number}.jsonl").write_text(json.dumps(row) + "\n")
        words = ["generate", "--prompts", f"{number}.jsonl", "--max-new-tokens", "20", "--out", f"{number}-out.jsonl"]
        done = call(workspace, *words)
        assert done.code == 0, done.err
    [talk], [rated] = (_rows(workspace / f"{number}-out.jsonl") for number in (0, 1))
    assert talk.keys() == {"prompt", "response", "number", "ended"}
    assert talk["prompt"] == turns[:1]
    assert rated.keys() == {"prompt", "response", "number", "ended", "topic"}
    assert rated["response"] != "Wet."


@pytest.mark.parametrize("share", ["3/2", "²/4", "0/4", "2"])
def test_bad_share_is_refused(share: str) -> None:
    with pytest.raises(UserError, match=f"--share '{share}': expected I/N, as in 2/4"):
        use_commands._part(share)


def test_generate_refuses_an_out_file_of_another_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected a \.jsonl or \.parquet file"):
        shards.check_out_file(tmp_path / "a.txt")


def test_adapter_excludes_want(workspace: Path) -> None:
    demo = recipe.load(recipe.builtin()["demo"])
    with pytest.raises(UserError, match="--adapter excludes --weights and --want"):
        select_policy(workspace / "runs", demo, Screen(quiet=True), adapter=Path("x"), want="a=1")


def test_refused_generate_writes_nothing(workspace: Path) -> None:
    words = ["generate", "--prompts", "demo:pairs?rows=3", "--out", "a.jsonl"]
    for more, message in {
        ("--want", "helpfulness=1"): "`lora-align rsf` trains one",
        ("--endpoint", "http://localhost:1", "--want", "helpful=1"): "--endpoint excludes --want",
        (
            "--endpoint",
            "http://localhost:1",
            "-w",
            "helpful=1",
            "--model",
            "x",
        ): "--weights is the model",
    }.items():
        done = call(workspace, *words, *more)
        assert done.code == 2
        assert message in done.err
        assert not list(workspace.glob("a.*"))


def test_too_long_prompts_are_counted(workspace: Path) -> None:
    (workspace / "prompts.txt").write_text("Tell me about rain.\n" + "Tell me about rain. " * 200)
    done = call(workspace, "generate", "--prompts", "prompts.txt", "--adapter", "dpo/helpful/pos", "--out", "a.jsonl")
    assert done.code == 0, done.err
    assert "1 prompt left out: too long for the context" in done.out
    assert len(_rows(workspace / "a.jsonl")) == 1
