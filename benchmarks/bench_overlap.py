"""What waiting for the teacher costs: two students ask a stand-in teacher of known delays by the project's own code,
with hidden states of real size (2 x 1024 x 4096 in bfloat16 a rank) on the wire.

In sequence, a step takes the teacher's time for both ranks plus a student's step; one step ahead, it should take the
longer of the two; colocated, a student's step plus the teacher's time for one rank.

    python benchmarks/bench_overlap.py [--json FILE] [--quick]
"""

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
import torch.multiprocessing as mp
from harness import parse_options, report, run_rounds

CASES = {  # the teacher's milliseconds for one rank's batch, and a student's for its step
    "teacher 2 x 40 ms, student 100 ms": (0.040, 0.100),
    "teacher 2 x 80 ms, student 100 ms": (0.080, 0.100),
}
CANDIDATES = ["in sequence", "one step ahead", "colocated"]
RANKS, BATCH, SEQ_LEN, D_TEACHER = 2, 2, 1024, 4096


class StandIn:
    """Answers each batch after sleeping for `seconds`: like a teacher on a GPU, it leaves the CPU free meanwhile."""

    width = D_TEACHER
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.answer = torch.randn(BATCH, SEQ_LEN, D_TEACHER).to(torch.bfloat16)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.answer

    def answers(self, batches: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yields the answers to the ranks' batches. Each takes its time: that of a GPU grows with the tokens."""
        return map(self, batches)


def run(case: str, candidate: str, steps: int) -> dict:
    """Runs both ranks. Returns the first rank's median seconds of a step, and what it waited for the teacher."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, (case, candidate, steps, results.put), nprocs=RANKS)
    return results.get()


def run_rank(rank: int, case: str, candidate: str, steps: int, give: Callable[[dict], None]) -> None:
    """Runs one rank; the first calls `give` with its figures."""
    from distillation.teacher import ColocatedTeacher, TeacherLane, ask_ahead
    from processes.ranks import process_groups
    from text.batch import Batch

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    torch.set_num_threads(1)
    teacher_s, student_s = CASES[case]
    windows = torch.zeros(BATCH, SEQ_LEN + 1, dtype=torch.int64)
    with process_groups(torch.device("cpu")) as ranks:
        teacher = StandIn(teacher_s)
        prefetch = 1 if candidate == "one step ahead" else 0
        lane: ColocatedTeacher | TeacherLane = TeacherLane(teacher, ranks, prefetch)
        if candidate == "colocated":
            lane = ColocatedTeacher(teacher, ranks.device)
        ends = []
        for _, asked in ask_ahead([Batch.from_windows(windows)] * steps, lane):
            asked.result()
            time.sleep(student_s)
            torch.distributed.all_reduce(torch.zeros(1))  # the students step together
            ends.append(time.perf_counter())
        waited = lane.waits.take() / steps
        lane.close()
    if rank == 0:
        laps = [after - before for before, after in zip(ends[1:-1], ends[2:], strict=True)]
        give({"seconds": statistics.median(laps), "teacher_wait_s": waited})


def main() -> None:
    options = parse_options(__doc__, CASES, CANDIDATES, CANDIDATES[:1])
    cases = dict.fromkeys(options.cases, options.candidates)
    rows = run_rounds(__file__, cases, options.rounds, CANDIDATES[0], 5 if options.quick else 20)
    report(rows, options.json)


if __name__ == "__main__":
    main()
