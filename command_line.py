"""How a field of a dataclass becomes an option of a command line, and how a preset gives values to options that are not
on it. What options there are is arguments.py's to say. Standard library only.
"""

import argparse
import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any, Literal

PRESETS = Path(__file__).parent / "presets"


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


def make_parser(cls: type, description: str) -> argparse.ArgumentParser:
    """A dataclass's options as flags, in their groups. What the command line does not name is not in its result."""
    parser = _Parser(description=description, argument_default=argparse.SUPPRESS, allow_abbrev=False)
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
        help = metadata.pop("help") + _default_text(field)
        flag = f"--{field.name}"
        if types_of[field.name] is bool:
            group.add_argument(flag, action="store_true", dest=field.name, help=help)
            group.add_argument(f"--no_{field.name}", action="store_false", dest=field.name, help=argparse.SUPPRESS)
        else:
            type_, choices = _scalar_type(types_of[field.name])
            group.add_argument(flag, help=help, **{"type": type_, "choices": choices, **metadata})
    return parser


def _default_text(field: dataclasses.Field) -> str:
    if field.default_factory is not dataclasses.MISSING:
        default = " ".join(map(str, field.default_factory()))
        return f" (default: {default})" if default else ""
    if field.default is dataclasses.MISSING:
        return " (default: the preset's)"
    return "" if field.default is None else f" (default: {field.default})"


def _scalar_type(hint: Any) -> tuple[type, tuple | None]:
    """What a value is, and what it can be if not anything: (int, None) for `int`, `int | None`, `list[int]` and
    `list[int] | None`; (str, choices) for a Literal in their place.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    return (str, typing.get_args(hint)) if typing.get_origin(hint) is Literal else (hint, None)


def preset_values(name: str, cls: type, section: str) -> dict[str, Any]:
    """A preset's common values and those of a section; paths that begin with ./ are relative to the preset's folder.
    Raises ValueError if there is no such preset, or if it names what is no option of `cls`.
    """
    file = PRESETS / name / "preset.json"
    if not file.is_file():
        known = sorted(path.parent.name for path in PRESETS.glob("*/preset.json"))
        raise ValueError(f"--preset {name}: expected one of {', '.join(known)}")
    sections = json.loads(file.read_text())
    values = {**sections["common"], **sections[section]}
    unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{file}: unknown options {unknown}")
    return {
        key: str(file.parent / value[2:]) if isinstance(value, str) and value.startswith("./") else value
        for key, value in values.items()
    }
