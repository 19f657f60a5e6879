"""`lora-align demo`, interrupted and started again."""

import json
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from matplotlib.image import imread

from support import COMMAND, PAIRS, Cli


@pytest.fixture
def interrupted_demo(trained: Path, tmp_path: Path) -> Path:
    """Return a folder in which the demo was interrupted after training. Its adapters saw fewer pairs than usual."""
    shutil.copytree(trained / "runs" / "dpo", tmp_path / "lora-align-demo" / "dpo")
    log = tmp_path / "interrupted.txt"
    with log.open("w") as stream:
        child = subprocess.Popen([str(COMMAND), "demo"], cwd=tmp_path, stdout=stream, stderr=subprocess.STDOUT)
    until = time.monotonic() + 200
    while "measuring" not in log.read_text() and time.monotonic() < until:
        time.sleep(0.2)
    child.send_signal(signal.SIGINT)
    assert child.wait(60) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    return tmp_path


def test_demo_resumes_and_prints_commands_that_work(cli: Cli, interrupted_demo: Path) -> None:
    done = cli("demo", "--json")
    assert done.code == 0, done.err
    assert done.err.count("already trained") == 4
    report = json.loads(done.out)
    assert [answer["words"] for answer in report["answers"]] == [len(a["answer"].split()) for a in report["answers"]]
    assert len({json.dumps(point["weights"]) for point in report["measured"]}) == len(report["measured"]) == 33
    assert all(0 <= point[name] <= 1 for point in report["measured"] for name in ("helpful", "harmless", "well_formed"))
    assert all(imread(interrupted_demo / picture).std() > 0 for picture in report["pictures"])
    assert len(report["next"]) == 5
    for line in report["next"]:
        words = shlex.split(line)
        assert words[0].endswith("lora-align")
        assert len("  lora-align " + shlex.join(words[1:])) <= 80, "a line to copy does not wrap"
        again = cli(*words[1:], *(PAIRS if words[1] == "dpo" else []), stdin="Tell me about bees.")
        assert again.code == 0, again.err
