"""Moving the teacher's answer to the students: seconds, bytes and memory of local gloo processes, side by side.

    python benchmarks/bench_wire.py --json wire.json

Each rank's input_ids go to the first rank; its teacher answers all of them at once and at no cost (the answers are
prepared), in bfloat16; each rank gets its own answer, which is checked.

broadcast logits   the original way: every rank's logits go to every rank
scatter logits     each rank's logits go to that rank alone
scatter hidden     the teacher's last hidden states instead, from which a rank forms the logits in its loss
ours               what training does: distillation.teacher.TeacherLane with hidden states, waited for at once
ours, logits       the same with --teacher_signal logits
ours, ahead        as ours, but a student's step of 0.1 s (a sleep) lies between asking and waiting: seconds is what
                   the step still waits

seconds: of the slowest rank, until it has its answer; default_seconds: with glibc's default allocator, with which every
new buffer is paged in again. peak_bytes: of the rank with the highest peak, without the teacher's answers, which exist
before. wire_bytes: ids and answers that are sent from one process to another, computed from their shapes.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from harness import CACHING, Row, measure, parse_options, report, run_child
from torch import Tensor
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

BASELINE = "broadcast logits"
CASES = [f"ranks={ranks} B=2 S=1024 V=128256 D=4096" for ranks in (2, 4)]
QUICK_CASES = ["ranks=3 B=2 S=32 V=1000 D=64"]
REPEATS = 3  # of a candidate in one round
STEP_S = 0.1
DTYPE = torch.bfloat16

# Sends a rank's input_ids (B, S) and returns a function that waits for their answer (B, S, width).
Ask = Callable[[Tensor], Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """Holds the sizes that the name of a case gives, and the width of a candidate's answers."""

    ranks: int
    batch: int
    seq_len: int
    width: int

    @classmethod
    def parse(cls, name: str, candidate: str) -> "Case":
        sizes = {key: int(value) for key, value in (part.split("=") for part in name.split())}
        return cls(sizes["ranks"], sizes["B"], sizes["S"], sizes["V" if "logits" in candidate else "D"])

    def wire_bytes(self, copies: int) -> int:
        """Returns the bytes of the ids and of `copies` of each answer, without what the first rank keeps to itself."""
        id_bytes, answer_bytes = torch.int64.itemsize, self.width * DTYPE.itemsize
        return (self.ranks - 1) * self.batch * self.seq_len * (id_bytes + copies * answer_bytes)

    def input_ids(self, rank: int) -> Tensor:
        """Returns ids that are all the rank's number, by which the stand-in teacher finds the answer."""
        return torch.full((self.batch, self.seq_len), rank)  # (B, S)

    def answer_row(self, rank: int, row: int) -> Tensor:
        """Returns whole numbers that bfloat16 can hold; those of nearby tokens and columns differ."""
        first = (rank * self.batch + row) * self.seq_len
        tokens = (torch.arange(first, first + self.seq_len) % 121).to(torch.uint8)  # (S,)
        columns = (torch.arange(self.width) % 121).to(torch.uint8)  # (width,)
        return (tokens[:, None] + columns).to(DTYPE)  # (S, width)

    def all_answers(self) -> Tensor:
        """Returns the answers of all ranks, (W*B, S, width)."""
        answers = torch.empty(self.ranks * self.batch, self.seq_len, self.width, dtype=DTYPE)  # (W*B, S, width)
        for i, answer in enumerate(answers):
            answer.copy_(self.answer_row(i // self.batch, i % self.batch))
        return answers

    def empty_answer(self) -> Tensor:
        return torch.empty(self.batch, self.seq_len, self.width, dtype=DTYPE)  # (B, S, width)

    def check(self, answer: Tensor, rank: int) -> None:
        """Raises ValueError if this is not the answer to the rank's own input_ids."""
        for row in range(self.batch):
            if not torch.equal(answer[row], self.answer_row(rank, row)):
                raise ValueError(f"rank {rank} did not get the answer to its own row {row}")


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # gloo moves what is in the CPU's memory
    options = parse_options(__doc__, CASES, FORMS, [BASELINE], QUICK_CASES)
    rows = [row for case in options.cases for row in measure_case(case, options.candidates, options.rounds)]
    report(rows, options.json)


def measure_case(case: str, candidates: list[str], rounds: int) -> list[Row]:
    """Returns a row of medians for each candidate: time with a caching allocator, as for CUDA's pinned memory, and with
    glibc's; memory with glibc's, which returns what is free.
    """
    caching = run_child(__file__, "run", case, candidates, rounds, environment=CACHING)
    default = run_child(__file__, "run", case, candidates, rounds)
    print(f"{case}: caching {caching}, default {default}", file=sys.stderr, flush=True)
    rows = []
    for candidate in candidates:
        row: Row = {"case": case, "candidate": candidate, "seconds": statistics.median(caching[candidate]["seconds"])}
        row["default_seconds"] = statistics.median(default[candidate]["seconds"])
        row["peak_bytes"] = statistics.median(default[candidate]["peak_bytes"])
        shapes = Case.parse(case, candidate)
        row["wire_bytes"] = shapes.wire_bytes(copies=shapes.ranks if candidate == BASELINE else 1)
        row["ratio_to_baseline"] = row["seconds"] / statistics.median(caching[BASELINE]["seconds"])
        rows.append(row)
    return rows


# --- one run, in a process of its own ------------------------------------------------------------------------


def run(case: str, candidates: list[str], rounds: int) -> Row:
    """Starts all ranks as torchrun would. Returns the first rank's figures, which are reduced over ranks."""
    from distillation import teacher  # noqa: F401  (once, before the ranks are forked)

    ranks = Case.parse(case, BASELINE).ranks
    launch = LaunchConfig(
        1, 1, ranks, start_method="fork", max_restarts=0, rdzv_backend="c10d", rdzv_endpoint="localhost:0"
    )
    return elastic_launch(launch, run_rank)(case, candidates, rounds)[0]


def run_rank(name: str, candidates: list[str], rounds: int) -> dict[str, Row]:
    """Returns seconds and peak bytes of each candidate, one of each per round."""
    from processes.ranks import process_groups

    figures: dict[str, Row] = {candidate: {"seconds": [], "peak_bytes": []} for candidate in candidates}
    with process_groups(torch.device("cpu")) as ranks:
        cases = {candidate: Case.parse(name, candidate) for candidate in candidates}
        answers = {case.width: case.all_answers() for case in set(cases.values())} if ranks.owns_teacher else {}
        for _ in range(rounds):
            for candidate, case in cases.items():
                open_form = partial(FORMS[candidate], case, answers.get(case.width), ranks)
                with open_form() as ask:
                    case.check(ask(case.input_ids(ranks.rank))(), ranks.rank)
                    seconds = time_exchanges(ask, case.input_ids(ranks.rank), STEP_S if "ahead" in candidate else 0.0)
                peak = measure(partial(exchange_once, open_form, case.input_ids(ranks.rank)))["peak_bytes"]
                figures[candidate]["seconds"].append(largest_of_ranks(seconds))
                figures[candidate]["peak_bytes"].append(largest_of_ranks(peak))
    return figures


def time_exchanges(ask: Ask, input_ids: Tensor, step_s: float) -> float:
    """Returns the median seconds of an exchange, without the step between asking and waiting."""
    times = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        wait = ask(input_ids)
        if step_s:
            time.sleep(step_s)
            start = time.perf_counter()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def exchange_once(open_form: Callable[[], AbstractContextManager[Ask]], input_ids: Tensor) -> None:
    """Opens a form, exchanges once and closes it, so that what it keeps between two answers counts as its memory."""
    with open_form() as ask:
        ask(input_ids)()


def largest_of_ranks(value: float) -> float:
    """Returns the largest of the ranks' values."""
    largest = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


# --- the forms: each is opened on all ranks, and yields a function that asks ---------------------------------


def gather_ids(input_ids: Tensor, ranks: Any) -> None:
    gathered = [torch.empty_like(input_ids) for _ in range(ranks.world_size)] if ranks.owns_teacher else None
    dist.gather(input_ids, gathered, dst=0)


@contextmanager
def broadcast(case: Case, answers: Tensor | None, ranks: Any) -> Iterator[Ask]:
    """Broadcasts every answer to every rank. A rank keeps its own, and receives the others into one buffer."""

    def exchange(input_ids: Tensor) -> Tensor:
        gather_ids(input_ids, ranks)
        if answers is not None:
            parts = list(answers.split(case.batch))  # (B, S, vocab) each
        else:
            others = case.empty_answer()
            parts = [case.empty_answer() if rank == ranks.rank else others for rank in range(case.ranks)]
        for part in parts:
            dist.broadcast(part, src=0)
        return parts[ranks.rank]

    yield lambda input_ids: partial(exchange, input_ids)


@contextmanager
def scatter(case: Case, answers: Tensor | None, ranks: Any) -> Iterator[Ask]:
    """Scatters the answers: each rank gets its own alone."""

    def exchange(input_ids: Tensor) -> Tensor:
        gather_ids(input_ids, ranks)
        own = case.empty_answer()
        dist.scatter(own, None if answers is None else list(answers.split(case.batch)), src=0)
        return own

    yield lambda input_ids: partial(exchange, input_ids)


@contextmanager
def lane(case: Case, answers: Tensor | None, ranks: Any) -> Iterator[Ask]:
    """Opens the project's own TeacherLane, with a teacher that only looks up its answer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from distillation.teacher import TeacherLane
    from distillation.teacher_forward import Teacher

    class StandIn(Teacher):
        def __call__(self, input_ids: Tensor) -> Tensor:
            assert answers is not None  # only the rank that has them is asked
            return answers.split(case.batch)[int(input_ids[0, 0])]  # (B, S, width)

    with torch.device("meta"):
        config = LlamaConfig(hidden_size=case.width, num_attention_heads=1, num_hidden_layers=1)
        skeleton = LlamaForCausalLM(config).to(DTYPE)
    teacher_lane = TeacherLane(StandIn(skeleton, "hidden", vocab=0), ranks)
    yield lambda input_ids: teacher_lane.submit(input_ids).result
    teacher_lane.close()


FORMS: dict[str, Callable[[Case, Tensor | None, Any], AbstractContextManager[Ask]]] = {
    BASELINE: broadcast,
    "scatter logits": scatter,
    "scatter hidden": scatter,
    "ours": lane,
    "ours, logits": lane,
    "ours, ahead": lane,
}


if __name__ == "__main__":
    main()
