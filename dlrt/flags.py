"""Flags of a program: what their values must be, and a parser whose every mistake costs one line."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from dlrt.errors import IMPOSSIBLE


def _literal(text: str) -> int | float | str:
    """A number where the text is one: an int without a point."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


@dataclass(frozen=True)
class Kind:
    """What a value must be. An argparse type, which reads text; `check` takes the value itself."""

    what: str
    holds: Callable[[Any], bool]
    read: Callable[[str], Any] = _literal
    type: Callable[[Any], Any] = lambda value: value

    def __call__(self, text: str) -> Any:
        return self.check(self.read(text))

    def check(self, value: Any) -> Any:
        """The value; ArgumentTypeError where it is none of this kind."""
        if not self.holds(value):
            shown = ascii(value)[:60] if isinstance(value, str) else value
            raise argparse.ArgumentTypeError(f"must be {self.what}, got {shown}")
        return self.type(value)


def number(kind: type, interval: str) -> Kind:
    """The ints or floats in an interval such as "[0, 1)"."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    kinds = (int,) if kind is int else (int, float)

    def holds(value: Any) -> bool:
        inside = type(value) in kinds and low <= value <= high
        return inside and (value != low or "[" in interval) and (value != high or "]" in interval)

    return Kind(f"a {'whole ' if kind is int else ''}number in {interval}", holds, type=kind)


def _is_folder_name(text: Any) -> bool:
    one = isinstance(text, str) and text not in ("", ".", "..") and Path(text).name == text
    return one and text.isprintable() and len(text.encode()) <= 200


NATURAL, COUNT = number(int, "[1, inf)"), number(int, "[0, inf)")
TOLERANCE, POSITIVE = number(float, "[0, 1)"), number(float, "(0, inf)")
SHARE, NOT_NEGATIVE = number(float, "(0, 1]"), number(float, "[0, inf)")
SEED = number(int, "[0, 4294967295]")
RANK = Kind(
    "a whole number from 1 on, or a share with a point in (0, 1]",
    lambda value: NATURAL.holds(value) or (isinstance(value, float) and SHARE.holds(value)),
)
MAX_RANK = Kind(
    "a whole number from 1 on, or initial", lambda value: value == "initial" or NATURAL.holds(value)
)
PERCENT = Kind("a percentage in [1, 100), 75 and not 0.75", number(float, "[1, 100)").holds, type=float)
FOLDER_NAME = Kind(
    "the name of one folder, at most 200 bytes of printable characters (--output-dir says where it goes)",
    _is_folder_name,
    read=str,
)


def device(text: str) -> str:
    """An argparse type: a device that torch has here."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text} cannot be used here ({reason}); cpu always can") from error
    return text


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake costs one line and not the whole usage, and no output stops the program."""

    def parse_known_args(self, *args: Any, **options: Any) -> Any:
        for name in ("stdout", "stderr"):
            _never_stops(name)
        return super().parse_known_args(*args, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(IMPOSSIBLE, f"{self.prog}: {message} (--help lists all options)\n")


class _Pipe(io.FileIO):
    """Output of which the rest is dropped once nobody reads it any more, as with `| head`."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(data)


def _never_stops(name: str) -> None:
    """Replace what sys.stdout or sys.stderr cannot encode, and let a pipe be closed at its other end."""
    stream = getattr(sys, name)
    if not isinstance(stream, io.TextIOWrapper):  # a notebook's
        return
    stream.reconfigure(errors="replace")
    if stream is getattr(sys, f"__{name}__") and not stream.isatty():
        stream.flush()
        pipe = io.BufferedWriter(_Pipe(stream.fileno(), "w", closefd=False))
        lines = stream.line_buffering or stream.write_through
        setattr(sys, name, io.TextIOWrapper(pipe, stream.encoding, "replace", line_buffering=lines))


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and every default that says something.

    A help text tells after "; by default" what None stands for: where a script has another default, not that.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if any(action.default is silent for silent in (None, False, argparse.SUPPRESS)):
            return action.help
        text = action.help.split("; by default")[0]
        return text if "%(default)" in text else f"{text} (default: %(default)s)"


def flag(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"
