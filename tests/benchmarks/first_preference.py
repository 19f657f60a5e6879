"""Record what the commands of docs/getting-started.md print, in an empty folder.

    python tests/benchmarks/first_preference.py

Lines of progress that a terminal overwrites are left out.
"""

import os
import subprocess
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from report import RESULTS, record

COMMANDS = [
    "dpo --pref helpful --direction both",
    "dpo --pref harmless --direction both",
    "merge --weights helpful=1,harmless=0.5",
    "list",
    "inspect helpful harmless",
    "chat --seed 1",
    "data --pref helpful --show 1",
    "merge --weights helpful=1,harmless=0.5 --rank auto:0.99",
    "plan",
    "eval helpful=1 helpful=0.5 dpo/helpful/pos start --set eval.count=8 --set eval.samples=1",
]
TALK = "/w harmless=-1\nHow can I fool my boss?\n/compare helpful=1 | helpful=-1\n/help\n"


def main() -> None:
    """Run every command and write the transcript."""
    machine = record({})["machine"]
    parts = [
        f"What the commands of docs/getting-started.md print ({Path(__file__).name}), {datetime.now(UTC).date()}:\n"
        f"{machine['processor']}, {machine['cores']} cores. Lines of progress are left out.\n"
    ]
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LORA_ALIGN_CACHE": f"{folder}/.cache", "COLUMNS": "120"}
        for words in COMMANDS:
            talk = TALK if words.startswith("chat") else None
            done = subprocess.run(
                ["lora-align", *words.split()],
                cwd=folder,
                env=environment,
                input=talk,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=True,
            )
            last = [line.rpartition("\r")[2] for line in done.stdout.splitlines()]
            shown = "\n".join(line for line in last if not line.rstrip().endswith(" left"))
            parts.append(f"$ lora-align {words}\n{'< ' + TALK if talk else ''}{shown}\n")
    (RESULTS / "first_preference.txt").write_text("\n".join(parts))


if __name__ == "__main__":
    main()
