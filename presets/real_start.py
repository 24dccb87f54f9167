"""Measures for `make demo-real` what training begins with: mixers that add nothing, that have attention's projections
alone, and of the closed form; with all layers recurrent, every second one, and those of the hybrid to train.

    python -m presets.real_start --students runs/demo-real/students --teacher teachers/smollm2-135m \\
        --held_out runs/demo-real/text/heldout.jsonl --output runs/demo-real/start.json

The students are in the folders `projections` and `closed_form`, as make_student.py has made them. The output has, by
set of layers and by start, the `kl` to the teacher and the `agreement` with it on held-out text.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from evaluation.held_out import WINDOWS_AT_ONCE, HeldOutText, read_windows
from llamba import LlambaForCausalLM
from model_utils import apply_replacements, get_student_model, get_teacher_model, get_tokenizer
from paths import expanded_path
from text.sources import TextSource
from utils import setup_logging, write_whole

CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what training begins with.", allow_abbrev=False)
    for name in ("students", "teacher", "held_out", "output"):
        parser.add_argument(f"--{name}", type=expanded_path, required=True)
    parser.add_argument("--seq_length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=4)
    args = parser.parse_args()
    setup_logging(None, is_main=True)
    teacher = get_teacher_model(str(args.teacher), torch.float32, CPU)
    source = TextSource(str(args.held_out), local_files_only=True)
    windows = read_windows(source, get_tokenizer("--teacher", str(args.teacher)), args.windows, args.seq_length)
    text = HeldOutText(windows, CPU)
    text.ask_teacher(teacher, _starts(text))
    made_with = json.loads((args.students / "closed_form" / "conversion.json").read_text())["made_with"]
    every_second = list(range(0, teacher.config.num_hidden_layers, 2))
    sets = {"all": [], "every second": every_second, "chosen": made_with["layers"]}
    found = {name: measure(args.students, layers, teacher, text) for name, layers in sets.items()}
    write_whole(args.output, json.dumps(found, indent=1).encode() + b"\n")


def measure(students: Path, layers: list[int], teacher: PreTrainedModel, text: HeldOutText) -> dict[str, Any]:
    """Returns by start the figures of a hybrid with `layers` of the teacher's."""
    found = {}
    for start in ("projections", "closed_form"):
        student = get_student_model(str(students / start), torch.float32, CPU).eval()
        apply_replacements(student, teacher, layers)
        found[start] = _compare(student, text)
    without_output(student)
    return {"zero": _compare(student, text), **found}


@torch.no_grad()
def without_output(student: LlambaForCausalLM) -> None:
    """Makes all mixers add nothing."""
    for index, layer in enumerate(student.backbone.layers):
        if index not in student.config.attention_layers:
            for parameter in layer.mixer.out_proj.parameters():
                parameter.zero_()


def _compare(student: LlambaForCausalLM, text: HeldOutText) -> dict[str, float]:
    sums = [text.compare(student, start) for start in _starts(text)]
    return sum(sums[1:], start=sums[0]).means()


def _starts(text: HeldOutText) -> list[int]:
    return list(range(0, len(text.windows), WINDOWS_AT_ONCE))


if __name__ == "__main__":
    main()
