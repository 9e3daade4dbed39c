"""How a program ends: the errors that its user can cause, each with one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LEFT_OUT, IMPOSSIBLE, DIVERGED, STOPPED, INTERRUPTED = 1, 2, 3, 3, 130  # exit codes
KEPT = "what is finished is kept"


class UserError(RuntimeError):
    """What the user can mend; the message is one line that says what is wrong and what to do."""


class RunError(UserError):
    """A run's folder cannot be used as asked."""


class DataError(UserError):
    """A data set is missing or damaged."""


class ProcessError(UserError):
    """The processes cannot go on together."""


class OptionError(UserError):
    """An option is impossible, or impossible beside others."""


def program() -> str:
    """The running program's name, as in its command."""
    path = Path(sys.argv[0])
    return f"python -m {path.parent.name}" if path.name == "__main__.py" else path.name


def report(message: object) -> None:
    """A line on stderr, behind the program's name."""
    print(f"{program()}: {message}", file=sys.stderr)


def one_line(text: str) -> str:
    """A text on one line; what cannot be printed as an escape sequence."""
    signs = " ".join(text.split())
    return "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in signs)


@contextmanager
def boundary(kept: str = KEPT, code: int = 1) -> Iterator[None]:
    """Around a program, or its decorator: an error that the user can mend ends it with one line.

    Exit codes: 2 for an OptionError, `code` for every other UserError and OSError, 3 where the loss is not
    finite, 130 for Ctrl-C, where the line ends in `kept`. Of several processes the first one alone reports
    what strikes all. In Python's development mode (`python -X dev`) errors keep their traceback.
    """
    rank, processes = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    first = processes == 1 or rank == 0
    try:
        yield
    except FloatingPointError as error:
        if first:
            report(error)
        sys.exit(DIVERGED)
    except (UserError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        message = str(error)
        if isinstance(error, OSError) and error.filename:
            message = f"{error.filename} cannot be used ({error.strerror}): take another"
        report(f"process {rank}: {message}" if processes > 1 else message)
        sys.exit(IMPOSSIBLE if isinstance(error, OptionError) else code)
    except KeyboardInterrupt:
        if first:
            print(file=sys.stderr)
            report(f"interrupted; {kept}")
        sys.exit(INTERRUPTED)
