"""What doctor.py finds about links between GPUs, which are mocked, and about all-reduces."""

import psutil
import pytest
import torch

from preflight.checks import all_reduce, links
from preflight.checks.basics import OK, WARNING
from tests.preflight.cases import found, planned, statuses, the_bad_one


def test_slow_links_are_reported():
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    assert links.judge_links("links", {(one, other): 20.0, (other, one): 30.0}, "").status == OK
    less = links.send_less(planned())
    slow = links.judge_links("links", {(one, other): 20.0, (other, None): 3.0}, less)
    assert slow.status == WARNING and "3.0 GB/s (cuda:1 to host) to 20.0 GB/s" in slow.found
    assert slow.remedy == less and "--teacher_signal hidden" in less
    assert links.send_less(planned("--stage", "align")) == "send less: a higher --grad_accumulation_steps"
    assert statuses(found(links.check_links)) == [OK]


def test_every_pair_of_gpus_is_measured(gpus, monkeypatch):
    gpus(3)
    measured = []
    monkeypatch.setattr(links, "copy_rate", lambda *ends: measured.append(ends) or 30.0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} == {0, 1})
    host, pairs = found(links.check_links)
    assert len(set(measured)) == 6 + 6 and pairs.name == "links between GPUs (2 of 6 direct)"
    assert statuses([host, pairs]) == [OK, OK]


def test_processes_that_do_not_finish_are_killed():
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="2 processes have not finished .*; .*/etc/hosts"):
        all_reduce.all_reduce_rate(2, 2**10, on_gpus=False, patience_s=0)
    assert {process for process in psutil.Process().children() if is_worker(process)} <= before


def is_worker(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_slow_all_reduce_on_gpus(gpus, monkeypatch):
    gpus(3)
    monkeypatch.setattr(links, "all_reduce_rate", lambda *_: 1.0)
    assert "slow" in the_bad_one(found(links.check_collectives, collectives=True), WARNING).found
    assert found(links.check_collectives) == []
