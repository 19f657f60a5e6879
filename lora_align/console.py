"""Terminal output: results on stdout, everything else on stderr, control characters escaped."""

import itertools
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lora_align import distributed
from lora_align.errors import CONTROLS, inert
from lora_align.line_wrapping import Wrapper, cell_width

_JSON = {code: f"\\u{code:04x}" for code in CONTROLS}
_COMMANDS = re.compile(r"(\S*`[^`\n]*`\S*)")


def write(text: str, stream: TextIO) -> None:
    """Print text with control characters escaped and, on a terminal, lines broken between words."""
    lines = Wrapper(_columns(stream))
    pieces = [
        lines.put(part) if command else lines.feed(part) + lines.flush()
        for part, command in zip(_COMMANDS.split(inert(text)), itertools.cycle([False, True]), strict=False)
    ]
    stream.write("".join(pieces) + "\n")
    stream.flush()


def _columns(stream: TextIO) -> int:
    """Return the width of a stream's terminal; 0 for a pipe, a file or an unknown width."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else 0
    except OSError:
        return 0


@dataclass(frozen=True)
class Screen:
    """All output of a command: results to stdout, notes and progress to stderr. Only rank 0 prints."""

    as_json: bool = False
    quiet: bool = False

    def result(self, text: str, data: Mapping[str, Any]) -> None:
        """Print the command's result: the text, or with --json the data as one object."""
        if not self.as_json:
            self._out(text)
        elif distributed.rank() == 0:  # one line, which `write` would wrap
            print(json.dumps(data, ensure_ascii=False, default=str).translate(_JSON), flush=True)  # noqa: T201

    def show(self, text: str) -> None:
        """Print a part of the result early. With --json print nothing, because `result` prints the whole."""
        if not self.as_json:
            self._out(text)

    def note(self, text: str) -> None:
        """Print a line about progress, unless --quiet."""
        if not self.quiet:
            self.say(text)

    def loading(self, base: str) -> None:
        """Announce the import of libraries and the loading of the base, which take some seconds."""
        self.note(f"loading libraries and the base {base} …")

    def say(self, text: str) -> None:
        """Print a line to stderr, even with --quiet."""
        if distributed.rank() == 0:
            write(text, sys.stderr)

    def warn(self, text: str) -> None:
        """Print a warning, even with --quiet."""
        self.say(f"warning: {text}")

    @contextmanager
    def progress(self, title: str, total: int | None, already: int = 0) -> Iterator["Progress"]:
        """Show progress with rate and, if the total is known, time left: a bar on a terminal, lines elsewhere.

        `already` is the number of items that earlier calls did; the rate excludes them.
        """
        progress: Progress
        if self.quiet or distributed.rank():
            progress = Progress(title, total, already)
        elif sys.stderr.isatty():
            progress = _Bar(title, total, already)
        else:
            progress = _Lines(title, total, already)
        try:
            yield progress
        finally:
            progress.close()

    @contextmanager
    def streaming(self) -> Iterator[Callable[[str], None]]:
        """Yield a function that prints pieces of a result as they come; end the line at exit."""
        lines, out = Wrapper(_columns(sys.stdout)), sys.stdout

        def show(piece: str) -> None:
            out.write(lines.feed(inert(piece)))
            out.flush()

        yield show
        out.write(lines.flush() + "\n")
        out.flush()

    def _out(self, text: str) -> None:
        if distributed.rank() == 0:
            write(text, sys.stdout)


class Progress:
    """Progress towards a total. This base class prints nothing."""

    def __init__(self, title: str, total: int | None, already: int) -> None:
        self.title, self.total, self.already, self.started = title, total, already, time.monotonic()

    def show(self, done: int, figures: Mapping[str, str]) -> None:
        """Show the number done and some figures."""

    def close(self) -> None:
        """End the display."""

    def seconds_each(self, done: int) -> float:
        """Return the mean seconds per item so far."""
        return (time.monotonic() - self.started) / max(done - self.already, 1)


class _Lines(Progress):
    """Print a line every few seconds, and at the end."""

    every = 5.0

    def __init__(self, title: str, total: int | None, already: int) -> None:
        super().__init__(title, total, already)
        self.printed = self.started - (self.every if total else 0.0)
        self.doing = ""

    def show(self, done: int, figures: Mapping[str, str]) -> None:
        now, doing = time.monotonic(), figures.get("now", "")
        if done != self.total and now - self.printed < self.every and doing == self.doing:
            return
        self.printed, self.doing = now, doing
        counted = f"{done:,}/{self.total:,}" if self.total else f"{done:,}"
        parts = [f"{self.title}  {counted}", *(f"{name} {value}" for name, value in figures.items())]
        if self.already < done != self.total:
            each = self.seconds_each(done)
            parts += [rate(each), *([f"{clock(each * (self.total - done))} left"] if self.total else [])]
        write("  ".join(parts), sys.stderr)


class _Bar(Progress):
    """Draw a bar with rich."""

    width = 8
    time_left = 8  # cells of 12:34:56

    def __init__(self, title: str, total: int | None, already: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__(inert(title), total, already)
        self.bar = RichProgress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=self.width),
            TextColumn("{task.fields[counted]}", markup=False),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=Console(stderr=True, highlight=False),
            transient=not total,
        )
        self.bar.start()
        self.task = self.bar.add_task("", total=total, completed=already, counted="")
        self._update(already, [])

    def show(self, done: int, figures: Mapping[str, str]) -> None:
        parts = [inert(f"{name} {value}") for name, value in figures.items()]
        self._update(done, [rate(self.seconds_each(done)), *parts] if self.already < done != self.total else parts)

    def _update(self, done: int, parts: list[str]) -> None:
        """Redraw the bar with as many figures as fit on the line, in their order."""
        counted = f"{done:,}/{self.total:,}" if self.total else f"{done:,}"
        width = self.bar.console.width - self.width - self.time_left - 3
        title_width = width - len(counted)
        title = self.title if cell_width(self.title) <= title_width else f"{self.title[: max(title_width - 1, 0)]}…"
        texts = itertools.accumulate([counted, *parts], "{} {}".format)
        fitting = [text for text in texts if text == counted or cell_width(title + text) <= width]
        self.bar.update(self.task, description=title, completed=done, counted=fitting[-1])

    def close(self) -> None:
        self.bar.stop()


def rate(seconds_each: float) -> str:
    """Format a rate: 250/s, 3.2/s, 4.1 s each."""
    if seconds_each > 1:
        return f"{seconds_each:.1f} s each"
    return f"{1 / max(seconds_each, 1e-9):.{0 if seconds_each < 0.1 else 1}f}/s"


def clock(seconds: float) -> str:
    """Format a duration: 45 s, 3 min 20 s, 2 h 05 min, 3 days."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes >= 48 * 60:
        return f"{round(minutes / (24 * 60))} days"
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(number: int, noun: str) -> str:
    """Format a number with its noun: `1 pair`, `1,024 pairs`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


LONG_WORD = 24  # columns; a longer word may be broken to make a table fit


def table(columns: list[str], rows: list[list[str]], width: int = 0) -> str:
    """Format an aligned table; columns with mostly numbers are right-aligned.

    Cells are wrapped, so that the table fits into `width`, by default the terminal's. Elsewhere, no cell is wrapped.
    """
    columns, *rows = [[inert(cell).replace("\n", "\\n") for cell in row] for row in [columns, *rows]]
    widths = [max(cell_width(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    numbers = [2 * sum(_is_number(row[i]) for row in rows) > len(rows) for i in range(len(columns))]
    width = width or _columns(sys.stdout)
    if width and sum(widths) + 2 * (len(widths) - 1) > width:
        widths = _narrowed(widths, [columns, *rows], width - 2 * (len(widths) - 1))

    def lines(row: list[str]) -> list[str]:
        wrapped = [_wrapped(cell, space) for cell, space in zip(row, widths, strict=True)]
        made = []
        for parts in itertools.zip_longest(*wrapped, fillvalue=""):
            gaps = [" " * (space - cell_width(part)) for part, space in zip(parts, widths, strict=True)]
            cells = zip(parts, gaps, numbers, strict=True)
            made.append("  ".join(gap + part if right else part + gap for part, gap, right in cells).rstrip())
        return made

    ruler = "  ".join("─" * w for w in widths)
    return "\n".join([*lines(columns), ruler, *itertools.chain.from_iterable(map(lines, rows))])


def _narrowed(widths: Sequence[int], rows: Sequence[Sequence[str]], space: int) -> list[int]:
    """Narrow the widest columns until all fit into the space, but none below its longest word or LONG_WORD."""
    narrowed = list(widths)
    longest = [max(cell_width(word) for row in rows for word in _words(row[i])) for i in range(len(widths))]
    while sum(narrowed) > space:
        wide = [i for i, width in enumerate(narrowed) if width > min(longest[i], LONG_WORD)]
        if not wide:
            break
        narrowed[max(wide, key=narrowed.__getitem__)] -= 1
    return narrowed


def _words(cell: str) -> list[str]:
    """Split a cell where it may be wrapped: at spaces outside brackets, so that an interval stays whole."""
    return re.findall(r"\([^()]*\)|[^ ]+", cell) or [""]


def _wrapped(cell: str, width: int) -> list[str]:
    """Wrap a cell. A word that is too long is broken."""
    if cell_width(cell) <= width:
        return [cell]
    from rich.cells import chop_cells

    parts = [""]
    for word in _words(cell):
        if parts[-1] and cell_width(parts[-1]) + 1 + cell_width(word) <= width:
            parts[-1] += f" {word}"
            continue
        parts += chop_cells(word, width)
    return parts[1:]


def _is_number(cell: str) -> bool:
    return bool(cell) and not any(map(str.isalpha, cell))


class _LogFile(logging.FileHandler):
    """Create the log file with its first record. A log that cannot be written does not end the work."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            super().emit(record)
        except OSError as fault:
            write(f"cannot write the log {self.baseFilename}: {fault.strerror}; the command continues", sys.stderr)


@contextmanager
def library_log(path: Path) -> Iterator[None]:
    """Send log records and warnings of libraries to a file instead of the screen."""
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
        if warnings.showwarning is not shown_before:  # an outer `library_log` still captures warnings
            logging.captureWarnings(False)
        root.handlers[:] = before
        root.setLevel(level)
        handler.close()
