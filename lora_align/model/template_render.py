"""The process that `template_check` starts: render a chat template within limits."""

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

STATM = Path("/proc/self/statm")  # the memory of this process, on Linux
MEMORY = 1 << 30  # bytes, in addition to the imported libraries
SECONDS = 2  # of CPU time, in addition to the imports
LONGEST = 1 << 24  # characters of one conversation


def main() -> None:
    """Read a template and conversations from stdin. If rendering exceeds a limit, exit with the name of the fault.

    A TemplateError is no fault: some templates refuse a system message on purpose.
    """
    request = json.load(sys.stdin)
    try:
        import resource
    except ImportError:  # Windows: the caller's timeout is the only limit
        pass
    else:
        if STATM.exists():
            most = MEMORY + int(STATM.read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (most, most))
        seconds = SECONDS + math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    for conversation in request["conversations"]:
        for generation in (True, False):
            try:
                rendered: Any = render_jinja_template(
                    [conversation],
                    chat_template=request["template"],
                    add_generation_prompt=generation,
                    **request["variables"],
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
