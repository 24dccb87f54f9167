"""The variables by which a launcher says who is who: what is wrong with them is one line, before ranks wait."""

import os
import re
import resource
import socket

import pytest
import torch

import doctor
import eval_mmlu_hybrid
import train_gpus
from preflight.checks import machine
from preflight.checks.basics import FAILURE, PlannedRun
from processes.ranks import allow_open_files, check_launch, launched_rank, launched_world_size, process_groups
from tests.parsing import options_in

pytestmark = pytest.mark.usefixtures("no_torchrun")

WHOLE = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="::1", MASTER_PORT="29500")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        WHOLE,
        {**WHOLE, "RANK": "3", "TORCHELASTIC_RESTART_COUNT": "2"},
        dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="localhost", MASTER_PORT="1"),
        dict(WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT="any"),  # of a run without ranks
    ],
)
def test_a_launch_that_is_whole(variables):
    os.environ.update(variables)
    check_launch()
    assert launched_rank() < launched_world_size()


@pytest.mark.parametrize(
    "variables,text",
    [
        (dict(RANK="0"), "WORLD_SIZE, MASTER_ADDR, MASTER_PORT: not set, but RANK=0 is; start with torchrun"),
        (dict(RANK="0", WORLD_SIZE="1"), "MASTER_ADDR, MASTER_PORT: not set, but RANK=0 is"),
        (dict(WORLD_SIZE="4"), "RANK, LOCAL_RANK, LOCAL_WORLD_SIZE: not set, but WORLD_SIZE=4 is"),
        ({**WHOLE, "LOCAL_RANK": ""}, "LOCAL_RANK: not set, but RANK=1 is"),
        ({**WHOLE, "MASTER_ADDR": ""}, "MASTER_ADDR: not set"),
        ({**WHOLE, "WORLD_SIZE": "two"}, "WORLD_SIZE=two: expected a whole number; start with torchrun"),
        ({**WHOLE, "WORLD_SIZE": "4.0"}, "WORLD_SIZE=4.0: expected a whole number"),
        ({**WHOLE, "RANK": "-1"}, "RANK=-1: expected a whole number"),
        ({**WHOLE, "RANK": "4"}, "RANK=4: expected 0 to 3"),
        ({**WHOLE, "LOCAL_RANK": "9" * 30}, f"LOCAL_RANK={'9' * 30}: expected a whole number"),
        ({**WHOLE, "LOCAL_RANK": "2"}, "LOCAL_RANK=2: expected 0 to 1"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE=0: expected 1 to 4"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE=3: expected a divisor of WORLD_SIZE=4"),
        ({**WHOLE, "LOCAL_WORLD_SIZE": "8"}, "LOCAL_WORLD_SIZE=8: expected 1 to 4"),
        ({**WHOLE, "MASTER_PORT": "0"}, "MASTER_PORT=0: expected 1 to 65535"),
        ({**WHOLE, "MASTER_PORT": "http"}, "MASTER_PORT=http: expected a whole number"),
        ({**WHOLE, "TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT=x: expected a whole number"),
        (dict(WORLD_SIZE="0"), "WORLD_SIZE=0: expected 1 to"),
        (dict(LOCAL_RANK="3"), "LOCAL_RANK=3: expected 0 to 0"),
    ],
)
def test_a_launch_that_is_not(variables, text):
    os.environ.update(variables)
    with pytest.raises(ValueError, match=re.escape(text)):
        check_launch()


@pytest.mark.parametrize(
    "soft,hard,expected",
    [(64, 4096, 4096), (4096, 4096, None), (640, 640, None), (-1, -1, None), (64, -1, 65536), (64, 639, "refused")],
)
def test_each_rank_may_open_as_much_as_is_allowed(monkeypatch, soft, hard, expected):
    """At most 65536; 100 ranks need 640 at least."""
    changed = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: changed.append(limits))
    if expected == "refused":
        with pytest.raises(ValueError, match="ulimit -n 639: a rank of 100 opens up to 640 files"):
            allow_open_files(100)
    else:
        allow_open_files(100)
        assert changed == ([] if expected is None else [(expected, hard)])


def test_every_entry_looks_at_it_first(tmp_path):
    os.environ["RANK"] = "none"
    for main in (train_gpus.main, eval_mmlu_hybrid.main):
        with pytest.raises(ValueError, match="RANK=none: expected a whole number"):
            main(options_in(tmp_path))
    findings = list(machine.check_environment(PlannedRun(options_in(tmp_path))))
    assert (findings[0].status, findings[0].name) == (FAILURE, "ranks") and "RANK=none" in findings[0].found
    assert doctor.all_checks()["environment"] is machine.check_environment


def test_a_port_that_another_program_has(tmp_path):
    with socket.create_server(("", 0), family=socket.AF_INET) as other:
        port = str(other.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        text = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: the ranks cannot meet there"
        with pytest.raises(ValueError, match=text), process_groups(torch.device("cpu")):
            pass
