"""The part `train` of `make gpu-check`: the tiny preset through every path that is different on a GPU, as torchrun
starts it for a user, with losses against those of the same run on a CPU.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from preflight.checks.basics import FAILURE, OK, WARNING
from preflight.gpu_check.children import end_all
from preflight.gpu_check.compare import in_words, largest_differences
from preflight.gpu_check.contexts import judge_contexts, watch
from preflight.gpu_check.interrupted import NAME as INTERRUPTED
from preflight.gpu_check.interrupted import interrupt_and_resume
from preflight.gpu_check.results import NO_GPU_HERE, NOT_APPLICABLE, Result, Session, table
from preflight.gpu_check.runs import LIMIT, SOMETIMES, STEPS, Reference, Run, new_run

if TYPE_CHECKING:
    from collections.abc import Iterator

PART = "train"
CORES_OF_A_RUN = 4  # where there are more, runs are started side by side
ON_ONE = "--teacher_device cuda:0"  # a dedicated teacher, on the only student's GPU
FLOAT32 = Reference("distil", "float32", 1)


@dataclass(frozen=True)
class Case:
    """Names a path through the code. options: those of train_gpus.py beside the reference's. look_at: the next thing
    to look at if it fails and the cases before it do not.
    """

    name: str
    options: str
    look_at: str
    reference: Reference = FLOAT32
    n_gpus: int = 0  # that it needs; on fewer it would be another path

    @property
    def all_options(self) -> str:
        return f"{self.reference.options} {self.options}"


CASES = (
    Case("hidden states, teacher on the student's GPU", ON_ONE, "distillation/teacher.py: the streams of the lane"),
    Case(
        "bfloat16",
        ON_ONE,
        "the mixer and the scan of PARTS=first, which are in bfloat16; then distillation/adamw.py",
        Reference("distil", "bfloat16", 1),
    ),
    Case("alignment", "", "conversion/alignment.py", Reference("align", "float32", 1)),
    Case("colocated teacher", "--teacher_placement colocated", "distillation/teacher.py: a student's own teacher"),
    Case(
        "compiled",
        f"--compile {ON_ONE}",
        "the same command with TORCH_LOGS=graph_breaks,recompiles before it, and without --compile",
        n_gpus=1,
    ),
    Case("logits", f"--teacher_signal logits {ON_ONE}", "distillation/teacher.py: answers that are logits"),
    Case(
        "float16",
        ON_ONE,
        "distillation/update.py: LossScale; the log names the updates that were skipped",
        Reference("distil", "float16", 1),
    ),
    Case(
        "two ranks, colocated teachers",
        "--teacher_placement colocated",
        "links and collectives in PARTS=first; then the same command with NCCL_DEBUG=INFO before it",
        Reference("distil", "float32", 2),
        n_gpus=2,
    ),
    Case(
        "two ranks, gradients to owners",
        "--teacher_placement colocated --gradient_exchange owners",
        "distillation/owners.py; the case before it tells whether NCCL works at all",
        Reference("distil", "float32", 2),
        n_gpus=2,
    ),
    Case(
        "teacher on a GPU of its own",
        "",
        "copies between GPUs in PARTS=first; then the same command with NCCL_P2P_DISABLE=1 before it",
        n_gpus=2,
    ),
)


def check(session: Session) -> Iterator[Result]:
    """Runs all cases that apply here and yields how each one ended."""
    results = []
    for result in judged(session):
        results.append(result)
        yield result
    rows = [[one.name, one.status, one.found] for one in results if one.status in (OK, FAILURE)]
    found = f"{STEPS} steps of the tiny preset each, compared at every step"
    yield Result(OK, "all runs", found, figures=table(["path", "status", "found"], rows))


def judged(session: Session) -> Iterator[Result]:
    started: list[tuple[Case, Future[Run], Future[Run]]] = []
    references: dict[Reference, Future[Run]] = {}
    with side_by_side() as pool:

        def reference(which: Reference) -> Future[Run]:
            if which not in references:
                run = new_run(session, which.name, f"{which.options} {SOMETIMES}", which.n_ranks, on_cpu=True)
                references[which] = pool.submit(run.finish, session)
            return references[which]

        for case in CASES:
            if session.n_gpus < case.n_gpus:
                yield Result(NOT_APPLICABLE, case.name, needs(case, session.n_gpus))
            else:
                started.append((case, reference(case.reference), pool.submit(run_case, session, case)))
            if case == CASES[0]:
                options = f"{FLOAT32.options} {ON_ONE}"
                interrupted = pool.submit(interrupt_and_resume, session, options)
        for case, truth, run in started:
            ended = run.result()
            yield judge(case.name, case.look_at, ended, truth.result(), case.reference.dtype)
            if ended.contexts is not None:
                yield judge_contexts(case.name, ended.contexts, own_gpus(case, session.facts.uuids))
        look_at = "checkpointing/resume.py and saver.py; the log has all three starts"
        yield judge(INTERRUPTED, look_at, interrupted.result(), references[FLOAT32].result(), "float32")


@contextmanager
def side_by_side() -> Iterator[ThreadPoolExecutor]:
    """Yields a pool of threads, as many as runs may be going on together. Ends the runs if the block is left early."""
    pool = ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // CORES_OF_A_RUN))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        end_all()
        raise
    pool.shutdown()


def needs(case: Case, n_gpus: int) -> str:
    return f"not applicable: needs {case.n_gpus} GPUs, and there is one" if n_gpus else NO_GPU_HERE


def run_case(session: Session, case: Case) -> Run:
    run = new_run(session, case.name, f"{case.all_options} {SOMETIMES}", case.reference.n_ranks)
    if case.n_gpus < 2 or session.is_late:
        return run.finish(session)
    run.problem, run.contexts = watch(run.start(), min(session.seconds_left, LIMIT))
    return run


def own_gpus(case: Case, uuids: list[str]) -> dict[int, set[str]]:
    """Returns the GPUs on which each local rank of a case may have a context; the first rank runs the teacher."""
    own = {rank: {uuids[rank]} for rank in range(case.reference.n_ranks)}
    if "colocated" not in case.options:
        own[0].add(uuids[-1])
    return own


def judge(name: str, look_at: str, run: Run, reference: Run, dtype: str) -> Result:
    """Returns the finding on a run: whether it ended well, and with the losses of its reference."""
    if run.problem is not None:
        found = f"{run.problem}, after {len(run.rows)} of {STEPS} steps"
        return Result(FAILURE, name, found, f"the end of its log, below; {look_at}", run.evidence)
    if run.is_left_out or reference.is_left_out:
        return Result.left_out(name, PART)
    if reference.problem is not None:
        found = f"nothing to compare with: the same run on the CPU failed ({reference.problem})"
        return Result(FAILURE, name, found, "make demo   works on a CPU before anything else does", reference.evidence)
    if problem := unfinished(run):
        return Result(FAILURE, name, problem, f"checkpointing/saver.py; {look_at}", run.evidence)
    words, is_well = in_words(largest_differences(run.rows, reference.rows), dtype)
    if not is_well:
        remedy = f"PARTS=first: do the kernels compute what they should? Then {look_at}"
        return Result(FAILURE, name, words, remedy, run.evidence)
    if run.warnings:
        return Result(WARNING, name, f"{words}; it warned: {run.warnings[0]}", look_at, run.warnings)
    return Result(OK, name, words)


def unfinished(run: Run) -> str | None:
    """Returns what a run that ended well has not written: a row for every step, evaluations, its last checkpoint."""
    if len(run.rows) != STEPS:
        return f"metrics.jsonl has {len(run.rows)} rows, expected {STEPS}"
    if not any("eval" in row for row in run.rows[:-1]):
        return "metrics.jsonl has no evaluation before the last step"
    if not (run.folder / "latest" / "model.safetensors").exists() and not list(run.folder.glob("latest/*.index.json")):
        return "there is no checkpoint to resume from"
    return None
