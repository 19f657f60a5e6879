"""Time `eval` for 400 answers of at most 100 tokens on a real base.

Takes a base folder in Hugging Face form and a file of prompts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import save

COMMAND = str(Path(sys.executable).with_name("lora-align"))
PROMPTS, SAMPLES, TOKENS = 100, 4, 100


def main() -> None:
    """Measure the start policy once, from the shell, with an empty cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.toml"
        recipe.write_text(
            f"[base]\nmodel = {json.dumps(str(chosen.base.resolve()))}\n"
            f"[eval]\nprompts = {json.dumps(str(chosen.prompts.resolve()))}\n"
            f"count = {PROMPTS}\nsamples = {SAMPLES}\nmax_new_tokens = {TOKENS}\n"
        )
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "LORA_ALIGN_CACHE": str(Path(folder) / "cache")}
        began = time.perf_counter()
        command = [COMMAND, "eval", "start", "--recipe", str(recipe), "--json"]
        printed = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - began
    figures = {"answers": PROMPTS * SAMPLES, "tokens at most": TOKENS, "seconds": round(seconds)}
    save("eval_time", {**figures, "eval": json.loads(printed.stdout)})


if __name__ == "__main__":
    main()
