"""Runs that evaluate, and the same runs without, on forked ranks, for test_evaluator.py beside this file."""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from monitoring import evaluator
from tests.faults.scenarios import Scene, on_rank, signal_self
from tests.faults.traps import killing_at, trap
from tests.launch import ROOT
from tests.small_runs import make_models

TINY = ROOT / "presets" / "tiny"
TEXT = dict(eval_dataset_name=TINY / "text" / "english.txt", eval_windows=7)  # four batches, the last not full
QUESTIONS = dict(eval_mmlu_dir=TINY / "mmlu", eval_mmlu_limit=3)
BASE = dict(max_steps=6, teacher_prefetch=1)
EVALUATED = dict(**BASE, eval_interval=2, layer_map_interval=2, **TEXT, **QUESTIONS)
ALIGNED = dict(**BASE, stage="align")
STREAM = dict(no_dataset_streaming=False, shuffle_buffer=10)
AT_REST = dict(max_steps=1, max_lr=0, min_lr=0, save_interval=0, **TEXT)  # its weights stay as they were


def play(folder: Path) -> None:
    make_models(folder)

    def run(name: str, n_ranks: int = 2, arm: Callable[[int], None] | None = None, **changes) -> None:
        scene = Scene(folder, name)
        scene.run(n_ranks, arm, **changes)
        scene.keep()

    run("without", **BASE)
    run("with", **EVALUATED)
    run("stream-without", **BASE, **STREAM)
    run("stream-with", **EVALUATED, **STREAM)
    for n_ranks in (1, 2, 3):
        run(f"ranks-{n_ranks}", n_ranks, **AT_REST, **QUESTIONS, eval_interval=1)
    run("logits", **AT_REST, eval_interval=5, teacher_signal="logits")  # the last step is due in any case
    run("colocated", **AT_REST, eval_interval=5, teacher_placement="colocated")
    run("align", **AT_REST, eval_interval=5, stage="align", kl_weight=0)
    run("align-without", **ALIGNED)
    run("align-with", **EVALUATED, stage="align")
    run("no-teacher", 1, **AT_REST, eval_interval=5, kl_weight=0)
    run("other-windows", 2, on_rank(1, lambda: change_argument("--eval_windows", "6")), **AT_REST, eval_interval=1)

    killed = Scene(folder, "killed")
    killed.run(arm=killing_at("in an evaluation", 3, rank=1), **EVALUATED)
    killed.run(arm=lambda rank: trap(evaluator, "held_out_sums", 1, lambda: time.sleep(2)), resume="auto", **EVALUATED)
    killed.keep()

    stopped = Scene(folder, "stopped")
    for rank, function, n, number in ((1, "held_out_sums", 3, signal.SIGTERM), (0, "answer", 1, signal.SIGUSR1)):
        act = signal_self(number)
        arm = on_rank(rank, lambda function=function, n=n, act=act: trap(evaluator, function, n, act))
        stopped.run(arm=arm, resume="auto", **EVALUATED)
    stopped.keep()


def change_argument(flag: str, value: str) -> None:
    sys.argv[sys.argv.index(flag) + 1] = value
