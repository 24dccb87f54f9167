"""Does selection/ choose well? Tried where the answer is known. From the repository's folder:

    python -m benchmarks.bench_choice

planted  twenty teachers that copy by construction, in two heads that the seed draws (planted_teacher.py): whether the
         two layers, and the two heads, without which copying is worst are these. At the noise of the default, and at
         one where the teacher itself errs.
tiny     all twenty hybrids of the tiny preset with three of six layers recurrent: their KL to the teacher, and loss and
         accuracy on the preset's questions, before and after the same short training; and the ranks among them of the
         sets that are chosen, on other text and questions, by KL alone and with the questions. value: KL + 0.3 * loss,
         what the latter makes small.

The tiny teacher can do neither of the probes that choose_layers.py has; its own questions are a probe of retrieval,
too: their answer is in the prompt and nowhere else. --quick: two seeds; little text and no training.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arguments import TrainArguments
from benchmarks.harness import Row, report
from benchmarks.planted_teacher import NOISE, VOCAB, planted_teacher
from distillation.losses import shared_vocab
from distillation.objective import DistillationModel
from distillation.teacher import teacher_head
from distillation.teacher_forward import last_hidden_states
from evaluation.held_out import WINDOWS_AT_ONCE, HeldOutText, read_windows
from evaluation.mmlu import build_questions
from evaluation.mmlu_files import load_mmlu
from inputs.option_values import preset_values
from llamba import LlambaForCausalLM
from model_utils import apply_replacements, get_student_model, get_teacher_model, get_tokenizer, prepare_student
from processes.ranks import process_groups
from selection.ablation import Ablations, ablation_scores
from selection.choosing import Request, choose
from selection.material import Material
from selection.probes import NOT_AN_ANSWER, Probe, random_copies
from selection.statistics import estimate
from selection.swaps import Swaps
from text.batch import Batch
from text.sources import TextSource

TINY = Path(__file__).parents[1] / "presets" / "tiny"
CPU = torch.device("cpu")
CASES = ("planted", "tiny")
SEEDS = 20
N_KEPT = 3
SEQ_LENGTH = 256
PROBE_WEIGHT = 0.3  # choose_layers.py's own
STEPS, BATCH, WARMUP, RATE = 40, 2, 4, 5e-4  # of the training; the preset's README has that rate as a good one


def main(argv: list[str] | None = None) -> list[Row]:
    """Prints the tables, and returns the rows of all."""
    args = parse(argv)
    rows: list[Row] = []
    if "planted" in args.cases:
        rows += planted(2 if args.quick else SEEDS)
    if "tiny" in args.cases:
        rows += tiny(args)
    report(rows, args.json)
    return rows


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="only these (default: all)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each training (default: {STEPS})")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    parser.add_argument("--quick", action="store_true", help="smallest sizes, no training: a trial, no result")
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = 0
    return args


# --- heads that are known ----------------------------------------------------------------------------------------


def planted(n_seeds: int) -> list[Row]:
    """Returns a row for each strength of noise: how well the teachers copy, and how often what is planted is found."""
    rows = []
    for noise in (NOISE, 0.02):
        accuracies, layers, heads = [], 0, 0
        for seed in range(n_seeds):
            model, circuit = planted_teacher(seed, noise=noise)
            probes = [random_copies(range(VOCAB), 4, 24, 4, seed)]
            accuracies += Ablations(model, probes).teacher_scores["copying"].acc
            of_layers, of_heads = ablation_scores(model, probes)
            by_place = {(i, h): score for i, row in enumerate(of_heads) for h, score in enumerate(row)}
            layers += set(worst_without(dict(enumerate(of_layers)))) == circuit.layers
            heads += set(worst_without(by_place)) == circuit.heads
        acc = sum(accuracies) / len(accuracies)
        found = {"layers found": f"{layers} of {n_seeds}", "heads found": f"{heads} of {n_seeds}"}
        rows.append({"case": f"planted, noise {noise}", "copies": acc, "worst copies": min(accuracies), **found})
    return rows


def worst_without(scores: dict[Any, float]) -> list[Any]:
    """Returns the two places with the largest growth of the loss."""
    return sorted(scores, key=lambda place: -scores[place])[:2]


# --- all sets ----------------------------------------------------------------------------------------------------


def tiny(args: argparse.Namespace) -> list[Row]:
    """Returns a row for each set of three layers, the lowest KL first, and one for each choice: its ranks."""
    n_windows, n_questions = (3, 2) if args.quick else (24, 25)  # questions of each subject
    teacher = get_teacher_model(str(TINY / "teacher"), torch.float32, CPU)
    student = get_student_model(str(TINY / "student"), torch.float32, CPU).eval().requires_grad_(False)
    tokenizer = get_tokenizer("--teacher", str(TINY / "teacher"))
    windows = held_out("heldout.jsonl", tokenizer, 2 * n_windows)
    questions = question_probe(tokenizer, 2 * n_questions)
    own, other = (Material(windows[part::2], [questions.part(range(part, questions.n_texts, 2))]) for part in range(2))
    with process_groups(CPU) as ranks:
        chosen = {}
        for name, probes in (("KL alone", []), ("KL and questions", own.probes)):
            request = Request(Material(own.windows, probes), N_KEPT, PROBE_WEIGHT, ablates=False)
            chosen[name] = tuple(choose(teacher, student, request, ranks)["layers"])
    rows = before(teacher, student, other)
    if args.steps:
        batches = held_out("train.jsonl", tokenizer, args.steps * BATCH)
        for kept, row in rows.items():
            row |= after(teacher, kept, other, batches)
            print(row, file=sys.stderr)
    return [*rows.values(), *(ranks_of(name, kept, rows) for name, kept in chosen.items())]


def held_out(file: str, tokenizer: Any, n_windows: int) -> Tensor:
    """Returns the first windows of one of the preset's texts: (n, S + 1)."""
    source = TextSource(str(TINY / "text" / file), local_files_only=True)
    return read_windows(source, tokenizer, n_windows, SEQ_LENGTH)


def question_probe(tokenizer: Any, n_questions: int) -> Probe:
    """Returns the probe of the preset's questions, `n_questions` of each subject, the subjects in turn. The letter is
    the answer; it is right where it is the likeliest of all tokens.
    """
    by_subject = [build_questions([subject], 0, n_questions) for subject in load_mmlu(str(TINY / "mmlu"))]
    asked = [question for turn in zip(*by_subject, strict=True) for question in turn]
    texts = [tokenizer(f"{question.prompt} {question.answer}").input_ids for question in asked]
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)  # (n, L)
    answer = torch.full_like(ids, NOT_AN_ANSWER)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.tensor(text)
        answer[row, len(text) - 1] = 0
    return Probe("questions", ids, answer, tuple(range(len(texts))), 0.25)


def before(teacher: Any, student: LlambaForCausalLM, texts: Material) -> dict[tuple[int, ...], Row]:
    """Returns of all sets, by the layers that are kept, their figures without training, the lowest KL first."""
    n_layers = student.config.n_layer
    sets = list(itertools.combinations(range(n_layers), N_KEPT))
    found = Swaps(teacher, student, texts.windows, texts.probes).measure(
        [frozenset(range(n_layers)) - set(kept) for kept in sets]
    )
    rows = {}
    for kept, figures in zip(sets, found, strict=True):
        score = figures.probes["questions"]
        rows[kept] = {"case": f"tiny, keeps {' '.join(map(str, kept))}", "kl": estimate(figures.kl).mean}
        rows[kept] |= {"loss": estimate(score.loss).mean, "acc": estimate(score.acc).mean}
        rows[kept]["value"] = value(rows[kept]["kl"], rows[kept]["loss"])
    return dict(sorted(rows.items(), key=lambda item: item[1]["kl"]))


def after(teacher: Any, kept: Sequence[int], texts: Material, batches: Tensor) -> Row:
    """Returns the figures of a hybrid that was trained on `batches` (n, S + 1), by the preset's own loss."""
    student = trained(teacher, kept, batches)
    text, starts = HeldOutText(texts.windows, CPU), range(0, len(texts.windows), WINDOWS_AT_ONCE)
    text.ask_teacher(teacher, list(starts))
    sums = [text.compare(student, start) for start in starts]
    (probe,) = texts.probes
    with torch.no_grad():
        score = probe.score(student.backbone(probe.ids, use_cache=False).last_hidden_state, student.lm_head)
    kl, loss, acc = sum(sums[1:], start=sums[0]).means()["kl"], estimate(score.loss).mean, estimate(score.acc).mean
    return {"trained kl": kl, "trained loss": loss, "trained acc": acc, "trained value": value(kl, loss)}


def value(kl: float, loss: float) -> float:
    """Returns what a choice makes small, but for the teacher's own loss, which is the same for all."""
    return kl + PROBE_WEIGHT * loss


def trained(teacher: Any, kept: Sequence[int], batches: Tensor) -> LlambaForCausalLM:
    """Returns a hybrid after some steps of AdamW at a constant rate."""
    values = preset_values("tiny", TrainArguments, "train") | {"layers": list(kept)}
    args = TrainArguments(**values)
    student = get_student_model(str(TINY / "student"), torch.float32, CPU)
    apply_replacements(student, teacher, list(kept))
    prepare_student(student, args)
    vocab = shared_vocab(student.config.vocab_size, teacher.config.vocab_size)
    model = DistillationModel(student, teacher_head(teacher, vocab), vocab, args).train()
    weights = [parameter for parameter in student.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step, part in enumerate(parts(batches), 1):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, step / WARMUP)
        with torch.no_grad():
            answer = last_hidden_states(teacher, part.input_ids)
        loss, _ = model(part, answer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return student.eval()


def parts(batches: Tensor) -> Iterator[Batch]:
    for windows in batches.split(BATCH):
        labels = windows[:, 1:]
        yield Batch(windows[:, :-1], labels, torch.ones_like(labels, dtype=torch.bool))


def ranks_of(name: str, kept: tuple[int, ...], rows: dict[tuple[int, ...], Row]) -> Row:
    """Returns the rank of a set in each column, 1 for the lowest, of accuracies the highest."""
    row: Row = {"case": f"ranks of {' '.join(map(str, kept))}, chosen by {name}"}
    for column in next(iter(rows.values())):
        if column != "case":
            sign = -1 if column.endswith("acc") else 1
            own = sign * rows[kept][column]
            row[column] = 1 + sum(sign * other[column] < own for other in rows.values())
    return row


if __name__ == "__main__":
    main()
