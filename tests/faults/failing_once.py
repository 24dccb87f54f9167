"""train_gpus.py with a rank 1 that fails at its sixth micro step, unless torchrun has restarted it."""

import os
import sys

import train_gpus
from tests.faults.scenarios import at_micro_step, fail
from utils import run_entry

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    at_micro_step(6, fail(RuntimeError("fails once")))
sys.exit(run_entry(train_gpus.main))
