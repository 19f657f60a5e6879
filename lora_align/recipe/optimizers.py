"""The names of transformers' optimizers and the library each needs, found without importing any."""

import re
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

LIBRARIES = {  # part of an optimizer's name → library; all others need only torch or bitsandbytes
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
    """Return the optimizer names of the installed transformers; empty if its source has another layout.

    The names are read from the source file, because the import takes seconds.
    """
    package = find_spec("transformers")
    source = Path(package.origin).with_name("training_args.py") if package and package.origin else None
    if source is None or not source.is_file():
        return []
    _, _, behind = source.read_text(encoding="utf-8").partition("\nclass OptimizerNames(")
    return re.findall(r'^    [A-Z0-9_]+ = "(\w+)"', behind.partition("\n\n\n")[0], re.MULTILINE)


def missing_library(name: str) -> str:
    """Return the library that an optimizer needs if it is not installed; "" otherwise."""
    needed = next((library for part, library in LIBRARIES.items() if part in name), "")
    return needed if needed and find_spec(needed) is None else ""
