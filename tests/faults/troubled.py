"""train_gpus.py for a torchrun that restarts it: rank 1 fails at its sixth micro step; after the restart, rank 0 is
asked to stop at its second.
"""

import os
import signal
import sys

import train_gpus
from processes.exits import run_entry
from tests.faults.scenarios import at_micro_step, fail, signal_self

TROUBLES = {
    ("1", "0"): (6, fail(RuntimeError("fails once"))),
    ("0", "1"): (2, signal_self(signal.SIGTERM)),
}

if __name__ == "__main__":
    trouble = TROUBLES.get((os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]))
    if trouble is not None:
        at_micro_step(*trouble)
    sys.exit(run_entry(train_gpus.main))
