"""Whether this machine can do a run, looked at before any GPU time is spent on it: packages, GPUs, kernels, links,
models, tokenizer, data, disk, loss. Takes the options of train_gpus.py besides its own:

    python doctor.py --local_files_only --no_dataset_streaming --output_dir DIR

Each line says ok, warning or failure, what was looked at and what was found; the next, what to do. The exit code is 1
if anything failed. Nothing is downloaded, nothing is left on the disk but lock files of `datasets` and logs of W&B, and
of models none is loaded but a small teacher.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from preflight.checks.basics import (
    FAILURE,
    OK,
    WARNING,
    Case,
    Finding,
    check_imports,
    check_optional_packages,
    check_packages,
    check_python,
    run_check,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from preflight.checks.basics import Check


def all_checks() -> dict[str, Check]:
    """By name, the cheap ones first. Imported here: the packages they need have been looked for before."""
    from preflight.checks import links, loss, machine, models, storage, text

    return {
        "optional packages": check_optional_packages,
        "environment": machine.check_environment,
        "shared memory": machine.check_shared_memory,
        "GPUs": machine.check_gpus,
        "--nproc_per_node": machine.check_ranks,
        "--compile": machine.check_compile,
        "--tensorboard": storage.check_tensorboard,
        "--wandb": storage.check_wandb,
        "--log_file": storage.check_log_file,
        "--output_dir": storage.check_output_dir,
        "--resume": models.check_resume,
        "models": models.check_models,
        "configs": models.check_configs,
        "tokenizer": models.check_tokens,
        "special tokens": models.check_special_tokens,
        "disk": storage.check_disk,
        "host memory": storage.check_host_memory,
        "data": text.check_data,
        "held-out data": text.check_held_out_data,
        "packed data": text.check_room_for_packed_data,
        "loss": loss.check_loss,
        "loss of equal models": loss.check_equal_models,
        "kernels": machine.check_kernels,
        "links": links.check_links,
        "collectives": links.check_collectives,
    }


def first_findings() -> Iterator[Finding]:
    yield from check_python()
    yield from check_packages()
    yield from check_imports()


def examine(rest: list[str], nproc: int | None, collectives: bool) -> Iterator[Finding]:
    """rest: the options of training."""
    import datasets
    from transformers.utils import logging

    from arguments import parse_train_args

    if nproc is not None and nproc < 1:
        raise ValueError(
            f"--nproc_per_node {nproc}: expected at least 1; leave it out for as many as there are GPUs for"
        )
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    case = Case(parse_train_args(rest), nproc, collectives)
    for name, check in all_checks().items():
        yield from run_check(name, check, case)


def show(finding: Finding) -> None:
    print(f"{finding.status:<8} {finding.name}: {finding.found}", flush=True)
    if finding.remedy:
        print(f"{'':<8} -> {finding.remedy}", flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Whether this machine can do a run. Takes all options of train_gpus.py, and:", allow_abbrev=False
    )
    parser.add_argument(
        "--nproc_per_node",
        type=int,
        metavar="N",
        help="ranks on this machine, as torchrun will be told (default: one a GPU, but for the teacher's)",
    )
    parser.add_argument("--collectives", action="store_true", help="also start that many processes and time all-reduce")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings to this file")
    options, rest = parser.parse_known_args(argv)

    if options.json is not None and (problem := cannot_write(options.json)):
        print(f"error: --json {options.json}: cannot be written ({problem}); name another file", file=sys.stderr)
        return 2
    findings = []
    for finding in first_findings():
        show(finding)
        findings.append(finding)
    if any(finding.status == FAILURE and finding.name in ("Python", "imports") for finding in findings):
        print("\nNothing else can be looked at without these.")
        return end(findings, options.json)
    from processes.exits import run_entry  # as every entry; it needs torch

    def rest_of_main() -> int:
        for finding in examine(rest, options.nproc_per_node, options.collectives):
            show(finding)
            findings.append(finding)
        return end(findings, options.json)

    return run_entry(rest_of_main)


def cannot_write(file: Path) -> str | None:
    """Why not, found out before it takes minutes to have something to write."""
    try:
        with file.open("a"):
            return None
    except OSError as error:
        return error.strerror


def end(findings: list[Finding], file: Path | None) -> int:
    """Returns the exit code."""
    counts = Counter(finding.status for finding in findings)
    print(f"\n{counts[OK]} ok, {counts[WARNING]} warning(s), {counts[FAILURE]} failure(s)")
    if file is not None:
        file.write_text(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
    return int(counts[FAILURE] > 0)


if __name__ == "__main__":
    sys.exit(main())
