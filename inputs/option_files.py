"""Options in a YAML file: --config reads one, and a run writes its own as args.yaml."""

import argparse
import difflib
import math
import os
import reprlib
import stat
import types
import typing
from typing import Any

import yaml

from inputs.options import default_values, options_of
from paths import literal

MOST_BYTES = 2**20  # of a file of options
DEEPEST = 8  # lists and mappings in each other; options need two
SCALARS = (str, int, float)  # of YAML only str; of the JSON of presets all
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
    """Returns the names and values of a file of options, which is read once: it may be a pipe. Raises ValueError that
    names the file.
    """
    try:
        text = _read(file)
        _check_structure(text)
        content = yaml.load(text, _StrictLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file}: cannot be read ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"--config {file}: expected lines such as `seq_length: 1024`, found {_shown(content)}")
    return content or {}


def _read(file: str) -> str:
    """Returns the text of a file. A pipe without a writer is an error: waiting for one could last forever."""
    with open(os.open(file, os.O_RDONLY | os.O_NONBLOCK), "rb") as opened:
        os.set_blocking(opened.fileno(), True)  # wait for a slow writer
        content = opened.read(MOST_BYTES + 1)
        if not content and stat.S_ISFIFO(os.fstat(opened.fileno()).st_mode):
            raise ValueError("nothing was written to this pipe")
    if len(content) > MOST_BYTES:
        raise ValueError(f"it has more than {MOST_BYTES:,} bytes, which no file of options has")
    return content.decode("utf-8")


def _check_structure(text: str) -> None:
    """Raises ValueError for YAML that takes more stack or memory than its size: nested deeply, or with aliases of
    aliases. Options need neither. yaml.parse itself uses no recursion and expands no alias.
    """
    depth, collections = 0, set()
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            collections.add(event.anchor)
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.AliasEvent) and event.anchor in collections:
            raise ValueError(f"*{event.anchor} stands for a list or a mapping; write it out")
        if depth > DEEPEST:
            raise ValueError(f"lists or mappings are nested more than {DEEPEST} deep")


def _shown(value: Any) -> str:
    """Returns the start of a value, as an error repeats it."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 60
    return short.repr(value)


def parse_content(where: str, content: dict[str, Any], parser: argparse.ArgumentParser, cls: Any) -> dict[str, Any]:
    """Returns the values of a file's options, parsed as on the command line; null means no value. Paths are relative
    to the working directory, as on the command line. where: the file, with which errors begin.
    """
    types_of, options = typing.get_type_hints(cls), options_of(cls)
    known = [name for name in options if name != "config"]
    values: dict[str, Any] = {}
    words: list[str] = []
    for name, value in content.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists all options"
            raise ValueError(f"{where}: there is no option {_shown(name)}; {hint}")
        may_be_empty = options[name].nargs == "*" or default_values(cls).get(name) == []
        if (value == [] and may_be_empty) or (value is None and types.NoneType in typing.get_args(types_of[name])):
            values[name] = value
        else:
            words += _as_words(f"{where}: {name}: {_shown(value)}", name, value, types_of[name] is bool)
    try:
        return {**values, **vars(parser.parse_args(words))}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _as_words(where: str, name: str, value: Any, is_switch: bool) -> list[str]:
    """Returns an option of a file as words of a command line."""
    items = value if isinstance(value, list) else [value]
    if is_switch:
        if not isinstance(value, bool):
            raise ValueError(f"{where}: expected true or false")
        return [f"--{name}" if value else f"--no_{name}"]
    if any(isinstance(item, bool) or not isinstance(item, SCALARS) for item in items):
        raise ValueError(f"{where}: expected a value of this option")
    if isinstance(value, list) and any(str(item).startswith("--") for item in items):
        raise ValueError(f"{where}: expected a list of values, found the name of an option")
    return [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]


def as_yaml(args: Any) -> str:
    """Returns all options of a run, by their groups, in the form that --config reads. Paths are as they were expanded:
    the file means the same with other variables.
    """
    lines: list[str] = []
    group = None
    for name, about in options_of(args).items():
        if name != "config":
            if about.group != group:
                group = about.group
                lines.append(f"\n# {group}")
            value = getattr(args, name)
            if about.is_path and value is not None:
                value = literal(value)
            value = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
            lines.append(f"{name}: {value.removesuffix(END_OF_SCALAR).rstrip()}")
    return "\n".join(lines).lstrip() + "\n"
