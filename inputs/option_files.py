"""Options in a YAML file: --config reads one, and a run writes its own as args.yaml."""

import argparse
import difflib
import math
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from inputs.options import options_of

END_OF_SCALAR = "...\n"  # YAML's mark after a value that stands alone


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


def parse_content(
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
