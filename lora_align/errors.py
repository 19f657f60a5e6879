"""Exceptions that a command reports as one message, each with its exit code.

A message says in one line for each fault what happened, where, and what to do. Messages may quote files of other
people, so control characters in them are escaped.
"""

# C0 and C1 controls, DEL, marks that reorder or hide text, and unpaired surrogates. Tab and newline are not escaped.
CONTROLS = {*range(0x20), *range(0x7F, 0xA0), 0x061C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)}
CONTROLS = (CONTROLS | {*range(0xD800, 0xE000)}) - {0x09, 0x0A}
_VISIBLE = {code: f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" for code in CONTROLS}


def inert(text: str) -> str:
    """Escape control characters, so that text cannot move a cursor, recolour a terminal or reorder a line."""
    return text.translate(_VISIBLE)


class UserError(Exception):
    """The command was refused before it began (exit code 2). A message may list several faults, one per line."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(inert(message))


class NotFetchedError(UserError):
    """Data or a base is not in the cache and could not be fetched."""


class RunFailedError(UserError):
    """The command failed after it began (exit code 1)."""

    exit_code = 1


class OutOfStepError(RunFailedError):
    """One process failed inside a collective operation. The launcher ends the other processes."""


class Stopped(BaseException):
    """A signal stopped the command. The exit code is 128 plus its number. `has_checkpoint`: a run can be resumed."""

    def __init__(self, signal_number: int, *, has_checkpoint: bool = False) -> None:
        super().__init__(signal_number)
        self.exit_code, self.has_checkpoint = 128 + signal_number, has_checkpoint


def first_line(fault: BaseException) -> str:
    """Return the first non-empty line of an exception's message, or the exception's class name."""
    return next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__).strip()


def closest(word: str, known: list[str]) -> str:
    """Return the known word that a mistyped word resembles, or ""."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word, known, n=1)), "")


def nearest(word: str, known: list[str]) -> str:
    """Return `, did you mean 'x'?` if a known word is close, else ""."""
    match = closest(word, known)
    return f", did you mean {match!r}?" if match else ""
