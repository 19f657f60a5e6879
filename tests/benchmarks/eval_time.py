"""Time `eval` for 400 answers of at most 100 tokens on a real base, and profile the sampling of some of them.

Takes a base, a folder or a GGUF file, and a file of prompts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from report import save

from lora_align import recipe
from lora_align.data.rows import Message
from lora_align.model import base as bases
from lora_align.model import batch_sampling
from lora_align.model.sampler_protocol import Sampling

COMMAND = str(Path(sys.executable).with_name("lora-align"))
PROMPTS, SAMPLES, TOKENS, ROWS = 100, 4, 100, 80


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
    profile = shares_of_sampling(str(chosen.base.resolve()))
    save("eval_time", {**figures, "eval": json.loads(printed.stdout), "shares of the time of sampling": profile})


def shares_of_sampling(model: str) -> dict[str, float]:
    """Sample ROWS answers to one prompt. Return the shares of the base's passes, of picking tokens, and of the rest."""
    base = bases.find(recipe.Base(model))
    loaded = base.load()
    spent: dict[str, float] = {}

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = work(*given, **options)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
            return result

        return run

    loaded.forward = timed("passes of the base", loaded.forward)
    batch_sampling._pick = timed("picking", batch_sampling._pick)
    prompt = base.chat.prompt_ids([Message("user", "Tell me about rain.")])
    began = time.perf_counter()
    list(batch_sampling.sample(loaded, base, [prompt], ROWS, Sampling(1.0, 1.0, TOKENS, 0)))
    whole = time.perf_counter() - began
    shares = {name: round(seconds / whole, 3) for name, seconds in spent.items()}
    return {**shares, "rest": round(1 - sum(shares.values()), 3)}


if __name__ == "__main__":
    main()
