"""Compares hybrids that keep single heads of a real teacher, cut out of a student or with mixers that were fitted
beside them, and after training with a hybrid of whole layers. From the repository's folder, with what `make demo-real`
has made:

    python -m benchmarks.real_heads --teacher teachers/smollm2-135m --student runs/demo-real/students/closed_form \\
        --text runs/demo-real/text --output runs/heads --far 11 --groups 11

--groups takes the key/value heads without which the teacher's probes lose most when they are zeroed, with all their
query heads, as `--heads auto:K` does; --heads single ones. --far takes those that have to look far, as
`choose_layers.py --head_choice search` does. With `--align 60 --distil 120` each hybrid is trained so many steps of
512 tokens, and so is one with the whole `--layers`. All figures are of texts that no head was chosen on. The same
command resumes: what is made stays.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import make_student
from benchmarks.harness import ROOT, Row, report
from conversion.options import parse_make_args
from inputs.teacher_parts import Heads, named_parts, parse_heads
from model_utils import apply_replacements, get_student_model, get_teacher_model
from processes.ranks import process_groups
from selection.ablation import ablation_scores
from selection.checks import Checked, check_choice, read_material
from selection.dealing import Dealt
from selection.heads import find_heads, shapes_of_heads, strongest_heads
from selection.material import Material, build_probes
from selection.options import parse_choose_args
from selection.reach import ShortSighted, heads_per_group
from selection.statistics import Estimate, estimate
from utils import write_whole

CPU = torch.device("cpu")
PRESET = "smollm2-135m"  # windows, batches and rates
WINDOWS_AT_ONCE, TEXTS_TO_RANK_ON = 4, 4


def main(argv: list[str] | None = None) -> list[Row]:
    """Prints the table, and returns its rows."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    models = ["--teacher_model", args.teacher, "--student_model", args.student, "--local_files_only"]
    texts = ["--text", str(args.text / "heldout.jsonl"), "--probe_texts", str(args.probe_texts), "--seed", "1"]
    options = parse_choose_args([*models, *texts, "--output", str(args.output), "--dtype", "float32", "--budget", "1"])
    checked = check_choice(options)
    material = read_material(options, checked)
    teacher = get_teacher_model(args.teacher, torch.float32, CPU)
    hybrids = Hybrids(args, teacher)
    rows = [figures_of("the teacher", teacher, teacher, material)]
    for name, layers, heads in named(args, teacher, checked):
        if heads:
            rows.append(short_sighted(f"{name}, the teacher's others short-sighted", heads, teacher, material))
        for how, hybrid in hybrids.of(name, layers, heads):
            rows.append(figures_of(f"{name}{how}", hybrid, teacher, material))
            print(rows[-1], flush=True)
    report(rows, args.json)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--text", type=Path, required=True, help="folder of train.jsonl and heldout.jsonl")
    parser.add_argument("--output", type=Path, required=True, help="folder of what is measured and trained")
    parser.add_argument("--far", type=int, nargs="*", default=[], help="numbers of key/value heads, by search")
    parser.add_argument("--heads", type=int, nargs="*", default=[], help="numbers of heads, by ablation")
    parser.add_argument("--groups", type=int, nargs="*", default=[], help="numbers of key/value heads, by ablation")
    parser.add_argument("--layers", type=int, nargs="*", default=[], help="whole layers to compare with")
    parser.add_argument("--align", type=int, default=0, help="steps of alignment")
    parser.add_argument("--distil", type=int, default=0, help="steps of distillation after it")
    parser.add_argument("--probe_texts", type=int, default=12, help="of each probe, others than heads are ranked on")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    return parser.parse_args(argv)


def material_to_choose_on(teacher: Any, checked: Checked) -> Material:
    """Returns probes of texts of their own, of which the first four are for choosing."""
    context = teacher.config.max_position_embeddings
    probes, left_out = build_probes(checked.tokenizer, TEXTS_TO_RANK_ON * 3 // 2, 0, context)
    return Material(torch.zeros(3, 2, dtype=torch.int64), probes, left_out)


def scores_of(teacher: Any, material: Material, file: Path) -> list[list[float]]:
    """Returns how much the probes lose without each head, (L, H)."""
    if not file.exists():
        write_whole(file, json.dumps(ablation_scores(teacher, material.part(False).probes)[1]).encode())
    return json.loads(file.read_text())


def far(teacher: Any, material: Material, n_groups: int, file: Path) -> Heads:
    """Returns the heads of the key/value heads that have to look far."""
    size = heads_per_group(teacher.config)
    with process_groups(CPU) as ranks:
        dealt = Dealt(ranks, file, shapes_of_heads(material.part(False), material.part(True)))
        found = find_heads(teacher, n_groups * size, [], dealt, material)
        dealt.rows.close()
    for one in found["sets"]:
        print(one["n_groups"], {name: str(Estimate(**figures["acc"])) for name, figures in one["probes"].items()})
    return parse_heads(found["names"])


def named(args: argparse.Namespace, teacher: Any, checked: Checked) -> list[tuple[str, list[int], Heads]]:
    """Returns the names of hybrids with their layers and heads."""
    size = heads_per_group(teacher.config)
    material, found = material_to_choose_on(teacher, checked), [("no heads", list[int](), Heads())]
    found += [(f"{n} far", [], far(teacher, material, n, args.output / "far.jsonl")) for n in args.far]
    if args.heads or args.groups:
        scores = scores_of(teacher, material, args.output / "ablation.json")
        found += [(f"{n} heads", [], strongest(scores, n, 1)) for n in args.heads]
        found += [(f"{n} groups of {size}", [], strongest(scores, n, size)) for n in args.groups]
    return [*found, *([(f"{len(args.layers)} layers", args.layers, {})] if args.layers else [])]


def strongest(scores: list[list[float]], n: int, size: int) -> Heads:
    """Returns the heads of the `n` groups of `size` heads with the largest sums of scores."""
    rows = [{"place": (i, j), "score": score} for i, of_layer in enumerate(scores) for j, score in enumerate(of_layer)]
    return parse_heads(strongest_heads(rows, n * size, [], size)["names"])


class Hybrids:
    """Makes hybrids of a student and its teacher, in folders that stay."""

    def __init__(self, args: argparse.Namespace, teacher: Any) -> None:
        self.args, self.teacher = args, teacher

    def of(self, name: str, layers: list[int], heads: Heads) -> Iterator[tuple[str, Any]]:
        """Yields a hybrid as it is without training, and with heads also beside mixers fitted for it; then trained."""
        folder = self.args.output / name.replace(" ", "-")
        student = Path(self.args.student)
        yield " cut out" if heads else "", self._with_parts(student, layers, heads)
        if heads:
            student = self._fitted(folder / "student", heads)
            yield " fitted beside", self._with_parts(student, [], heads)
        if self.args.align and self.args.distil and (layers or heads):
            last = self._trained(folder, student, named_parts(layers, heads).split())
            yield ", trained", get_student_model(str(last), torch.float32, CPU).eval()

    def _with_parts(self, student: Path, layers: list[int], heads: Heads) -> Any:
        hybrid = get_student_model(str(student), torch.float32, CPU).eval()
        apply_replacements(hybrid, self.teacher, layers, heads)
        return hybrid

    def _fitted(self, folder: Path, heads: Heads) -> Path:
        text = ["--calibration", str(self.args.text / "train.jsonl"), "--output", str(folder)]
        line = [*self._models(), *text, *named_parts([], heads).split()]
        if make_student.main(parse_make_args(line)) != 0:
            raise RuntimeError(f"{folder} was not made")
        return folder

    def _trained(self, folder: Path, student: Path, parts: list[str]) -> Path:
        """Returns the checkpoint of a run that aligns, then distils."""
        text = ["--dataset_name", str(self.args.text / "train.jsonl"), "--no_dataset_streaming"]
        schedule = ["--warmup_steps", "3", "--decay_ratio", "0.75", "--save_interval", "40", "--save_total_limit", "1"]
        common = [*self._models(), *text, *schedule, *parts, "--teacher_placement", "colocated", "--resume", "auto"]
        stages = {
            "align": ["--stage", "align", "--max_steps", str(self.args.align)],
            "distil": ["--max_steps", str(self.args.distil), "--max_lr", "0.0001"],
        }
        for stage, options in stages.items():
            line = [*common, *options, "--student_model", str(student), "--output_dir", str(folder / stage)]
            subprocess.run([sys.executable, str(ROOT / "train_gpus.py"), *line], check=True)
            student = folder / stage / "latest"
        return student

    def _models(self) -> list[str]:
        return ["--preset", PRESET, "--teacher_model", self.args.teacher, "--local_files_only", "--dtype", "float32"]


@torch.no_grad()
def figures_of(case: str, model: Any, teacher: Any, material: Material) -> Row:
    """Returns a row: key/value heads that are kept, the KL with half of its interval over windows, and the share of
    right answers of each probe.
    """
    kls = [kl for some in material.windows.split(WINDOWS_AT_ONCE) for kl in kl_of(model, teacher, some)]
    kl, config = estimate(kls), model.config
    of_layer = getattr(config, "n_kv_heads_of", lambda _: config.num_key_value_heads)
    row: Row = {"case": case, "key/value heads": sum(map(of_layer, range(config.num_hidden_layers)))}
    row |= {"kl": kl.mean, "+-": kl.half}
    for probe in material.probes:
        hidden = model.base_model(probe.ids, use_cache=False).last_hidden_state
        row[probe.name] = estimate(probe.score(hidden, model.get_output_embeddings()).acc).mean
    return row


def short_sighted(case: str, heads: Heads, teacher: Any, material: Material) -> Row:
    """Returns a row of the teacher itself, of which only these heads, with all of their key/value heads, see far."""
    short = ShortSighted(teacher, material.probes)
    far = frozenset((layer, head // short.per_group) for layer, kept in heads.items() for head in kept)
    scores = short.scores(far)
    return {"case": case, "key/value heads": len(far), **{name: estimate(scores[name].acc).mean for name in scores}}


def kl_of(model: Any, teacher: Any, windows: torch.Tensor) -> list[float]:
    """Returns KL(teacher || model) of each window (n, S + 1), the mean over tokens in nats."""
    own, given = (m(windows[:, :-1], use_cache=False).logits.log_softmax(-1) for m in (model, teacher))
    return F.kl_div(own, given, log_target=True, reduction="none").sum(-1).mean(-1).tolist()


if __name__ == "__main__":
    main()
