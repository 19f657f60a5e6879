"""Exceptions that a command reports as one message, each with its exit code.

A message says in one line what happened, where, and what to do.
"""


class UserError(Exception):
    """The command was refused before it began (exit code 2). A message may list several faults, one per line."""

    exit_code = 2


class NotFetchedError(UserError):
    """Data is not in the cache and could not be fetched."""


class RunFailedError(UserError):
    """The command failed after it began (exit code 1)."""

    exit_code = 1


class OutOfStepError(RunFailedError):
    """One process failed inside a collective operation. It cannot tell the other processes; they end with it."""


class Stopped(BaseException):
    """A signal stopped the command; the exit code is 128 + its number."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def first_line(fault: BaseException) -> str:
    """Return the first line of an exception's message, or its class name if the message is empty."""
    return next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__).strip()


def nearest(word: str, known: list[str]) -> str:
    """Return `, did you mean 'x'?` if a known word is close, else ""."""
    from difflib import get_close_matches

    match = get_close_matches(word, known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""
