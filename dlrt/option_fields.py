"""Options as the fields of a dataclass: what each must be, and the flags that follow."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from dlrt.errors import OptionError
from dlrt.flags import HelpFormatter, Kind, Parser, flag

T = TypeVar("T", bound="OptionSet")


def option(default: Any, help: str, kind: Callable | None = None, *aliases: str, **argument: Any) -> Any:
    """A field of a dataclass of options: what its value must be, and the rest of argparse's add_argument."""
    metadata = {"kind": kind, "aliases": aliases, "argument": {"help": help, **argument}}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class OptionSet:
    """A dataclass whose fields are made by `option`. OptionError for a value that is none of its kind."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            value, kind = getattr(self, spec.name), spec.metadata["kind"]
            if value is spec.default:
                continue
            if choices := spec.metadata["argument"].get("choices"):
                kind = Kind(f"one of {', '.join(choices)}", list(choices).__contains__)
            elif isinstance(spec.default, bool):
                kind = Kind("True or False", lambda value: isinstance(value, bool))
            try:
                setattr(self, spec.name, getattr(kind, "check", kind)(value) if kind else value)
            except argparse.ArgumentTypeError as error:
                raise OptionError(f"{flag(spec.name)} {error}") from error

    @classmethod
    def parser(cls, description: str, **defaults: Any) -> Parser:
        """A parser with a flag for each field; a script has defaults of its own."""
        parser = Parser(description=description, formatter_class=HelpFormatter)
        add_flags(parser, cls)
        parser.set_defaults(**defaults)
        return parser

    @classmethod
    def parse(cls: type[T], description: str, arguments: Sequence[str] | None = None, **defaults: Any) -> T:
        """The options on the command line, above a script's defaults; a mistake ends the program with 2."""
        parser, missing = cls.parser(description, **defaults), object()
        empty = argparse.Namespace(**{spec.name: missing for spec in fields(cls)})
        parsed = vars(parser.parse_args(arguments, empty))
        given = {name: value for name, value in parsed.items() if value is not missing}
        try:
            return cls(**{**defaults, **given, **cls.implied(given)})
        except OptionError as error:
            parser.error(str(error))

    @classmethod
    def implied(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What flags that are given say of others that are not."""
        return {}


def add_flags(parser: Parser, options: type[OptionSet], *names: str) -> None:
    """Flags for the fields of a dataclass, or for some of them."""
    for spec in fields(options):
        if "kind" not in spec.metadata:
            raise TypeError(f"{spec.name} of {options.__name__} must be an option(default, help, kind)")
        if not names or spec.name in names:
            default = spec.default_factory() if spec.default_factory is list else spec.default
            kind = {"type": spec.metadata["kind"]} if spec.metadata["kind"] else {}
            argument = spec.metadata["argument"]
            parser.add_argument(
                flag(spec.name), *spec.metadata["aliases"], default=default, **kind, **argument
            )


def as_flags(options: Mapping[str, Any]) -> list[str]:
    """The flags that say these options: switches, numbers, texts and lists, by their names in config.json."""
    flags = []
    for name, value in options.items():
        if isinstance(value, bool):
            flags.append(flag(name) if value else f"--no-{flag(name)[2:]}")
        else:
            flags += [flag(name), *map(str, value if isinstance(value, list | tuple) else [value])]
    return flags
