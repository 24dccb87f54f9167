"""What a student has of its teacher, as options name it: whole layers by index, and heads as LAYER:HEAD."""

from __future__ import annotations  # doctor.py reports a Python that is too old

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

from inputs.value_types import SHOWN

Heads = dict[int, list[int]]  # layer -> query heads of the teacher
PAIR = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


def head_list(text: str) -> str:
    """Returns a text such as "13:18,15:11" as it is. Raises ArgumentTypeError if it is no list of LAYER:HEAD."""
    if not all(PAIR.fullmatch(pair) for pair in text.split(",")):
        raise argparse.ArgumentTypeError(
            f"{text!r:.{SHOWN}}: expected heads as LAYER:HEAD, with commas or spaces, such as 13:18,15:11"
        )
    return text


def parse_heads(texts: Iterable[str]) -> Heads:
    """Returns the heads of each layer that texts such as "13:18,15:11" name, in order and each once."""
    pairs = {(int(layer), int(head)) for text in texts for layer, head in PAIR.findall(text)}
    heads: Heads = {}
    for layer, head in sorted(pairs):
        heads.setdefault(layer, []).append(head)
    return heads


def pairs_of(heads: Mapping[Any, list[int]]) -> list[str]:
    """Returns each head as LAYER:HEAD, of which `parse_heads` makes the same."""
    return [f"{layer}:{head}" for layer, kept in heads.items() for head in kept]


def named_parts(layers: Iterable[int], heads: Mapping[Any, list[int]]) -> str:
    """Returns the options that name whole layers and heads, such as "--layers 3 --heads 13:18,15:11"."""
    shown = f"--layers {' '.join(map(str, layers)) or '-1'}"
    return f"{shown} --heads {','.join(pairs_of(heads))}" if heads else shown
