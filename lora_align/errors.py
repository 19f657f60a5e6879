"""The two ways a command fails, each told in one line: what, where, what to do."""


class UserError(Exception):
    """Refused before work began (exit 2). A message may hold several faults, a line each."""

    exit_code = 2


class NotFetchedError(UserError):
    """Data that is not here and could not be had."""


class RunFailedError(UserError):
    """Failed after work began (exit 1)."""

    exit_code = 1


class OutOfStepError(RunFailedError):
    """Failed in the middle of something all processes do together: they cannot be told, and end with this one."""


class Stopped(BaseException):
    """A signal asked for the end; 128 + its number is the exit code."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.exit_code = 128 + signal_number


def first_line(fault: BaseException) -> str:
    """What a library has to say, in one line; its kind where it says nothing."""
    return next((line for line in str(fault).splitlines() if line.strip()), type(fault).__name__).strip()


def nearest(word: str, known: list[str]) -> str:
    """`, did you mean 'x'?` when a known word is close, else nothing."""
    from difflib import get_close_matches

    match = get_close_matches(word, known, n=1)
    return f", did you mean {match[0]!r}?" if match else ""
