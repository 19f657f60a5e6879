"""Make the page of `sweep` on a real trained Llama: 260,032 parameters that write small stories.

The pairs are the base's own stories, two to each beginning. They are ranked by length and by a reward model that was
trained to count quotations. Every step is a command that a user could type. The page goes to evidence/stories.html.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

from pyarrow.parquet import read_table
from report import once, save

from lora_align.metrics import intervals

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ bos_token }}{% endif %}{% endfor %}"
)
RECIPE = """
about = "stories of a Llama of 260,032 parameters"

[base]
model = "{model}"
chat_template = "{template}"

[lora]
rank = 8
alpha = 16

[preferences.brief]
data = "scored.jsonl"
rank = "shorter"
margin = 100

[preferences.talkative]
data = "scored.jsonl"
rank = "score:speech"
margin = 15

[dpo]
beta = 0.3
learning_rate = 1.2e-3
max_length = 400
limit = 600

[reward.ratings.stories]
data = "rated.jsonl"

[reward]
learning_rate = 3e-3
max_length = 400

[eval]
prompts = "fresh.txt"
text = "text.txt"
max_new_tokens = 320
count = 48
samples = 2
pairs = 64
"""
WHO = {
    "little girl": ("She", ("Lily", "Sue", "Mia", "Amy")),
    "little boy": ("He", ("Tim", "Tom", "Ben", "Sam")),
    "big dog": ("He", ("Max", "Spot", "Rex", "Bob")),
    "small bird": ("She", ("Kiki", "Tweety", "Lulu", "Bella")),
}
STARTS = (
    "Once upon a time, there was a {who} named {name}. {they}",
    "One day, a {who} named {name} went to the park. {they}",
    "There was a {who}. The {who} was called {name}. {they}",
)
GOES_ON = (
    "liked to",
    "saw a",
    "wanted",
    "was very",
    "had a",
    "did not",
    "found a",
    "and a friend",
    "said",
    "was playing",
)
STORIES, LONGEST = 4, 320  # stories for each beginning, and their largest number of tokens
ORDINARY = 20  # one story in this many is ordinary text, which is not trained on
SPEECH = re.compile(r'"[^"]+"')
NAME = "stories"
TOLD = ("reward: speech", "words", "ended", "distinct", "KL", "text loss")
GRID = ["brief=-1:1:0.5", "talkative=-1:1:0.5"]


def beginnings() -> tuple[list[str], list[str]]:
    """Return beginnings for training, and fresh beginnings."""
    made = [
        f"{start.format(who=who, name=name, they=they)} {on}"
        for start, (who, (they, names)), on in itertools.product(STARTS, WHO.items(), GOES_ON)
        for name in names
    ]
    return [text for i, text in enumerate(made) if i % 6], made[::6]


def command(folder: Path, *words: str) -> dict[str, Any]:
    """Return a command's JSON output."""
    line = [sys.executable, "-m", "lora_align", *words, "--json", "--quiet"]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def told(folder: Path) -> dict[str, Any]:
    """Sample stories for every beginning, rate them and write pairs."""
    learned, fresh = beginnings()
    (folder / "learned.txt").write_text("\n".join(learned) + "\n")
    (folder / "fresh.txt").write_text("\n".join(fresh) + "\n")
    (folder / "stories.jsonl").unlink(missing_ok=True)
    words = ["generate", "--prompts", "learned.txt", "--out", "stories.jsonl", "-n", str(STORIES)]
    command(folder, *words, "--max-new-tokens", str(LONGEST))
    stories = [json.loads(line) for line in (folder / "stories.jsonl").read_text().splitlines()]
    whole = [row for row in stories if row["ended"]]
    ordinary, ended = whole[::ORDINARY], [row for i, row in enumerate(whole) if i % ORDINARY]
    rated = [{**_prompt_and_response(row), "speech": min(len(SPEECH.findall(row["response"])), 4)} for row in ended]
    pairs = []
    for prompt, some in itertools.groupby(ended, key=lambda row: row["prompt"]):
        texts = [row["response"] for row in some]
        pairs += [{"prompt": prompt, "chosen": one, "rejected": other} for one, other in itertools.pairwise(texts)]
    _write(folder / "rated.jsonl", rated)
    _write(folder / "pairs.jsonl", pairs)
    (folder / "text.txt").write_text("\n".join(row["response"].replace("\n", " ") for row in ordinary) + "\n")
    return {"stories": len(stories), "ended by themselves": len(whole), "pairs": len(pairs)}


def _prompt_and_response(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in ("prompt", "response")}


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def judged(folder: Path) -> dict[str, Any]:
    """Train the reward model, and score all pairs with it."""
    made = command(folder, "reward", "--force")
    (folder / "scored.jsonl").unlink(missing_ok=True)
    command(folder, "score", "--data", "pairs.jsonl", "--out", "scored.jsonl")
    heads: dict[str, Any] = made["metrics"]["held_out"]["heads"]["speech"]
    return {name: heads[name] for name in ("spearman", "rated")}


def trained(folder: Path) -> list[dict[str, Any]]:
    """Train both directions of both preferences."""
    made = command(folder, "dpo", "--all", "--force")
    return [{**run["metrics"]["held_out"], "run": Path(run["path"]).as_posix()} for run in made["runs"]]


def swept(folder: Path) -> dict[str, dict[str, list[float]]]:
    """Run the grid; return each point's figures with intervals, and its mean number of quotations.

    The page of the sweep is copied.
    """
    report = folder / "runs" / "sweep" / NAME
    command(folder, "sweep", *GRID, "--also", "base", "--by", "reward", "--name", NAME, "--force")
    page = (report / "report.html").read_text(encoding="utf-8")
    where = json.loads((report / "manifest.json").read_text())["base"]["model"]
    published = Path(__file__).parent / "evidence" / "stories.html"
    published.write_text(page.replace(where, Path(where).name), encoding="utf-8")
    points = json.loads((report / "points.json").read_text())
    figures = {point["policy"]: {name: _mean(point["figures"][name]) for name in TOLD} for point in points}
    stories = read_table(report / "answers.parquet").to_pylist()
    for contestant, of in figures.items():
        own = [row for row in stories if row["policy"] == contestant]
        spoken = [float(len(SPEECH.findall(row["answer"]))) for row in own]
        of["quotations, counted"] = _mean(asdict(intervals.mean(spoken, [row["prompt"] for row in own])))
    return figures


def _mean(figure: Mapping[str, float]) -> list[float]:
    return [round(figure[name], 3) for name in ("value", "low", "high")]


def main() -> None:
    """Run all steps in turn; a stopped run continues where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("stories"))
    work = parser.parse_args().work.resolve()
    folder = work / "project"
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["LORA_ALIGN_CACHE"] = str(work / "cache")
    model = Path(os.environ["LORA_ALIGN_REAL_DATA"]).resolve() / "stories260k"
    (folder / "lora-align.toml").write_text(RECIPE.format(model=model, template=TEMPLATE))
    began = time.perf_counter()
    figures = {
        item.__name__: once(work, item.__name__, lambda item=item: item(folder))
        for item in (told, judged, trained, swept)
    }
    save("stories", {**figures, "seconds of what was not there": round(time.perf_counter() - began)})


if __name__ == "__main__":
    main()
