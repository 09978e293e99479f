"""A command's options: one frozen dataclass, from which its parser is made. It knows dataclasses and argparse alone.

A field is a flag `--its-name`, required where it has no default; its annotation says the type. `bool` is a switch: one
that is on by default is switched off by `--no-its-name`.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from typing import Any


def option(
    help: str,
    default: Any = dataclasses.MISSING,
    *,
    unset: str | None = None,
    older: str | None = None,
    **arguments: Any,
) -> Any:
    """A field of a command's options.

    Args:
        help: what it is, without its default, which the parser adds.
        unset: what happens without it, where the default is None or says too little.
        older: another flag for it, of before.
        arguments: what argparse's `add_argument` takes beside: choices, nargs, metavar, action, `positional=True`.
    """
    made = {"default_factory": list} if default == [] else {"default": default}
    return dataclasses.field(**made, metadata={"help": help, "unset": unset, "older": older, "arguments": arguments})


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Give the parser an argument for each field of the dataclass `kind`."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        arguments = {"dest": field.name, **field.metadata["arguments"]}
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        flag = field.name.replace("_", "-")
        names = [f"--no-{flag}" if field.default is True else f"--{flag}"]
        if field.metadata["older"]:
            names.append(field.metadata["older"])
        if arguments.pop("positional", False):
            names = [arguments.pop("dest")]
            arguments["metavar"] = arguments.get("metavar", names[0].upper())
        elif required:
            arguments["required"] = True
        words, unset = field.metadata["help"], field.metadata["unset"]
        if hints[field.name] is bool:
            arguments["action"] = "store_false" if field.default is True else "store_true"
            shown = unset or f"{'it is done' if field.default is True else 'off'}"
        else:
            arguments["type"] = _element(hints[field.name])
            shown = unset or ("none" if field.default_factory is not dataclasses.MISSING else field.default)
        if not required:
            arguments["default"] = [] if field.default is dataclasses.MISSING else field.default
            words = f"{words} (default: {shown})"
        parser.add_argument(*names, help=words.replace("%", "%%"), **arguments)


def read_options(kind: type, parsed: argparse.Namespace) -> Any:
    """The dataclass `kind`, of what its parser has read."""
    return kind(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(kind)})


def _element(hint: Any) -> type:
    """`int` of `int`, `int | None` and `list[int]`."""
    return next((part for part in typing.get_args(hint) if part is not type(None)), hint)


__all__ = ["add_options", "option", "read_options"]
