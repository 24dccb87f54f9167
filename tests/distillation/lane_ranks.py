"""The ranks of test_teacher.py beside this file: they ask a stand-in teacher through the real lane while their main
threads are busy with collectives of another group, as DDP is. `main` ends without an error if every rank got its own
answers. Its arguments: PREFETCH BATCHES FAILS_AT.
"""

import sys
import threading
from types import SimpleNamespace

import torch
import torch.distributed as dist

from distillation.teacher import TeacherLane, ask_ahead
from distillation.teacher_forward import Teacher
from processes.ranks import process_groups
from text.batch import Batch

WIDTH = 5


class StandIn:
    """Answers ids (B, S) with (B, S, WIDTH) of id * 1000 + column, in bfloat16's exact range."""

    width, signal, answers = WIDTH, "hidden", Teacher.answers
    model = SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)

    def __init__(self, fails_at):
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, input_ids):
        assert threading.current_thread().name == "teacher-lane"
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("the stand-in teacher is out of memory")
        return expected(input_ids)


def expected(input_ids):
    return (input_ids[..., None] + torch.arange(WIDTH)).to(torch.bfloat16)


def main():
    prefetch, n_batches, fails_at = (int(word) for word in sys.argv[1:])
    dist.set_debug_level_from_env()  # as torch does when it is imported
    with process_groups(torch.device("cpu")) as ranks:
        batches = [Batch.from_windows(torch.full((2, 4), 10 * i + ranks.rank)) for i in range(n_batches)]
        lane = TeacherLane(StandIn(fails_at), ranks, prefetch)
        for i, (batch, asked) in enumerate(ask_ahead(batches, lane)):
            work = torch.full((100_000,), float(ranks.rank))
            if (i + ranks.rank) % 2:  # before its answer on some ranks, after it on others
                dist.all_reduce(work)
                signal = asked.result()
            else:
                signal = asked.result()
                dist.all_reduce(work)
            assert work[0] == sum(range(ranks.world_size))
            assert signal.dtype == torch.bfloat16 and torch.equal(signal, expected(batch.input_ids)), ranks.rank
        assert i == n_batches - 1
        lane.close()
