"""What a person sees: results on stdout, everything else on stderr, and model text made inert."""

import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_align import processes

# C0 and C1 controls but tab and newline, DEL, and the marks that reorder or hide text.
_CONTROLS = frozenset(
    [*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
)
_VISIBLE = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in _CONTROLS - {0x09, 0x0A}}


def inert(text: str) -> str:
    """Text that cannot move a cursor, recolour a terminal or reorder a line."""
    return text.translate(_VISIBLE)


@dataclass(frozen=True)
class Screen:
    """The one way out: `result` to stdout, `note` and progress to stderr. Of several processes the first one has it."""

    as_json: bool = False
    quiet: bool = False

    def result(self, text: str, data: Mapping[str, Any]) -> None:
        """What the command was for: the text, or with --json the data as one object."""
        self._out(json.dumps(data, ensure_ascii=False, default=str) if self.as_json else text)

    def show(self, text: str) -> None:
        """A part of the result as soon as it is known; with --json the result itself holds it."""
        if not self.as_json:
            self._out(text)

    def note(self, text: str) -> None:
        """A line about what is going on."""
        if not self.quiet:
            self.say(text)

    def say(self, text: str) -> None:
        """What somebody asked for, on a terminal: not hidden by --quiet."""
        if processes.number() == 0:
            print(inert(text), file=sys.stderr, flush=True)  # noqa: T201

    def warn(self, text: str) -> None:
        """A line that --quiet does not hide."""
        self.say(f"warning: {text}")

    @contextmanager
    def progress(self, what: str, total: int | None, already: int = 0) -> Iterator["Progress"]:
        """Progress with rate and time left, where the total is known: a bar on a terminal, lines elsewhere.

        What was done `already`, in an earlier call, took no time in this one.
        """
        progress: Progress
        if self.quiet or processes.number():
            progress = Progress(what, total, already)
        elif sys.stderr.isatty():
            progress = _Bar(what, total, already)
        else:
            progress = _Lines(what, total, already)
        try:
            yield progress
        finally:
            progress.close()

    def _out(self, text: str) -> None:
        if processes.number() == 0:
            print(text, flush=True)  # noqa: T201


class Progress:
    """Counts towards a total; this one is silent."""

    def __init__(self, what: str, total: int | None, already: int) -> None:
        self.what, self.total, self.already, self.started = what, total, already, time.monotonic()

    def show(self, done: int, figures: Mapping[str, str]) -> None:
        """Say how far it is, with a few figures."""

    def close(self) -> None:
        """No more will follow."""

    def seconds_each(self, done: int) -> float:
        """At the rate so far."""
        return (time.monotonic() - self.started) / max(done - self.already, 1)


class _Lines(Progress):
    """A plain line every few seconds, and the last."""

    every = 5.0

    def __init__(self, what: str, total: int | None, already: int) -> None:
        super().__init__(what, total, already)
        self.said = self.started - (self.every if total else 0.0)

    def show(self, done: int, figures: Mapping[str, str]) -> None:
        now = time.monotonic()
        if done != self.total and now - self.said < self.every:
            return
        self.said = now
        counted = f"{done}/{self.total}" if self.total else f"{done:,}"
        parts = [f"{self.what}  {counted}", *(f"{name} {value}" for name, value in figures.items())]
        if done != self.total:
            each = self.seconds_each(done)
            parts += [rate(each), *([f"{clock(each * (self.total - done))} left"] if self.total else [])]
        print("  ".join(parts), file=sys.stderr, flush=True)  # noqa: T201


class _Bar(Progress):
    """A bar that redraws itself."""

    def __init__(self, what: str, total: int | None, already: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(what, total, already)
        self.bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=8),
            TextColumn("{task.completed}/{task.total} {task.fields[figures]}" if total else "{task.completed:,}"),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(stderr=True, highlight=False),
            transient=not total,
        )
        self.bar.start()
        self.task = self.bar.add_task(what, total=total, completed=already, figures="")

    def show(self, done: int, figures: Mapping[str, str]) -> None:
        text = " ".join(f"{name} {value}" for name, value in figures.items())
        if done != self.total:
            text = f"{text} {rate(self.seconds_each(done))}".strip()
        self.bar.update(self.task, completed=done, figures=text)

    def close(self) -> None:
        self.bar.stop()


def rate(seconds_each: float) -> str:
    """How fast it goes, in the figure people can hold: 250/s, 3.2/s, 4.1 s each."""
    if seconds_each > 1:
        return f"{seconds_each:.1f} s each"
    return f"{1 / max(seconds_each, 1e-9):.{0 if seconds_each < 0.1 else 1}f}/s"


def clock(seconds: float) -> str:
    """A duration as people say it: 45 s, 3 min 20 s, 2 h 05 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A plain aligned table; columns that are numbers for the most part to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    numbers = [2 * sum(map(_is_number, column)) > len(rows) for column in zip(*rows, strict=True)] or [False] * len(
        columns
    )

    def line(row: list[str]) -> str:
        cells = zip(row, widths, numbers, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells).rstrip()

    return "\n".join([line(columns), "  ".join("─" * w for w in widths), *(line(row) for row in rows)])


def _is_number(cell: str) -> bool:
    return bool(cell) and not any(map(str.isalpha, cell))


class _LogFile(logging.FileHandler):
    """A file that is made when there is something to say. A log that cannot be written must not end the work."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError as fault:
            print(f"cannot write {self.baseFilename}: {fault.strerror}", file=sys.stderr)  # noqa: T201


@contextmanager
def library_log(path: Path) -> Iterator[None]:
    """Send what libraries log and warn to a file, so that the screen stays ours and nothing is lost."""
    handler = _LogFile(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    level, before = root.level, list(root.handlers)
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    shown_before = warnings.showwarning
    logging.captureWarnings(True)
    try:
        yield
    finally:
        if warnings.showwarning is not shown_before:  # an outer log goes on capturing
            logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        handler.close()
