"""What waiting for the teacher costs: two students and a stand-in teacher of known delays, through the product's own
lane, with hidden states of real size (2 x 1024 x 4096 in bfloat16 a rank) on the wire.

In sequence a step takes the sum of the teacher's time for both ranks and a student's step; one step ahead it should
take the longer of the two; colocated, a student's step and the teacher's time for one rank.

    python benchmarks/bench_overlap.py [--json FILE] [--quick]
"""

import os
import socket
import statistics
import time
from types import SimpleNamespace

import torch
import torch.multiprocessing as mp
from harness import parse_arguments, report, run_rounds

CASES = {  # the teacher's milliseconds for one rank's batch, and a student's for its step
    "teacher 2 x 40 ms, student 100 ms": (0.040, 0.100),
    "teacher 2 x 80 ms, student 100 ms": (0.080, 0.100),
}
CANDIDATES = ["in sequence", "one step ahead", "colocated"]
RANKS, BATCH, SEQ_LEN, D_TEACHER = 2, 2, 1024, 4096


class StandIn:
    """A teacher that takes `seconds` for a batch, on a device that the CPU has nothing to do with meanwhile."""

    width = D_TEACHER
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.answer = torch.randn(BATCH, SEQ_LEN, D_TEACHER).to(torch.bfloat16)

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return self.answer


def run(case: str, candidate: str, steps: int) -> dict:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_rank, (case, candidate, steps, results), nprocs=RANKS)
    return results.get()


def _rank(rank: int, case: str, candidate: str, steps: int, results) -> None:
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
        lane = ColocatedTeacher(teacher, ranks.device) if candidate == "colocated" else TeacherLane(teacher, ranks)
        prefetch = 1 if candidate == "one step ahead" else 0
        ends = []
        for _, asked in ask_ahead([Batch.from_windows(windows)] * steps, lane, prefetch):
            asked.result()
            time.sleep(student_s)
            torch.distributed.all_reduce(torch.zeros(1))  # the students step together
            ends.append(time.perf_counter())
        waited = lane.waits.take() / steps
        lane.close()
    if rank == 0:
        laps = [after - before for before, after in zip(ends[1:-1], ends[2:], strict=True)]
        results.put({"seconds": statistics.median(laps), "teacher_wait_s": waited})


def main() -> None:
    args = parse_arguments(__doc__)
    wanted = [name for name in CASES if not args.cases or any(part in name for part in args.cases)]
    names = [name for name in CANDIDATES if not args.candidates or name in (*args.candidates, CANDIDATES[0])]
    cases = dict.fromkeys(wanted[:1] if args.quick else wanted, names)
    rows = run_rounds(__file__, cases, 1 if args.quick else args.rounds, CANDIDATES[0], 5 if args.quick else 20)
    report(rows, args.json)


if __name__ == "__main__":
    main()
