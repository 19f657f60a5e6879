"""Run the command in a process forked from one that has loaded its libraries.

The code is the same, without seconds of imports. Tests of the program's start, signals and terminal run the installed
program itself.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

LOADED = ("matplotlib.pyplot", "pyarrow.parquet", "lora_align.cli", "lora_align.demo.story", "lora_align.rsf.loop")
MATCH_SECONDS = 300.0  # seconds

os.environ["PYTHONSAFEPATH"] = "1"  # test the installed package, not the current folder
os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # a forked process may have no thread but its own
_loaded = multiprocessing.get_context("forkserver")
_loaded.set_forkserver_preload([*LOADED])


def run(program: Path, cwd: Path, words: Sequence[str], stdin: str) -> tuple[int, str, str]:
    """Run the command; return its exit code, stdout and stderr."""
    with TemporaryDirectory() as folder:
        streams = tuple(Path(folder) / name for name in ("in", "out", "err"))
        streams[0].write_text(stdin, encoding="utf-8")
        child = _loaded.Process(target=_obey, args=([str(program), *words], cwd, dict(os.environ), streams))
        child.start()
        child.join(MATCH_SECONDS)
        if child.exitcode is None:
            child.kill()
            child.join(30)
        assert child.exitcode is not None, f"{words} does not end"
        out, err = (stream.read_text(encoding="utf-8") if stream.exists() else "" for stream in streams[1:])
        return child.exitcode, out, err


def _obey(words: list[str], cwd: Path, environment: Mapping[str, str], streams: Sequence[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDWR | os.O_CREAT), number)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - open until the process ends
    sys.argv = words
    from lora_align.cli import main

    main()
