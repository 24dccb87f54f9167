"""Runs train_gpus.py's main as torchrun would, and keeps every rank's final weights: `<output_dir>/rank-<r>.pt`.
Started by torchrun from tests/test_train_script.py.
"""

import sys
from pathlib import Path

import torch

import train_gpus
from utils import run_entry

real_distil = train_gpus.distil


def distil_and_dump(args, batches, total_steps, progress, model, optimizer, lane, ranks, *rest):
    code = real_distil(args, batches, total_steps, progress, model, optimizer, lane, ranks, *rest)
    torch.save(model.module.student.state_dict(), Path(args.output_dir) / f"rank-{ranks.rank}.pt")
    return code


train_gpus.distil = distil_and_dump
sys.exit(run_entry(train_gpus.main))
