"""The part `first` of `make gpu-check`: what this machine is, whether its kernels compute what they should, and
everything that the doctor knows.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from preflight.checks.basics import FAILURE, OK, WARNING
from preflight.gpu_check.children import Child, emitted, last_lines
from preflight.gpu_check.results import NO_GPU_HERE, NOT_APPLICABLE, Result, Session

if TYPE_CHECKING:
    from collections.abc import Iterator

# Checks of numerics.py, each in a process of its own.
NUMERICS = ("products", "mixer", "block", "scan", "operators", "coding")


def check(session: Session) -> Iterator[Result]:
    yield from environment(session)
    for name in NUMERICS:
        command = [sys.executable, "-m", "preflight.gpu_check.numerics", name]
        yield from run_check(session, name, command)
    yield from doctor(session)


# --- the environment -----------------------------------------------------------------------------------------


def environment(session: Session) -> Iterator[Result]:
    """Yields what the doctor does not name: the versions below torch, peer copies, a compiler, and all settings."""
    facts, n_gpus = session.facts, session.n_gpus
    yield Result(OK, "versions", f"torch {facts.torch}, CUDA {facts.cuda}, Triton {facts.triton}, NCCL {facts.nccl}")
    settings = ", ".join(f"{name}={value}" for name, value in facts.settings.items()) or "none"
    yield Result(OK, "settings of CUDA, NCCL, torch and Triton", settings)
    if not n_gpus:
        yield Result(NOT_APPLICABLE, "GPUs, driver, Triton's compiler, peer copies", NO_GPU_HERE)
        return
    sizes = "; ".join(f"{name}, {size} GB" for name, size in zip(facts.gpus, facts.gigabytes, strict=True))
    yield Result(OK, "GPUs", f"{sizes}; compute capability {facts.capability}, driver {facts.driver}")
    yield Result(OK, "kernels in bfloat16", f"scan by {facts.scan}, convolution by {facts.convolution}")
    if facts.triton == "none" or facts.compiler == "none":
        missing = "Triton" if facts.triton == "none" else "a C compiler for Triton's launchers"
        remedy = "apt-get install gcc" if facts.triton != "none" else "python -m pip install triton"
        yield Result(WARNING, "Triton's compiler", f"no {missing}: no fast kernels, no --compile", remedy)
    else:
        yield Result(OK, "Triton's compiler", f"Triton {facts.triton} with {facts.compiler}")
    if n_gpus == 1:
        yield Result(NOT_APPLICABLE, "peer copies", "not applicable: one GPU")
    else:
        n_pairs = n_gpus * (n_gpus - 1)
        disabled = ", off by NCCL_P2P_DISABLE=1" if facts.settings.get("NCCL_P2P_DISABLE") == "1" else ""
        yield Result(OK, "peer copies", f"{facts.direct_pairs} of {n_pairs} pairs of GPUs are direct{disabled}")


# --- processes that check ------------------------------------------------------------------------------------


def run_check(session: Session, name: str, command: list[str]) -> Iterator[Result]:
    """Yields what a process finds. One that dies is a failure, after whatever it found before."""
    if session.is_late:
        yield Result.left_out(name, "first")
        return
    log = session.work / f"{name}.log"
    problem = Child(command, log).wait(session.seconds_left)
    yield from emitted(log)
    if problem is not None:
        remedy = f"CUDA_LAUNCH_BLOCKING=1 python {' '.join(command[1:])}   names the operation that failed"
        yield Result(FAILURE, name, problem, remedy, last_lines(log))


def doctor(session: Session) -> Iterator[Result]:
    """Yields the findings of doctor.py for a tiny run on this machine."""
    if session.is_late:
        yield Result.left_out("doctor", "first")
        return
    log, findings = session.work / "doctor.log", session.work / "doctor.json"
    command = [sys.executable, "doctor.py", "--preset", "tiny", "--dtype", "bfloat16", "--eval_interval", "1"]
    command += ["--teacher_placement", "colocated", "--output_dir", str(session.work / "a-run")]
    command += ["--json", str(findings), *(["--collectives"] if session.n_gpus > 1 else [])]
    problem = Child(command, log).wait(session.seconds_left)
    found = [Result(**finding) for finding in json.loads(findings.read_text())] if findings.exists() else []
    yield from (finding for finding in found if finding.status != OK)
    n_ok = sum(finding.status == OK for finding in found)
    if not found:
        remedy = f"python {' '.join(command[1:])}"
        yield Result(FAILURE, "doctor", problem or "found nothing", remedy, last_lines(log))
    else:
        yield Result(OK, "doctor", f"{n_ok} of {len(found)} findings ok; all are in {log}")
