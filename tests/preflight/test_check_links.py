"""What doctor.py finds about links between GPUs, which are mocked, and about collectives."""

import psutil
import pytest
import torch

from preflight.checks import collectives, links
from preflight.checks.basics import FAILURE, OK, WARNING
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
    monkeypatch.setattr(links, "copy_is_right", lambda *ends: True)
    host, pairs, content = found(links.check_links)
    assert len(set(measured)) == 6 + 6 and pairs.name == "links between GPUs (2 of 6 direct)"
    assert statuses([host, pairs, content]) == [OK, OK, OK]


@pytest.mark.parametrize("disabled,status", [("", FAILURE), ("1", WARNING)])
def test_a_copy_that_arrives_changed_is_reported(gpus, monkeypatch, disabled, status):
    gpus(2)
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    monkeypatch.setattr(links, "copy_rate", lambda *ends: 30.0)
    monkeypatch.setattr(links, "copy_is_right", lambda source, target: source.index == 0)
    *_, content = found(links.check_links)
    assert content.status == status and "cuda:1 to cuda:0" in content.found and "cuda:0 to" not in content.found
    assert ("export NCCL_P2P_DISABLE=1" in content.remedy) == (status == FAILURE)


def test_the_content_of_a_copy_is_compared(monkeypatch):
    cpu = torch.device("cpu")
    assert links.copy_is_right(cpu, cpu)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor + (tensor % 7 == 0))
    assert not links.copy_is_right(cpu, cpu)


def test_processes_that_do_not_finish_are_killed():
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="2 processes have not finished .*; .*/etc/hosts"):
        collectives.collective_rates(2, 2**10, on_gpus=False, patience_s=0)
    assert {process for process in psutil.Process().children() if is_worker(process)} <= before


def is_worker(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


SETTINGS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
NAMES = ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single")


@pytest.mark.slow
def test_collectives_of_real_processes():
    """Each of them is measured, after its result was compared with what was sent."""
    rates = collectives.collective_rates(3, 3 * 2**12, on_gpus=False)
    assert tuple(rates) == NAMES and min(rates.values()) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_collective_whose_content_is_wrong_is_an_error(name, monkeypatch):
    monkeypatch.setattr(collectives.dist, "barrier", lambda: None)
    for collective in ("all_reduce", "reduce_scatter_tensor", "all_gather_into_tensor", "all_to_all_single"):
        monkeypatch.setattr(collectives.dist, collective, lambda result, *given: None)
    collective = collectives._collectives(0, 2, 2**10, torch.device("cpu"))[name]
    with pytest.raises(RuntimeError, match=f"{name}: .*% of what arrived is not what was sent"):
        collectives._time(name, collective)
    right = collective._replace(run=lambda: collective.result.copy_(collective.expected))
    assert collectives._time(name, right) >= 0


@pytest.mark.parametrize(("settings", "tried"), [(SETTINGS, True), ({}, False)])
def test_slow_collectives_on_gpus(gpus, monkeypatch, settings, tried):
    gpus(3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    for name in (*SETTINGS, "NCCL_SOCKET_NTHREADS", "NCCL_NSOCKS_PERTHREAD"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(links, "collective_rates", lambda *_: dict.fromkeys(NAMES, 3.0))
    slow = the_bad_one(found(links.check_collectives, collectives=True), WARNING)
    assert "of 64 MiB: all_reduce 3, " in slow.found and "all_to_all_single 3" in slow.found
    assert "--link_gb_per_s 3" in slow.found and "slow" in slow.found
    assert slow.remedy.startswith("unset NCCL_SHM_DISABLE first") == tried
    assert ("NCCL_SOCKET_NTHREADS=4" in slow.remedy) == tried
    assert slow.remedy.endswith(links.send_less(planned()))
    monkeypatch.setattr(links, "collective_rates", lambda *_: dict.fromkeys(NAMES, 200.0))
    assert statuses(found(links.check_collectives, collectives=True)) == [OK]
    assert found(links.check_collectives) == []
