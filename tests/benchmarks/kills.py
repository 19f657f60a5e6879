"""Kill two hundred writers of shards at random moments, and count lost, repeated and damaged rows."""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import save

from lora_align.data import shards

KILLS, ROWS, BATCH = 200, 2000, 10
WRITER = f"""
import sys
from pathlib import Path
from lora_align.data import shards
with shards.opened(Path(sys.argv[1])) as store:
    done = store.keys()
    todo = [i for i in range({ROWS}) if str(i) not in done]
    for start in range(0, len(todo), {BATCH}):
        store.append([{{"key": str(i), "text": "word " * (i % 50)}} for i in todo[start : start + {BATCH}]])
        print(start, flush=True)
"""


def main() -> None:
    """Kill writers until the number is reached, and count. A finished folder is replaced by a new one."""
    draw = random.Random(0)
    kills = lost = repeated = damaged = 0
    while kills < KILLS:
        with tempfile.TemporaryDirectory() as name:
            while kills < KILLS:
                words = [sys.executable, "-c", WRITER, name]
                child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
                assert child.stdout is not None
                before = len(list(shards.Shards(Path(name)).rows()))
                reported = sum(1 for _, line in zip(range(draw.randint(1, 40)), child.stdout, strict=False) if line)
                time.sleep(draw.random() * 0.02)
                child.kill()
                child.communicate()
                rows = list(shards.Shards(Path(name)).rows())
                kills += 1
                lost += max(0, min(before + reported * BATCH, ROWS) - len(rows))
                repeated += len(rows) - len({row["key"] for row in rows})
                damaged += sum(row["text"] != "word " * (int(row["key"]) % 50) for row in rows)
                if len(rows) == ROWS:
                    break
    figures = {"kills": kills, "rows lost once said": lost, "rows repeated": repeated, "rows damaged": damaged}
    save("kills", {**figures, "rows a batch": BATCH})


if __name__ == "__main__":
    main()
