"""Full size on one GPU: what the card can do, the loss, the scan, training steps of 8B shapes, and their kernels.

    python benchmarks/bench_gpu.py --json gpu.json

Weights are random and made on the card: neither disk nor network is needed. Each part runs in its own process with a
time limit. If one fails or hangs, a line says why, the others still run, and the exit code is 1. Everything ends within
nine minutes, or --time_limit. `--short` measures one step, and fewer forms in fewer rounds. `--device cpu --quick` runs
the same code at tiny sizes, in one process: a trial, no result.

seconds: medians of interleaved rounds, by device events; of a step, the median by the host's clock. peak_bytes: the
most that was allocated beside inputs and results; of a step, all that was allocated, models included. The baseline is
the first candidate; of steps, the first case, by seconds per token. Errors are relative: the norm of the difference
from float64 over the norm. planned_bytes: what `train_gpus.py --dry_run` plans for the step, but the allowance for what
torch does not allocate.

In a step one GPU plays one rank of four: it has the whole teacher and student and a quarter of the optimizer's float32
masters and moments, as ZeRO shards them, and no traffic between ranks. A card with too little memory gets gradient
checkpointing, then models of fewer layers; the table has columns for both. mfu is the share of the measured matmul
rate. It counts products with weights, two floating-point operations per weight and token: in the forward passes of both
models, for the student's gradients by inputs, and for those by trained weights. Attention, the scan and what
checkpointing recomputes do not count.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from gpu_measure import PartRun
from harness import RESULT, ROOT, Row, print_table, write_json

TIME_LIMIT = 520.0  # seconds, for everything
LEAST_TIME = 15  # seconds; a process that has less is not started


class Part(NamedTuple):
    """Names what one process runs: a function of a module, with a limit in seconds."""

    section: str
    module: str
    seconds: float
    case: str = ""
    training_options: str = ""
    in_short: bool = False  # whether --short has it


# The most important come first, but the scan before all steps, since Triton keeps on disk what it compiles for it.
PARTS = [
    Part("card", "gpu_kernels", 60, in_short=True),
    Part("scan", "gpu_scan", 180, in_short=True),
    Part("step", "gpu_step", 110, "batch 2", "--batch_size 2", in_short=True),
    Part("loss", "gpu_kernels", 150, in_short=True),
    Part("profile", "gpu_profile", 90, "batch 2, colocated", "--batch_size 2 --teacher_placement colocated", True),
    Part("step", "gpu_step", 80, "batch 2, no prefetch", "--batch_size 2 --teacher_prefetch 0"),
    Part("step", "gpu_step", 80, "batch 2, colocated", "--batch_size 2 --teacher_placement colocated"),
    Part("step", "gpu_step", 150, "batch 2, compiled", "--batch_size 2 --compile"),
    Part("step", "gpu_step", 80, "batch 2, checkpointing", "--batch_size 2 --gradient_checkpointing"),
    Part("step", "gpu_step", 80, "batch 1", "--batch_size 1"),
    Part("profile", "gpu_profile", 90, "batch 2", "--batch_size 2"),
]
SECTIONS = ("card", "loss", "scan", "step", "profile")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the rows to this file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a trial, no result")
    parser.add_argument("--short", action="store_true", help="the most important parts, with fewer forms and rounds")
    parser.add_argument("--time_limit", type=float, default=TIME_LIMIT, metavar="S", help="seconds, for everything")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--parts", type=json.loads, help=argparse.SUPPRESS)  # what a child process is to do
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # and how long it may take
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --quick tries the script without one")
    if options.device == "cpu" and not options.quick:
        parser.error("--device cpu: models of this size take a CPU hours; add --quick")
    if options.parts:
        for values in options.parts:
            run_part(Part(*values), options)
        return 0

    deadline = time.monotonic() + options.time_limit
    parts = [part for part in PARTS if part.section in options.sections and (part.in_short or not options.short)]
    if options.quick:  # compiling for a CPU would take longer than all the rest
        parts = [part for part in parts if "--compile" not in part.training_options]
    rows: list[Row] = []
    for process in [parts] if options.quick else [[part] for part in parts]:
        start = time.monotonic()
        rows += start_process(process, options, min(sum(part.seconds for part in process), deadline - start))
        names = ", ".join(f"{part.section} {part.case}".strip() for part in process)
        print(f"{names}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
        add_step_ratios(rows)
        if options.json:
            write_json(rows, options.json)
    for section in options.sections:
        print_section(section, [row for row in rows if row["section"] == section])
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"FAILED {row['section']}, {row['case']}, {row['candidate']}: {row['error']}")
    return 1 if failed else 0


def start_process(parts: list[Part], options: argparse.Namespace, seconds: float) -> list[Row]:
    """Runs parts in a child process and returns the rows that it printed, with an error row if it failed or was stopped
    after `seconds`.
    """
    failure = {"section": parts[0].section, "case": parts[0].case, "candidate": "process"}
    if seconds < LEAST_TIME:
        return [failure | {"error": f"not run: the {options.time_limit:.0f} seconds for everything were used up"}]
    flags = [f"--{name}" for name in ("quick", "short") if vars(options)[name]]
    command = [sys.executable, __file__, "--device", options.device, *flags]
    command += ["--parts", json.dumps(parts), "--seconds", str(seconds)]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path} | ({"CUDA_VISIBLE_DEVICES": ""} if options.device == "cpu" else {})
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, stdout=output, env=environment, start_new_session=True)
        try:
            code = child.wait(seconds)
            end = f"ended with exit code {code}" if code else None
        except subprocess.TimeoutExpired:
            end = f"stopped after {seconds:.0f} seconds"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # ends compilers that it left behind, too
            child.wait()
        output.seek(0)
        printed = [json.loads(line.removeprefix(RESULT)) for line in output if line.startswith(RESULT)]
    rows = {(row["section"], row["case"], row["candidate"]): row for row in printed}
    return [*rows.values(), *([failure | {"error": end}] if end else [])]


def run_part(part: Part, options: argparse.Namespace) -> None:
    """Runs a part in the child process of `start_process`; an exception becomes an error row."""
    device = torch.device("cuda:0" if options.device == "cuda" else "cpu")
    # Nothing new starts in the last 30% of its time.
    ends = time.monotonic() + 0.7 * options.seconds
    run = PartRun(part.section, part.case, part.training_options, device, options.quick, ends, options.short)
    torch.manual_seed(0)
    try:
        vars(importlib.import_module(part.module))[part.section](run)
    except Exception as error:
        run.emit_error(part.case, part.section, error)


def add_step_ratios(rows: list[Row]) -> None:
    """Adds the ratio of seconds per token to those of the first step that was measured."""
    steps = [row for row in rows if "tokens_per_s" in row]
    for row in steps:
        row["ratio_to_baseline"] = steps[0]["tokens_per_s"] / row["tokens_per_s"]


def print_section(section: str, rows: list[Row]) -> None:
    print(f"\n{section}")
    for row in rows:
        if "machine" in row:
            print(row["machine"])
    hidden = ("section", "machine", "error")
    print_table([{key: row[key] for key in row if key not in hidden} for row in rows if "machine" not in row])


if __name__ == "__main__":
    sys.exit(main())
