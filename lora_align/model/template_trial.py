"""Render a chat template in a process of its own, within limits. A script: `template_check` runs it."""

import json
import sys
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

HELD = Path("/proc/self/statm")  # where Linux says how much memory a process has
MEMORY = 1 << 30  # bytes, beside what the libraries hold
SECONDS = 3  # of a processor
LONGEST = 1 << 24  # characters of one conversation


def main() -> None:
    """Read a template and conversations from stdin; exit with the name of what went wrong, if it is a matter of limits.

    What a template itself refuses is no matter of limits: not every one takes a system message.
    """
    asked = json.load(sys.stdin)
    try:
        import resource
    except ImportError:  # Windows: there the caller's clock is the only limit
        pass
    else:
        if HELD.exists():
            most = MEMORY + int(HELD.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    for conversation in asked["conversations"]:
        for generation in (True, False):
            try:
                rendered: Any = render_jinja_template(
                    [conversation],
                    chat_template=asked["template"],
                    add_generation_prompt=generation,
                    **asked["variables"],
                )
            except TemplateError:
                continue
            except (MemoryError, RecursionError, ArithmeticError) as fault:
                sys.exit(type(fault).__name__)
            except Exception:  # noqa: BLE001 - a template may fail on one conversation and hang on the next
                continue
            if len(rendered[0][0]) > LONGEST:
                sys.exit("Length")


if __name__ == "__main__":
    main()
