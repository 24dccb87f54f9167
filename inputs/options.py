"""What an option is, how it becomes a flag, and where its value comes from: the default, over it the preset, over that
the file of --config, over that the command line. arguments.py lists the options themselves.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

PRESETS = Path(__file__).parents[1] / "presets"
# What belongs to one data set: another data set replaces all of it.
OF_A_DATASET = ("dataset_subset", "dataset_split", "dataset_revision", "dataset_text_field")
OF_HELD_OUT_TEXT = ("eval_dataset_name", "eval_dataset_subset", "eval_dataset_split")
BY_PRESET: Any = dataclasses.MISSING  # in place of a default: every preset gives this option a value
METAVARS = {int: "N", float: "X", str: "TEXT"}
END_OF_SCALAR = "...\n"  # YAML's mark after a value that stands alone


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
    nargs: str = "+"  # of a list, as in argparse
    parse: Callable[[str], Any] | None = None  # makes the value of its text, where the field's type does not

    @property
    def bounds(self) -> str:
        """Returns the bounds in words, such as "at least 1"; empty if there are none."""
        if self.expected is not None:
            return self.expected
        if self.above is not None:
            return f"a number above {self.above}"
        if self.least is None:
            return "" if self.most is None else f"at most {self.most}"
        return f"at least {self.least}"

    def allows(self, value: float) -> bool:
        """Returns whether a number is within the bounds; no bound allows nan or infinity."""
        is_low = (self.least is not None and value < self.least) or (self.above is not None and value <= self.above)
        return math.isfinite(value) and not is_low and (self.most is None or value <= self.most)


def option(default: Any, help: str, group: str, **details: Any) -> Any:
    """Returns a dataclass field that is an option. details: further fields of `Option`."""
    metadata = {"option": Option(help, group, **details)}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


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
            found.append(f"--{name} {wrong[0]}: expected {about.bounds}")
    return found


def auto_or_int(text: str) -> int | None:
    """Returns None for "auto", else the whole number that `text` is."""
    if text != "auto" and not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, or auto")
    return None if text == "auto" else int(text)


# --- how it becomes a flag -----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message}; see --help")


def make_parser(cls: type, description: str, preset: dict[str, Any]) -> argparse.ArgumentParser:
    """Returns a parser with the options of a dataclass as flags, in their groups. Its result has only what the command
    line gives.

    preset: values of the preset, which the help shows as defaults.
    """
    parser = _Parser(
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
            add(flag, type=about.parse or type_, choices=choices, nargs=nargs, metavar=metavar, help=help)
    return parser


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
        return str, typing.get_args(hint), is_list
    return hint, None, is_list


# --- where its value comes from ------------------------------------------------------------------------------


def option_values(cls: Any, section: str, description: str, argv: list[str] | None) -> tuple[dict[str, Any], set[str]]:
    """Returns the values of an entry's options, without those left at their defaults, and the names of the options
    that the command line or the file of --config gives. Raises ValueError.

    section: the entry's part of a preset, "train" or "eval".
    """
    first = _preset_and_config(argv)
    content = {} if first.config is None else read_config_file(first.config)
    preset = preset_values(first.preset or str(content.get("preset", cls.preset)), cls, section)
    parser = make_parser(cls, description, preset)
    on_line = vars(parser.parse_args(argv))
    in_file = _parse_content(first.config, content, parser, cls)
    given = {**in_file, **on_line}
    if not given.get("eval_interval", preset.get("eval_interval")):
        preset = _without(preset, *OF_HELD_OUT_TEXT)  # no evaluation would use it
    return _override(_override(preset, in_file), on_line), set(given)


def _preset_and_config(argv: list[str] | None) -> argparse.Namespace:
    """Returns --preset and --config, on which the values of all other options depend."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?")  # the real parser reports a missing value
    parser.add_argument("--config", nargs="?")
    return parser.parse_known_args(argv)[0]


def _override(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Returns both, `upper` over `lower`. What belongs to a data set or an evaluation that `upper` replaces is left
    out.
    """
    if "dataset_name" in upper:
        lower = _without(lower, *OF_A_DATASET, *OF_HELD_OUT_TEXT)
    if "eval_dataset_name" in upper:
        lower = _without(lower, *OF_HELD_OUT_TEXT)
    if upper.get("eval_interval") == 0:
        lower = _without(lower, *OF_HELD_OUT_TEXT, "eval_mmlu_dir")
    return {**lower, **upper}


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def preset_values(name: str, cls: type, section: str) -> dict[str, Any]:
    """Returns a preset's common values and those of a section; paths that begin with ./ are relative to the preset's
    folder. Raises ValueError if there is no such preset, or if it has a name that is no field of `cls`.
    """
    file = PRESETS / name / "preset.json"
    if not file.is_file():
        known = sorted(path.parent.name for path in PRESETS.glob("*/preset.json"))
        raise ValueError(f"--preset {name}: expected one of {', '.join(known)}")
    sections = json.loads(file.read_text())
    values = {**sections["common"], **sections[section]}
    if unknown := sorted(set(values) - set(options_of(cls))):
        raise ValueError(f"{file}: unknown options {unknown}")
    return {
        key: str(file.parent / value[2:]) if isinstance(value, str) and value.startswith("./") else value
        for key, value in values.items()
    }


class _StrictLoader(yaml.SafeLoader):
    """Reads YAML in which no name may be given twice, and in which a number stays text, such as 007 in a name: the
    option's own type decides what it means.
    """

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is given twice")
        return super().construct_mapping(node, deep)


for _kind in ("int", "float", "timestamp"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda loader, node: node.value)


def read_config_file(file: str) -> dict[str, Any]:
    """Returns the names and values of a file of options. Raises ValueError that names the file."""
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _StrictLoader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: cannot be read ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {file}: expected lines such as `seq_length: 1024`, found {content!r:.40}")
    return content


def _parse_content(
    file: str | None, content: dict[str, Any], parser: argparse.ArgumentParser, cls: Any
) -> dict[str, Any]:
    """Returns the values of a file's options, parsed as on the command line; null means no value. Paths are relative
    to the working directory, as on the command line.
    """
    types_of = typing.get_type_hints(cls)
    known = [name for name in options_of(cls) if name != "config"]
    values: dict[str, Any] = {}
    words: list[str] = []
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all options"
            raise ValueError(f"--config {file}: there is no option {name!r}; {hint}")
        kinds = {typing.get_origin(types_of[name]), *typing.get_args(types_of[name])}
        if (value == [] and list in kinds) or (value is None and types.NoneType in kinds):
            values[name] = value
        else:
            words += _as_words(f"--config {file}: {name}: {value!r}", name, value, types_of[name] is bool)
    try:
        return {**values, **vars(parser.parse_args(words))}
    except ValueError as error:
        raise ValueError(f"--config {file}: {error}") from error


def _as_words(where: str, name: str, value: Any, is_switch: bool) -> list[str]:
    """Returns an option of a file as words of a command line."""
    if value is None or isinstance(value, dict) or is_switch != isinstance(value, bool):
        raise ValueError(f"{where}: expected {'true or false' if is_switch else 'a value of this option'}")
    if is_switch:
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def as_yaml(args: Any) -> str:
    """Returns all options of a run, by their groups, in the form that --config reads."""
    lines: list[str] = []
    group = None
    for name, about in options_of(args).items():
        if name != "config":
            if about.group != group:
                group = about.group
                lines.append(f"\n# {group}")
            value = yaml.safe_dump(getattr(args, name), default_flow_style=True, width=math.inf)
            lines.append(f"{name}: {value.removesuffix(END_OF_SCALAR).rstrip()}")
    return "\n".join(lines).lstrip() + "\n"
