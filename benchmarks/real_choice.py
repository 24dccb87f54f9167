"""Compares the layers that are chosen for a real teacher with random sets of the same size, on texts that nothing was
chosen on. From the repository's folder, with what `make demo-real` has made:

    python -m benchmarks.real_choice --teacher teachers/smollm2-135m --student runs/demo-real/students/closed_form \\
        --text runs/demo-real/text/heldout.jsonl --output runs/choice

For each number of recurrent layers it prints the KL to the teacher and the right answers of the probes of the chosen
set, of a ranking by single swaps, of layers at equal distances, and of the random ones. The same command resumes.
"""

import argparse
import random
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, report
from model_utils import DTYPES, get_student_model, get_teacher_model
from processes.ranks import process_groups
from selection.checks import check_choice, read_material
from selection.choosing import DIRECTIONS, Request, choose
from selection.material import Material, usable
from selection.measurements import FILE
from selection.options import ChooseArguments, parse_choose_args
from selection.statistics import estimate
from selection.swaps import Figures, Recurrent, Swaps, share_models

SPREAD = "+-"


def main(argv: list[str] | None = None) -> list[Row]:
    """Prints the table, and returns its rows."""
    args = parse(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    options = options_of(args)
    checked = check_choice(options)
    material = read_material(options, checked)
    dtype = DTYPES[options.dtype]
    teacher = get_teacher_model(checked.teacher, dtype, checked.device)
    student = get_student_model(checked.student, dtype, checked.device).eval().requires_grad_(False)
    share_models(student, teacher)
    sets: dict[int, dict[str, Recurrent]] = {}
    n_layers = student.config.n_layer
    with process_groups(checked.device) as ranks:
        for n in args.recurrent:
            request = Request(material, n_layers - n, options.probe_weight, False, tuple(args.directions))
            found = choose(teacher, student, request, ranks, args.output / FILE)
            sets[n] = named_sets(found, args.random)
    rows = measured(teacher, student, material, sets)
    report(rows, args.json)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("teacher", "student", "text"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of measured.jsonl, which is resumed")
    parser.add_argument("--recurrent", type=int, nargs="+", default=[8, 15], help="numbers of recurrent layers")
    parser.add_argument("--random", type=int, default=20, help="random sets of each number (default: 20)")
    parser.add_argument("--directions", nargs="+", choices=DIRECTIONS, default=DIRECTIONS, help="of the search")
    parser.add_argument("--windows", type=int, default=12, help="of 256 tokens; a third is not chosen on")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    return parser.parse_args(argv)


def options_of(args: argparse.Namespace) -> ChooseArguments:
    """Returns what choose_layers.py would be called with, but for the budget."""
    texts = ["--text", args.text, "--text_windows", str(args.windows), "--output", str(args.output)]
    models = ["--teacher_model", args.teacher, "--student_model", args.student, "--local_files_only"]
    return parse_choose_args([*models, *texts, "--dtype", "float32", "--budget", "1"])


def named_sets(found: dict[str, Any], n_random: int) -> dict[str, Recurrent]:
    """Returns sets of recurrent layers of the size of a choice, by how they were found."""
    every, n_kept = frozenset(range(found["n_layers"])), len(found["layers"])
    dice = random.Random(n_kept)
    sets = {"chosen": every - set(found["layers"])}
    sets |= {one["by"]: every - set(one["kept"]) for one in found["sets"] if len(one["kept"]) == n_kept}
    return sets | {f"random {i}": every - set(dice.sample(sorted(every), n_kept)) for i in range(n_random)}


def measured(teacher: Any, student: Any, material: Material, sets: dict[int, dict[str, Recurrent]]) -> list[Row]:
    """Returns the figures of all sets on the texts that were kept aside; of the random ones the best and the median of
    each figure, and how many are better than the chosen set.
    """
    choosing = Swaps(teacher, student, material.part(False).windows[:1], material.part(False).probes)
    aside = usable(material, choosing.teacher_figures.probes).part(True)
    del choosing
    swaps = Swaps(teacher, student, aside.windows, aside.probes)
    rows = [figures_of("the teacher", swaps.teacher_figures)]
    for n, named in sets.items():
        found = {name: figures_of(f"{n} recurrent, {name}", swaps.figures(one)) for name, one in named.items()}
        drawn = [found.pop(name) for name in list(found) if name.startswith("random")]
        rows += [*found.values(), *(of_random(n, drawn, found["chosen"]) if drawn else ())]
    return rows


def of_random(n: int, drawn: list[Row], chosen: Row) -> list[Row]:
    """Returns rows of the best and the median of each figure, a KL being better where it is smaller."""
    rows: list[Row] = [{"case": f"{n} recurrent, {title} {len(drawn)} random"} for title in ("best of", "median of")]
    rows.append({"case": f"{n} recurrent, random ones better than the chosen"})
    for name in chosen:
        if name not in ("case", SPREAD):
            ordered = sorted((row[name] for row in drawn), reverse=name != "kl")
            n_better = sum((value < chosen[name]) == (name == "kl") and value != chosen[name] for value in ordered)
            for row, value in zip(rows, (ordered[0], ordered[len(ordered) // 2], n_better), strict=True):
                row[name] = value
    return rows


def figures_of(case: str, figures: Figures) -> Row:
    """Returns a row: the KL with half of its interval over windows, and the share of right answers of each probe."""
    kl = estimate(figures.kl)
    row: Row = {"case": case, "kl": kl.mean, SPREAD: kl.half}
    return row | {name: estimate(score.acc).mean for name, score in figures.probes.items()}


if __name__ == "__main__":
    main()
