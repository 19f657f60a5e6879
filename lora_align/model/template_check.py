"""Check in a separate process that a chat template renders within limits of time and memory."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_align import store
from lora_align.errors import UserError

RENDER = Path(__file__).with_name("template_render.py")
TIMEOUT = 30.0  # seconds, the start of Python included; the process itself limits its CPU time
FAULTS = {
    "MemoryError": "takes more than 1 GiB of memory",
    "RecursionError": "recurses without end",
    "ZeroDivisionError": "divides by zero",
    "OverflowError": "computes numbers that are too large",
    "Length": "renders more than 16 million characters",
}
ROLES = ("user", "assistant")
TURNS = 41  # messages of the longest test conversation; some templates fail only on long ones


def check_template(template: str, variables: Mapping[str, Any], whose: str) -> None:
    """Refuse a template that loops, recurses, divides by zero or takes too much memory. A success is cached."""
    long = [{"role": ROLES[turn % 2], "content": f"What is {turn}?"} for turn in range(TURNS)]
    system = [{"role": "system", "content": "Be brief."}]
    talks = [*(long[:turns] for turns in (1, 2, 3)), long, [*system, *long[:2]], [*system, *long[:3]]]
    request = {"template": template, "variables": variables, "conversations": talks}
    text = json.dumps(request, default=str)
    known = store.cache_folder() / "templates" / hashlib.sha256(text.encode()).hexdigest()
    if known.exists():
        return
    try:
        words = [sys.executable, "-P", str(RENDER)]
        done = subprocess.run(words, input=text, capture_output=True, text=True, encoding="utf-8", timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        why = "does not end"
    else:
        fault = done.stderr.strip().rpartition("\n")[2]  # the last line, after warnings of libraries
        why = ""
        if done.returncode < 0:  # ended by the limit of CPU time
            why = "does not end"
        elif done.returncode:
            why = FAULTS.get(fault, f"fails ({fault})")
    if why:
        raise UserError(
            f"{whose} {why} (tested on conversations of up to {TURNS} messages); give another one in the recipe: "
            "base.chat_template"
        )
    with store.new_file(known) as empty:
        empty.touch()
