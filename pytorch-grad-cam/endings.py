"""How the scripts that draw and compare maps end: with one line, whatever comes in between."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from dlrt import cli
from dlrt.records import RunError

LEFT_OUT, STOPPED = 1, 3  # exit codes: a picture could not be read; the work could not go on
KEPT = "what is finished is kept"


@contextlib.contextmanager
def told(parser: cli.Parser) -> Iterator[None]:
    """Ctrl-C ends the program with 130, and what is in the way of its work with 3, both with a line."""
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f"\n{parser.prog}: interrupted; {KEPT}\n")
    except (RunError, OSError) as error:
        parser.exit(STOPPED, f"{parser.prog}: {error}\n")
