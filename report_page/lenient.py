"""Reads numbers, JSON and YAML that may be damaged, or written to do harm: what cannot be used is left out."""

import json
import math
from pathlib import Path
from typing import Any

import yaml

LARGEST = 1e100  # sums, squares and logarithms of numbers up to this one are finite, and can be drawn


def finite_or_nan(value: Any) -> float:
    """Returns a number as it is, and NaN for null, infinity, anything else, and numbers beyond LARGEST."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return float(value) if is_number and abs(value) <= LARGEST else math.nan


def is_too_large(value: Any) -> bool:
    """Returns whether `finite_or_nan` leaves out a number because of its size alone."""
    return isinstance(value, (int, float)) and LARGEST < abs(value) < math.inf


def content_of(file: Path) -> bytes:
    """Returns what is in a regular file, and nothing for any other, for a missing one and for one of someone else."""
    try:
        return file.read_bytes() if file.is_file() else b""
    except OSError:
        return b""


def parse_json(content: bytes) -> Any:
    """Returns the value, or None where there is none that can be read."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


class _LoaderWithoutAliases(yaml.SafeLoader):
    """Reads YAML in which nothing is repeated: a few lines of aliases can stand for more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def parse_yaml(content: bytes) -> Any:
    """Returns the value, or None where there is none that can be read."""
    try:
        return yaml.load(content, _LoaderWithoutAliases)
    except (ValueError, yaml.YAMLError, RecursionError):
        return None


def dict_or_empty(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
