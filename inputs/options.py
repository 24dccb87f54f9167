"""Where the values of options come from: defaults, over them the preset, over that the file of --config, over that the
command line; and how they are written down, so that --config can read them again.
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from inputs.command_line import make_parser

END_OF_SCALAR = "...\n"  # which YAML puts after one that stands alone
PRESETS = Path(__file__).parents[1] / "presets"
# What belongs to one data set: with another name, none of it is taken over.
OF_A_DATASET = ("dataset_subset", "dataset_split", "dataset_revision", "dataset_text_field")
OF_HELD_OUT_TEXT = ("eval_dataset_name", "eval_dataset_subset", "eval_dataset_split")


def option_values(cls: Any, section: str, description: str, argv: list[str] | None) -> tuple[dict[str, Any], set[str]]:
    """The values of an entry's options, whose part of a preset is `section`, where they are not the defaults; and the
    names of those that the command line, or the file of --config, gives. Raises ValueError.
    """
    first = _named_first(argv)
    content = {} if first.config is None else read_config_file(first.config)
    preset = preset_values(first.preset or str(content.get("preset", cls.preset)), cls, section)
    parser = make_parser(cls, description, preset)
    on_line = vars(parser.parse_args(argv))  # only what it names
    in_file = _parsed(first.config, content, parser, cls)
    given = {**in_file, **on_line}
    if not given.get("eval_interval", preset.get("eval_interval")):
        preset = _without(preset, *OF_HELD_OUT_TEXT)  # what an evaluation would be made on, if there was one
    return _over(on_line, _over(in_file, preset)), set(given)


def _named_first(argv: list[str] | None) -> argparse.Namespace:
    """What decides over the values of all other options."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--preset", nargs="?")  # that its value is missing, the real parser tells
    parser.add_argument("--config", nargs="?")
    return parser.parse_known_args(argv)[0]


def _over(upper: dict[str, Any], lower: dict[str, Any]) -> dict[str, Any]:
    """Options with others beneath them, of which those are left out that went with what the upper ones replace."""
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


class _StrictLoader(yaml.SafeLoader):
    """YAML where an option that stands twice is a mistake, and not the last one's, and where a number is what is
    written, such as 007 in a name: what it means, the option's own type says.
    """

    def construct_mapping(self, node, deep=False):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} stands twice")
        return super().construct_mapping(node, deep)


for _kind in ("int", "float", "timestamp"):
    _StrictLoader.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda loader, node: node.value)


def read_config_file(file: str) -> dict[str, Any]:
    """Raises ValueError that names the file."""
    try:
        content = yaml.load(Path(file).read_text(encoding="utf-8"), _StrictLoader) or {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: cannot be read ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {file}: expected lines such as `seq_length: 1024`, found {content!r:.40}")
    return content


def _parsed(file: str | None, content: dict[str, Any], parser: argparse.ArgumentParser, cls: Any) -> dict[str, Any]:
    """The options of a file, read as the command line would read them; null stands for no value. Paths are relative to
    where the command runs, as on the command line.
    """
    types_of = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls) if field.metadata and field.name != "config"]
    values: dict[str, Any] = {}
    words: list[str] = []
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists those that there are"
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
    """An option as it would stand on the command line."""
    if value is None or isinstance(value, dict) or is_switch != isinstance(value, bool):
        raise ValueError(f"{where}: expected {'true or false' if is_switch else 'a value of this option'}")
    if is_switch:
        return [f"--{name}" if value else f"--no_{name}"]
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def as_yaml(args: Any) -> str:
    """All options of a run, by their groups, as --config reads them."""
    lines: list[str] = []
    group = None
    for field in dataclasses.fields(args):
        if field.metadata and field.name != "config":
            if field.metadata["group"] != group:
                group = field.metadata["group"]
                lines.append(f"\n# {group}")
            value = yaml.safe_dump(getattr(args, field.name), default_flow_style=True, width=math.inf)
            lines.append(f"{field.name}: {value.removesuffix(END_OF_SCALAR).rstrip()}")
    return "\n".join(lines).lstrip() + "\n"
