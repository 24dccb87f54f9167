"""What an option is, and how it becomes a flag. arguments.py lists the options themselves; option_values.py says where
their values come from.
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from inputs.groups import OUTPUT, PLAN
from inputs.value_types import SHOWN, number, some_text, whole_number
from paths import expanded

BY_PRESET: Any = dataclasses.MISSING  # in place of a default: every preset gives this option a value
METAVARS = {int: "N", float: "X", str: "TEXT"}
TYPES: dict[type, Callable[[str], Any]] = {int: whole_number, float: number, str: some_text}


# --- what an option is ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """Describes an option, besides the type and the default of its field."""

    help: str
    group: str
    least: float | None = None  # smallest value allowed; bounds of a list hold for each item
    most: float | None = None  # largest value allowed
    above: float | None = None  # values allowed are larger than this
    expected: str | None = None  # the bounds in words, where they say more than the numbers
    kept: bool | Literal["streams", "caches"] = False  # a resumed run must keep it: always, or with such data
    free: bool = False  # a resumed run may change it, and no warning is logged
    is_path: bool = False  # a path, or a name that may be one: `~` and environment variables are expanded
    nargs: str = "+"  # of a list, as in argparse
    parse: Callable[[str], Any] | None = None  # makes the value of its text, where the field's type does not

    @property
    def bounds(self) -> str:
        """Returns the bounds in words, such as "at least 1, at most 1_000"; empty if there are none."""
        if self.expected is not None:
            return self.expected
        bounds = {"a number above": self.above, "at least": self.least, "at most": self.most}
        return ", ".join(f"{words} {bound:_}" for words, bound in bounds.items() if bound is not None)

    def allows(self, value: float) -> bool:
        """Returns whether a number is within the bounds; no bound allows nan or infinity."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        is_low = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        return not is_low and (self.most is None or value <= self.most)


def option(default: Any, help: str, group: str, **details: Any) -> Any:
    """Returns a dataclass field that is an option. details: further fields of `Option`."""
    metadata = {"option": Option(help, group, **details)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def path_option(default: Any, help: str, group: str, **details: Any) -> Any:
    """Returns an option whose value is a path, or a name that may be one."""
    return option(default, help, group, is_path=True, **details)


def options_of(cls: Any) -> dict[str, Option]:
    """Returns name -> option of a dataclass or of an instance of one, without fields that are no option."""
    return {field.name: field.metadata["option"] for field in dataclasses.fields(cls) if "option" in field.metadata}


def default_values(cls: Any) -> dict[str, Any]:
    """Returns name -> default of the options that do not leave it to the preset."""
    values = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(cls)
    }
    return {name: values[name] for name in options_of(cls) if values[name] is not BY_PRESET}


def out_of_bounds(args: Any) -> list[str]:
    """Returns a line for each option whose value is not within its bounds."""
    found = []
    for name, about in options_of(args).items():
        value = getattr(args, name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if about.bounds and (wrong := [item for item in values if not about.allows(item)]):
            found.append(f"--{name} {str(wrong[0]):.{SHOWN}}: expected {about.bounds}")
    return found


def kept_options(args: Any) -> set[str]:
    """Returns the options that a resumed run must keep: another value would make it another run."""
    cases = (True, "streams" if args.dataset_streaming else "caches")
    return {name for name, about in options_of(args).items() if about.kept in cases}


def free_options(cls: Any) -> set[str]:
    """Returns the options that a resumed run may change and that need no warning: they change where it runs and how it
    is watched, not what it computes.
    """
    return {name for name, about in options_of(cls).items() if about.free or about.group in (OUTPUT, PLAN)}


# --- how it becomes a flag -----------------------------------------------------------------------------------


class StrictParser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see --help")


def make_parser(cls: type, description: str, preset: dict[str, Any]) -> argparse.ArgumentParser:
    """Returns a parser with the options of a dataclass as flags, in their groups. Its result has only what the command
    line gives.

    preset: values of the preset, which the help shows as defaults.
    """
    parser = StrictParser(
        usage="%(prog)s [option ...]",
        description=f"{description} Switches have an opposite: --no_wandb for --wandb.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    options, types_of = options_of(cls), typing.get_type_hints(cls)
    titles = dict.fromkeys(about.group for about in options.values())
    groups = {title: parser.add_argument_group(title) for title in titles}
    values = {**default_values(cls), **preset}
    for name, about in options.items():
        add, flag = groups[about.group].add_argument, f"--{name}"
        help = about.help
        if (value := values.get(name)) not in (None, []):
            help += f" (default: {as_text(value)}{', by the preset' if name in preset else ''})"
        if types_of[name] is bool:
            add(flag, action="store_true", dest=name, help=help)
            add(f"--no_{name}", action="store_false", dest=name, help=argparse.SUPPRESS)
        else:
            type_, choices, is_list = kind_of(types_of[name])
            metavar = None if choices else METAVARS[type_]
            nargs = about.nargs if is_list else None
            add(flag, type=_type_of(about, type_, choices), choices=choices, nargs=nargs, metavar=metavar, help=help)
    return parser


def _type_of(about: Option, type_: type, choices: tuple | None) -> Callable[[str], Any]:
    """Returns what makes a value of a text."""
    if about.is_path:
        return expanded
    is_word = choices is not None and type_ is str  # a wrong one is listed with the right ones
    return about.parse or (str if is_word else TYPES[type_])


def as_text(value: Any) -> str:
    """Returns a value as help and documentation show it: on or off for a switch, the items of a list with spaces."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def kind_of(hint: Any) -> tuple[type, tuple | None, bool]:
    """Returns the type of a value, its choices, and whether a field holds a list of such values: (int, None, False) for
    `int` and `int | None`, (str, choices, True) for a list of a Literal.
    """
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    if is_list := typing.get_origin(hint) is list:
        hint = typing.get_args(hint)[0]
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        return type(choices[0]), choices, is_list
    return hint, None, is_list
