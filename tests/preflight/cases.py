"""Helpers of the tests of doctor.py: planned runs, what a check finds about them, checkpoints and full disks."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

from safetensors.torch import save_file

from arguments import parse_train_args
from checkpointing.files import STATE_FILE, SUMS_FILE, data_file, optimizer_file
from checkpointing.state import FORMAT
from preflight.checks.basics import FAILURE, OK, PlannedRun, run_check

ROOT = Path(__file__).parents[2]
TINY = ROOT / "presets" / "tiny"


def planned(*options, nproc=None, preset="tiny", **rest):
    return PlannedRun(parse_train_args(["--preset", preset, *map(str, options)]), nproc, **rest)


def found(check, *options, **rest):
    return list(run_check("name", check, planned(*options, **rest)))


def statuses(findings):
    return [finding.status for finding in findings]


def the_bad_one(findings, status=FAILURE):
    (bad,) = [finding for finding in findings if finding.status != OK]
    assert bad.status == status, bad
    return bad


def raise_(error):
    raise error


def checkpoint_of(folder, micro_step, *options, without=()):
    """Makes a checkpoint that passes the quick check, of a run on this machine. without: options that it does not
    record, as one of an earlier version.
    """
    checkpoint = Path(shutil.copytree(TINY / "student", folder / f"checkpoint-{micro_step}"))
    arguments = dataclasses.asdict(planned(*options).args) | {"teacher_prefetch": 0}
    arguments = {name: value for name, value in arguments.items() if name not in without}
    state = {"format": FORMAT, "micro_step": micro_step, "world_size": 1, "arguments": arguments}
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    (checkpoint / data_file(0, 1)).write_text("{}")
    save_file({}, checkpoint / optimizer_file(0, 1))
    lines = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in checkpoint.iterdir()]
    (checkpoint / SUMS_FILE).write_text("\n".join(lines))
    return checkpoint


def full_disk(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)
