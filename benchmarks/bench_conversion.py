"""What a student begins with, by how its mixers are made: their error, and the KL to the teacher of hybrids with few,
half and all of the layers recurrent. Every student is made by make_student.py's own code. From the repository's folder,
with the teacher and the text of `make demo-real`:

    python -m presets.smollm2
    python -m presets.real_text runs/demo-real/text
    python -m benchmarks.bench_conversion

zero                    mixers that give zeros: what anything else has to beat.
random                  as a new student's are drawn.
projections             q, k, v and o of attention, and horizons from 2 to 256 tokens; nothing fitted.
closed form             make_student.py's default.
closed form, no biases  the published layout (--no_ssm_bias): the decays are fitted.

error: mean over layers and held-out tokens of |mixer - attention| / |attention|; own: the same of whole layers, as in
a layer map. KL in nats per token, with four, with every second and with all layers recurrent. seconds: of making it, by
the clock. --quick: the tiny preset, in seconds.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.harness import Row, report
from conversion.build import Recipe, build_student
from conversion.calibration import Windows, read_windows
from conversion.teacher_weights import TeacherWeights
from evaluation import held_out
from evaluation.held_out import WINDOWS_AT_ONCE, HeldOutText
from llamba import LlambaForCausalLM
from model_utils import apply_replacements, get_student_model, get_teacher_model, get_tokenizer
from text.sources import TextSource

TINY = Path(__file__).parents[1] / "presets" / "tiny"
CPU = torch.device("cpu")
RECIPES = {
    "random": Recipe(init="random", dtype="float32"),
    "projections": Recipe(init="projections", dtype="float32"),
    "closed form": Recipe(dtype="float32"),
    "closed form, no biases": Recipe(ssm_bias=False, dtype="float32"),
}


def main(argv: list[str] | None = None) -> list[Row]:
    """Prints the table, and returns its rows."""
    args = parse(argv)
    teacher = get_teacher_model(str(args.teacher), torch.float32, CPU)
    tokenizer = get_tokenizer("--teacher", str(args.teacher))
    windows = read(args, tokenizer)
    text = HeldOutText(windows.held_out, CPU)
    text.ask_teacher(teacher, _starts(text))
    rows: list[Row] = [{"mixers": "zero", "error": 1.0}]
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            made = Path(folder) / name
            rows.append({"mixers": name, **make(args.teacher, made, tokenizer, windows, recipe)})
            if not rows[0].get("kl_all"):
                rows[0] |= kl_by_set(made, teacher, text, without_mixers=True)
            rows[-1] |= kl_by_set(made, teacher, text)
            print(rows[-1], file=sys.stderr)
    report(rows, args.json)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = Path("runs/demo-real/text")
    parser.add_argument("--teacher", type=Path, default=Path("teachers/smollm2-135m"), help="folder of a Llama")
    parser.add_argument("--calibration", type=Path, default=text / "train.jsonl", help="text to fit the mixers on")
    parser.add_argument("--held_out", type=Path, default=text / "heldout.jsonl", help="text to measure on")
    parser.add_argument("--calibration_tokens", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=8, help="windows of the held-out text (default: 8)")
    parser.add_argument("--seq_length", type=int, default=256, help="tokens of a window (default: 256)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="the tiny preset and little text: a trial, no result")
    args = parser.parse_args(argv)
    if args.quick:
        args.teacher, args.calibration, args.held_out = (
            TINY / name for name in ("teacher", "text/train.jsonl", "text/heldout.jsonl")
        )
        args.calibration_tokens, args.windows, args.seq_length = 1024, 2, 64
    return args


def read(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Returns windows for calibration (n, S) and the first held-out ones (m, S + 1)."""
    sources = [TextSource(str(file), local_files_only=True) for file in (args.calibration, args.held_out)]
    tokens = (args.calibration_tokens, args.seq_length)
    calibration = read_windows(sources[0], tokenizer, tokens, args.seq_length, seed=0).calibration
    return Windows(calibration, held_out.read_windows(sources[1], tokenizer, args.windows, args.seq_length))


def make(
    teacher: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, windows: Windows, recipe: Recipe
) -> dict[str, float]:
    """Makes a student in `folder`, and returns the errors of its mixers and the seconds that it took."""
    begun = time.monotonic()
    layers = build_student(TeacherWeights(str(teacher)), folder, tokenizer, windows, recipe, CPU)["layers"]
    seconds = time.monotonic() - begun
    error, own = (sum(layer[name] for layer in layers) / len(layers) for name in ("mixer", "own"))
    return {"error": error, "own": own, "seconds": seconds}


def kl_by_set(
    folder: Path, teacher: PreTrainedModel, text: HeldOutText, without_mixers: bool = False
) -> dict[str, float]:
    """Returns the KL to the teacher of hybrids with four, every second and all of the student's layers recurrent."""
    found = {}
    for name, recurrent in recurrent_layers(teacher.config.num_hidden_layers).items():
        student = get_student_model(str(folder), torch.float32, CPU).eval()
        if without_mixers:
            silence(student)
        kept = [index for index in range(student.config.n_layer) if index not in recurrent]
        apply_replacements(student, teacher, kept)
        sums = [text.compare(student, start) for start in _starts(text)]
        found[f"kl_{name}"] = sum(sums[1:], start=sums[0]).means()["kl"]
    return found


def recurrent_layers(n_layer: int) -> dict[str, list[int]]:
    """Returns sets of layers by name; of 30 layers 8, 14, 20, 26 are the four."""
    step = max(1, n_layer // 5)
    few = list(range(min(step + 2, n_layer - 1), n_layer, step))[:4]
    return {"4": few, "half": list(range(1, n_layer, 2)), "all": list(range(n_layer))}


@torch.no_grad()
def silence(student: LlambaForCausalLM) -> None:
    """Makes all mixers give zeros."""
    for layer in student.backbone.layers:
        for parameter in layer.mixer.out_proj.parameters():
            parameter.zero_()


def _starts(text: HeldOutText) -> list[int]:
    return list(range(0, len(text.windows), WINDOWS_AT_ONCE))


if __name__ == "__main__":
    main()
