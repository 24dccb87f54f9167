"""How a field of a dataclass becomes an option of a command line. What options there are is arguments.py's to say, and
where their values come from settings.py's.
"""

import argparse
import dataclasses
import types
import typing
from typing import Any, Literal

METAVARS = {int: "N", float: "X", str: "TEXT"}


def option(group: str, help: str, default: Any = dataclasses.MISSING, **argparse_kwargs) -> Any:
    """A field that is an option. Without a default, every preset has to give one."""
    metadata = {"group": group, "help": help, **argparse_kwargs}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def auto_or_int(text: str) -> int | None:
    """None for "auto"."""
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, or auto")
    return None if text == "auto" else int(text)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see --help")


def make_parser(cls: type, description: str, preset: dict[str, Any]) -> argparse.ArgumentParser:
    """A dataclass's options as flags, in their groups. What the command line does not name is not in its result.
    preset: the values of the preset that is named, or of the usual one, which the help shows as defaults.
    """
    parser = _Parser(
        usage="%(prog)s [option ...]",
        description=f"{description} Switches have an opposite: --no_wandb for --wandb.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    types_of = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if not field.metadata:
            continue
        metadata = dict(field.metadata)
        title = metadata.pop("group")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        group = groups[title]
        help = metadata.pop("help") + _default_text(field, preset)
        flag = f"--{field.name}"
        if types_of[field.name] is bool:
            group.add_argument(flag, action="store_true", dest=field.name, help=help)
            group.add_argument(f"--no_{field.name}", action="store_false", dest=field.name, help=argparse.SUPPRESS)
        else:
            type_, choices = _scalar_type(types_of[field.name])
            metavar = None if choices else METAVARS.get(metadata.get("type", type_), "N")
            group.add_argument(flag, help=help, **{"type": type_, "choices": choices, "metavar": metavar, **metadata})
    return parser


def _default_text(field: dataclasses.Field, preset: dict[str, Any]) -> str:
    if field.name in preset:
        default, of = preset[field.name], ", by the preset"
    else:
        default, of = field.default, ""
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
    if default in (None, [], dataclasses.MISSING):
        return ""
    if isinstance(default, bool):
        default = "on" if default else "off"
    text = " ".join(map(str, default)) if isinstance(default, list) else default
    return f" (default: {text}{of})"


def _scalar_type(hint: Any) -> tuple[type, tuple | None]:
    """What a value is, and what it can be if not anything: (int, None) for `int`, `int | None`, `list[int]` and
    `list[int] | None`; (str, choices) for a Literal in their place.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    return (str, typing.get_args(hint)) if typing.get_origin(hint) is Literal else (hint, None)
