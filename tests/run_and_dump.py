"""train_gpus.py's main that also keeps every rank's final weights: `<output_dir>/rank-<r>.pt`. For
tests/test_train_script.py, which starts it by torchrun or in forks. In the environment, FAIL_ON_RANK has that rank fail
when it takes the batch of micro step FAIL_AT_MICRO_STEP, and COMPILE_BACKEND is torch.compile's backend.
"""

import functools
import os
import sys
from pathlib import Path

import torch

import train_gpus
from processes.exits import run_entry
from utils import TimedIterator

real_distil = train_gpus.distil


def take_a_batch_or_fail(batches, fails_at, rank):
    for micro_step, batch in enumerate(batches, start=1):
        if micro_step == fails_at:
            raise OSError(f"the disk of rank {rank} is gone")
        yield batch


def distil_and_dump(job, batches, learner, *rest):
    rank = job.ranks.rank
    if os.environ.get("FAIL_ON_RANK") == str(rank):
        batches = TimedIterator(take_a_batch_or_fail(batches, int(os.environ["FAIL_AT_MICRO_STEP"]), rank))
    state = real_distil(job, batches, learner, *rest)
    torch.save(learner.student.state_dict(), Path(job.args.output_dir) / f"rank-{rank}.pt")
    return state


def main():
    if "COMPILE_BACKEND" in os.environ:
        torch.compile = functools.partial(torch.compile, backend=os.environ["COMPILE_BACKEND"])
    train_gpus.distil = distil_and_dump
    return train_gpus.main()


if __name__ == "__main__":
    sys.exit(run_entry(main))
