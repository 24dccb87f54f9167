"""What doctor.py finds about settings and GPUs. GPUs are mocked."""

import os
import shutil

import pytest
import torch

from preflight.checks import machine
from preflight.checks.basics import FAILURE, OK, WARNING
from tests.preflight.cases import found, statuses, the_bad_one


@pytest.fixture
def clean_environment(monkeypatch):
    for name, *_ in machine.COSTLY:
        monkeypatch.delenv(name, raising=False)
    for name in (*machine.ALLOCATOR, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name,values", [(name, values) for name, values, _ in machine.COSTLY])
def test_settings_that_cost_speed(clean_environment, monkeypatch, name, values):
    assert statuses(found(machine.check_environment)) == [OK]
    for value in values.split():
        monkeypatch.setenv(name, value)
        bad = the_bad_one(found(machine.check_environment), WARNING)
        assert bad.name == f"{name}={value}" and f"unset {name}" in bad.remedy
    monkeypatch.setenv(name, "unheard-of")
    assert statuses(found(machine.check_environment)) == [OK]


def test_settings_of_the_allocator_and_of_threads(clean_environment, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert "OMP_NUM_THREADS=4" in the_bad_one(found(machine.check_environment, nproc=2), WARNING).remedy
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert "OMP_NUM_THREADS=4" in the_bad_one(found(machine.check_environment, nproc=2), WARNING).remedy
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert statuses(found(machine.check_environment, nproc=2)) == [OK]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert "expandable_segments" in the_bad_one(found(machine.check_environment, nproc=2), WARNING).remedy


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64_000_000, 0, 64_000_000))
    assert statuses(found(machine.check_shared_memory)) == [OK]
    bad = the_bad_one(found(machine.check_shared_memory, "--dataset_workers", 2), WARNING)
    assert "64 MB" in bad.found and "--ipc=host" in bad.remedy


def test_gpus_that_torch_does_not_see(monkeypatch, gpus):
    gpus(0)
    assert statuses(found(machine.check_gpus)) == [OK]
    monkeypatch.setattr(machine, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "--index-url" in the_bad_one(found(machine.check_gpus), WARNING).remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in the_bad_one(found(machine.check_gpus), WARNING).remedy
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "nvidia-smi" in the_bad_one(found(machine.check_gpus), WARNING).remedy


@pytest.mark.parametrize(
    "given,options,status,word",
    [
        ({}, (), OK, "79.0 of 80.0 GB free"),
        ({"free": 30e9}, (), WARNING, "other processes hold the rest"),
        ({"capability": (7, 5)}, ("--dtype", "bfloat16"), WARNING, "emulates"),
        ({"capability": (7, 5)}, ("--dtype", "float32"), OK, "capability 7.5"),
        ({"problem": "no kernel image"}, (), FAILURE, "no kernel image"),
    ],
)
def test_gpus_that_are_not_as_they_should_be(gpus, given, options, status, word):
    gpus(1, **given)
    (finding,) = found(machine.check_gpus, *options)
    assert finding.status == status and word in finding.found and bool(finding.remedy) == (status != OK)


def test_gpus_for_all_ranks(gpus, no_torchrun):
    gpus(5)
    (well,) = found(machine.check_ranks)
    assert well.name == "--nproc_per_node 4" and "cuda:0 to cuda:3, teacher on cuda:4" in well.found
    assert "needs 6 visible GPUs" in the_bad_one(found(machine.check_ranks, nproc=5)).found
    (well,) = found(machine.check_ranks, "--teacher_placement", "colocated")
    assert well.name == "--nproc_per_node 5" and "beside each" in well.found
    assert "LOCAL_WORLD_SIZE" not in os.environ
    gpus(1)
    assert "--teacher_placement colocated" in the_bad_one(found(machine.check_ranks)).remedy


def test_a_compiler_is_looked_for_only_if_asked(monkeypatch):
    assert found(machine.check_compile) == []
    monkeypatch.setattr("processes.devices.can_compile", lambda _: False)
    assert "C++ compiler" in the_bad_one(found(machine.check_compile, "--compile")).found
