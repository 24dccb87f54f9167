"""Checks whether this machine can do a run, before any GPU time is spent on it: packages, GPUs, kernels, links, models,
tokenizer, data, disk, loss. Takes the options of train_gpus.py besides its own:

    python doctor.py --local_files_only --no_dataset_streaming --output_dir DIR

Each line says ok, warning or failure, what was checked and what was found; the next line says what to do. The exit code
is 1 if anything failed. Nothing is downloaded, and nothing is left on the disk but lock files of `datasets` and logs of
W&B. Weight files, up to 40 GB, are read tensor by tensor, to find what is no number. Only the teacher is loaded: if it
is small, or if memory is free and several of its tokens could end a document.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from inputs.value_types import whole_number
from paths import expanded_path
from preflight.checks.basics import (
    FAILURE,
    OK,
    WARNING,
    Finding,
    PlannedRun,
    check_imports,
    check_optional_packages,
    check_packages,
    check_python,
    file_problem,
    run_check,
    show,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from preflight.checks.basics import Check

MOST_RANKS = 1000  # on this machine


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description="Check whether this machine can do a run. Takes all options of train_gpus.py, and:",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--nproc_per_node",
        type=whole_number,
        metavar="N",
        help="ranks on this machine, as given to torchrun (default: one per GPU, without the teacher's)",
    )
    parser.add_argument(
        "--collectives", action="store_true", help="also start that many processes and time what they send each other"
    )
    parser.add_argument("--json", type=expanded_path, metavar="FILE", help="also write the findings to this file")
    options, rest = parser.parse_known_args(argv)

    if options.json is not None and (problem := file_problem(options.json)):
        print(f"error: --json {options.json}: {problem}; name another file", file=sys.stderr)
        return 2
    findings = shown(first_findings())
    if is_unusable(findings):
        return end(findings, options.json)
    from processes.exits import run_entry  # not readable to a Python that is too old

    return run_entry(lambda: examine(rest, options, findings))


def first_findings() -> Iterator[Finding]:
    """Yields the findings that nothing has to be imported for, and whether the options of training can be read."""
    yield from check_python()
    yield from check_packages()
    yield from check_imports(("yaml",))


def examine(rest: list[str], options: argparse.Namespace, findings: list[Finding]) -> int:
    """Checks a run. rest: its options of training. Returns the exit code; raises ValueError for a wrong option, before
    torch is imported.
    """
    from arguments import parse_train_args

    nproc = options.nproc_per_node
    if nproc is not None and not 1 <= nproc <= MOST_RANKS:
        raise ValueError(
            f"--nproc_per_node {nproc}: expected at least 1, at most {MOST_RANKS:_}; leave it out for as many as there "
            "are GPUs for"
        )
    run = PlannedRun(parse_train_args(rest), nproc, options.collectives)
    findings = findings + shown(check_imports())
    if not is_unusable(findings):
        findings += shown(all_findings(run))
    return end(findings, options.json)


def all_findings(run: PlannedRun) -> Iterator[Finding]:
    """Yields what all checks find."""
    import datasets
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    datasets.logging.set_verbosity_error()
    for name, check in all_checks().items():
        yield from run_check(name, check, run)


def all_checks() -> dict[str, Check]:
    """Returns the checks by name, the cheap ones first. They are imported only here, after their packages."""
    from preflight.checks import (
        alignment,
        coding,
        kernels,
        links,
        loss,
        machine,
        models,
        separator,
        storage,
        text,
        weights,
    )

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
        "models": models.check_model_files,
        "configs": models.check_configs,
        "weights": weights.check_finite,
        "teacher's logits": weights.check_logits,
        "tokenizer": models.check_tokens,
        "special tokens": models.check_special_tokens,
        "disk": storage.check_disk,
        "host memory": storage.check_host_memory,
        "data": text.check_data,
        "held-out data": text.check_held_out_data,
        "packed data": text.check_room_for_packed_data,
        "document separator": separator.check_document_separator,
        "loss": loss.check_loss,
        "loss of equal models": loss.check_equal_models,
        "alignment": alignment.check_alignment,
        "kernels": kernels.check_kernels,
        "coding": coding.check_coding,
        "links": links.check_links,
        "collectives": links.check_collectives,
    }


def shown(findings: Iterable[Finding]) -> list[Finding]:
    """Prints each finding as it comes, and returns all of them."""
    found = []
    for finding in findings:
        show(finding)
        found.append(finding)
    return found


def is_unusable(findings: list[Finding]) -> bool:
    """Says whether Python or its packages do not let any other check run."""
    return any(finding.status == FAILURE and finding.name in ("Python", "imports") for finding in findings)


def end(findings: list[Finding], file: Path | None) -> int:
    """Prints how many findings there are, writes them to `file`, and returns the exit code."""
    if is_unusable(findings):
        print("\nNothing else can be checked before this is corrected.")
    counts = Counter(finding.status for finding in findings)
    print(f"\n{counts[OK]} ok, {counts[WARNING]} warning(s), {counts[FAILURE]} failure(s)")
    if file is not None:
        file.write_text(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1) + "\n")
    return int(counts[FAILURE] > 0)


if __name__ == "__main__":
    sys.exit(main())
