"""The optimizers that transformers has, by name, and the library each needs. Imports none of them."""

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = {  # by a part of the optimizer's name; the others need torch or bitsandbytes, which are always there
    "anyprecision": "torchdistx",
    "apollo": "apollo_torch",
    "galore": "galore_torch",
    "grokadamw": "grokadamw",
    "lomo": "lomo_optim",
    "npu": "torch_npu",
    "schedule_free": "schedulefree",
    "stable": "optimi",
    "torch_4bit": "torchao",
    "torch_8bit": "torchao",
    "xla": "torch_xla",
}


@lru_cache
def names() -> list[str]:
    """Return the names that the installed transformers gives its optimizers, none if they are not where they were.

    They are read from its source, because importing it takes seconds.
    """
    package = find_spec("transformers")
    source = Path(package.origin).with_name("training_args.py") if package and package.origin else None
    if source is None or not source.is_file():
        return []
    _, _, behind = source.read_text(encoding="utf-8").partition("\nclass OptimizerNames(")
    return re.findall(r'^    [A-Z0-9_]+ = "(\w+)"', behind.partition("\n\n\n")[0], re.MULTILINE)


def missing_library(name: str) -> str:
    """Return the library that an optimizer needs and that is not installed, or nothing."""
    needed = next((library for part, library in LIBRARIES.items() if part in name), "")
    return needed if needed and find_spec(needed) is None else ""
