"""What a student has of its teacher, as options name it: whole layers by index, and heads as LAYER:HEAD."""

from __future__ import annotations  # doctor.py reports a Python that is too old

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from inputs.value_types import SHOWN

if TYPE_CHECKING:  # arguments.py imports nothing heavy
    from transformers import PretrainedConfig

    from llamba import LlambaConfig

Heads = dict[int, list[int]]  # layer -> query heads of the teacher
AUTO = re.compile(r"auto:([0-9]{1,6})")
PAIR = re.compile(r"([0-9]{1,6}):([0-9]{1,6})")


def head_list(text: str) -> str:
    """Returns a text such as "13:18,15:11", or "auto:16", as it is. Raises ArgumentTypeError if it is no list of
    LAYER:HEAD.
    """
    if not AUTO.fullmatch(text) and not all(map(PAIR.fullmatch, text.replace(",", " ").split() or [text])):
        raise argparse.ArgumentTypeError(
            f"{text!r:.{SHOWN}}: expected heads as LAYER:HEAD, with commas or spaces, such as 13:18,15:11, or how many "
            "to choose, such as auto:16"
        )
    return text


def without_auto(texts: list[str], number: int | None) -> tuple[list[str], int | None]:
    """Returns the heads that texts name, as `pairs_of` does, and how many they leave to be chosen: the number in
    "auto:16", else `number`. Where it does not stand alone, the texts are returned as they are.
    """
    if len(texts) == 1 and (auto := AUTO.fullmatch(texts[0])):
        return [], int(auto[1])
    return (texts if any(map(AUTO.fullmatch, texts)) else pairs_of(parse_heads(texts))), number


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


def head_problems(student: LlambaConfig, teacher: PretrainedConfig, layers: list[int], heads: Heads) -> list[str]:
    """Returns why a student cannot keep heads of the teacher."""
    flag, problems = f"--heads {','.join(pairs_of(heads))}", []
    kept = {*pairs_of(heads), *pairs_of({layer: student.fitted_beside.get(str(layer), []) for layer in layers})}
    if missing := [pair for pair in pairs_of(student.fitted_beside) if pair not in kept]:
        problems.append(
            f"{named_parts(layers, heads)}: the mixers of --student_model were fitted beside heads of the teacher, and "
            f"give nothing in their place; add --heads {','.join(missing)}, or take a student made without --heads"
        )
    n_heads, n_v_heads = getattr(teacher, "num_attention_heads", None), student.ssm_cfg["n_v_heads"]
    if twice := sorted({*layers} & {*heads}):
        problems.append(f"{flag}: --layers keeps {twice} whole; name a layer in one of them")
    if n_heads is None or not heads:
        return problems
    if outside := [pair for pair in pairs_of(heads) if int(pair.split(":")[1]) >= n_heads]:
        problems.append(f"{flag}: {','.join(outside)} out of range; the teacher's layers have heads 0 to {n_heads - 1}")
    if n_heads != n_v_heads:
        problems.append(
            f"{flag}: a mixer of the student has {n_v_heads} heads and the teacher's attention {n_heads}; expected as "
            "many, each in the place of one; make_student.py makes such a student, or keep whole --layers"
        )
    return problems
