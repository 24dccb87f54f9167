"""Where the value of an option comes from: the default, over it the preset, over that the file of --config, over that
the command line.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from inputs.option_files import parse_content, read_config_file
from inputs.options import StrictParser, make_parser, options_of
from inputs.value_types import some_text
from paths import expanded

PRESETS = Path(__file__).parents[1] / "presets"
# What belongs to one data set: another data set replaces all of it.
OF_A_DATASET = ("dataset_subset", "dataset_split", "dataset_revision", "dataset_text_field")
OF_HELD_OUT_TEXT = ("eval_dataset_name", "eval_dataset_subset", "eval_dataset_split")


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
    in_file = parse_content(f"--config {first.config}", content, parser, cls)
    given = {**in_file, **on_line}
    if not given.get("eval_interval", preset.get("eval_interval")):
        preset = _without(preset, *OF_HELD_OUT_TEXT)  # no evaluation would use it
    return _override(_override(preset, in_file), on_line), set(given)


def _preset_and_config(argv: list[str] | None) -> argparse.Namespace:
    """Returns --preset and --config, on which the values of all other options depend."""
    parser = StrictParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", type=some_text)  # the real parser reports a missing value
    parser.add_argument("--config", nargs="?", type=expanded)
    return parser.parse_known_args(argv)[0]


def _override(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """Returns both, `upper` over `lower`. What belongs to a data set or an evaluation that `upper` replaces is left
    out, and a warm-up in steps where `upper` gives it as a part of the run.
    """
    if "warmup_ratio" in upper:
        lower = _without(lower, "warmup_steps")
    if "dataset_name" in upper:
        lower = _without(lower, *OF_A_DATASET, *OF_HELD_OUT_TEXT)
    if "eval_dataset_name" in upper:
        lower = _without(lower, *OF_HELD_OUT_TEXT)
    if upper.get("eval_interval") == 0:
        lower = _without(lower, *OF_HELD_OUT_TEXT, "eval_mmlu_dir")
    return {**lower, **upper}


def _without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def known_presets() -> list[str]:
    return sorted(path.parent.name for path in PRESETS.glob("*/preset.json"))


def command_that_makes(name: str) -> str | None:
    """Returns the command that makes the model `name`, if it is one of a preset whose models are not published."""
    for preset in known_presets():
        sections = _sections(PRESETS / preset / "preset.json")
        for option, command in sections.get("make", {}).items():
            if sections["common"][option] == name:
                return command
    return None


def _sections(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(f"{file}: cannot be read as a preset ({error!r}); correct it, as the others are")


def preset_values(name: str, cls: type, section: str) -> dict[str, Any]:
    """Returns a preset's common values and those of a section; paths that begin with ./ are relative to the preset's
    folder. Raises ValueError if there is no such preset, or if it has a value that is none of `cls`.
    """
    known = known_presets()
    if name not in known:
        raise ValueError(f"--preset {name:.60}: expected one of {', '.join(known)}")
    file = PRESETS / name / "preset.json"
    sections = _sections(file)
    try:
        content = {**sections["common"], **sections[section]}
        fields = {field.name for field in dataclasses.fields(cls)}
        content = _without(content, *(fields - options_of(cls).keys()))  # what is an option of other entries only
    except (LookupError, TypeError) as error:
        raise _unreadable(file, error) from error
    values = parse_content(str(file), content, make_parser(cls, "", {}), cls)
    return {
        key: str(file.parent / value[2:]) if isinstance(value, str) and value.startswith("./") else value
        for key, value in values.items()
    }
