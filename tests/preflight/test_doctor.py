"""doctor.py as a whole, on the tiny preset, and what it says of packages and machines, GPUs played. For what it says of
a run see tests/preflight/test_doctor_runs.py.
"""

import ast
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

import doctor
import preflight.checks.all_reduce
import preflight.checks.basics
import preflight.checks.links
import preflight.checks.machine
from arguments import parse_train_args
from llamba import LlambaConfig
from llamba.kernels import Kernels, causal_conv, plain_scan
from preflight.checks.basics import FAILURE, OK, WARNING, Case, Finding, NotLookedAt, run_check
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "presets" / "tiny"
CPU = torch.device("cpu")


def case(*options, nproc=None, preset="tiny", **rest):
    return Case(parse_train_args(["--preset", preset, *map(str, options)]), nproc, **rest)


def found(check, *options, **rest):
    return run_check("name", check, case(*options, **rest))


def statuses(findings):
    return [finding.status for finding in findings]


def the_bad_one(findings, status=FAILURE):
    (bad,) = [finding for finding in findings if finding.status != OK]
    assert bad.status == status, bad
    return bad


# --- the whole program ---------------------------------------------------------------------------------------


def test_the_tiny_preset_is_well(tmp_path, capsys):
    options = ["--preset", "tiny", "--output_dir", str(tmp_path / "new" / "run"), "--eval_interval", "5"]
    code = doctor.main([*options, "--collectives", "--json", str(tmp_path / "findings.json")])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0, lines
    findings = [Finding(**row) for row in json.loads((tmp_path / "findings.json").read_text())]
    assert not [finding for finding in findings if finding.status == FAILURE]
    for finding in findings:
        assert f"{finding.status:<8} {finding.name}: {finding.found}" in lines
    names = " ".join(finding.name for finding in findings)
    for part in ("Python", "torch", "GPUs", "tokenizer", "--dataset_name", "whole models", "kernels", "all-reduce"):
        assert part in names
    assert "--eval_dataset_name" in names
    n_ok = statuses(findings).count(OK)
    assert lines[-1] == f"{n_ok} ok, {len(findings) - n_ok} warning(s), 0 failure(s)"
    assert list(tmp_path.iterdir()) == [tmp_path / "findings.json"], "nothing else is left"


def test_without_a_teacher_the_others_still_run(capsys, tmp_path):
    assert doctor.main(["--preset", "tiny", "--teacher_model", "./nowhere", "--output_dir", str(tmp_path)]) == 1
    lines = capsys.readouterr().out.splitlines()
    missing = next(i for i, line in enumerate(lines) if line.startswith("failure"))
    assert "--teacher_model ./nowhere: neither a directory" in lines[missing]
    assert lines[missing + 1].startswith(" " * 8 + " -> give a directory")
    assert "warning  tokenizer: not looked at: the teacher is not on this disk, see above" in lines
    for name in ("--student_model", "--dataset_name", "student equal to its teacher (loss alone)", "links"):
        assert any(line.startswith(f"ok       {name}") for line in lines), name
    assert lines[-1].endswith(" 1 failure(s)")


def test_a_wrong_option_is_told_as_training_tells_it(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "first_findings", lambda: iter(()))
    assert doctor.main(["--preset", "tiny", "--batch_size", "0"]) == 2
    assert "--batch_size 0: expected at least 1" in capsys.readouterr().err
    assert doctor.main(["--preset", "tiny", "--nproc_per_node", "0"]) == 2
    assert "--nproc_per_node 0: expected at least 1" in capsys.readouterr().err


def test_a_python_without_packages_is_told():
    command = [sys.executable, "-S", "doctor.py", "--preset", "tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr == ""
    assert "do not load: yaml (no module yaml)" in done.stdout and "Nothing else can be looked at" in done.stdout


def test_where_the_findings_shall_go_is_looked_at_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "first_findings", lambda: pytest.fail("was looked at"))
    assert doctor.main(["--preset", "tiny", "--json", str(tmp_path / "none" / "d.json")]) == 2
    error = f"error: --json {tmp_path}/none/d.json: cannot be written (No such file or directory); name another file"
    assert capsys.readouterr().err == error + "\n"


def test_what_does_not_load_is_all_there_is_to_tell(capsys, monkeypatch):
    broken = Finding(FAILURE, "imports", "do not load: torch", "make setup")
    monkeypatch.setattr(doctor, "check_imports", lambda: iter([broken]))
    monkeypatch.setattr(doctor, "examine", lambda *_: pytest.fail("was looked at"))
    assert doctor.main(["--preset", "tiny"]) == 1
    assert "-> make setup\n\nNothing else can be looked at" in capsys.readouterr().out


# --- how checks are run --------------------------------------------------------------------------------------


def test_no_check_ends_the_others():
    def broken(_):
        yield Finding(OK, "first", "well")
        raise KeyError("no\nsuch key")

    first, last = found(broken)
    assert first.found == "well"
    assert last.status == FAILURE and last.found == "KeyError: 'no\\nsuch key'" and __file__ in last.remedy


def test_a_value_error_brings_its_remedy():
    def wrong(_):
        raise ValueError("--flag x: expected y; and\nz; do this")
        yield

    assert found(wrong) == [Finding(FAILURE, "name", "--flag x: expected y; and z", "do this")]


def test_what_a_check_cannot_see_and_what_it_logs_are_warnings():
    def blind(_):
        logging.getLogger("train").warning("%d files are not read; name them", 3)
        raise NotLookedAt("there is no teacher")
        yield

    handlers = logging.getLogger("train").handlers[:]
    first, second = found(blind)
    assert first == Finding(WARNING, "name", "not looked at: there is no teacher, see above")
    assert second == Finding(WARNING, "name", "3 files are not read", "name them")
    assert logging.getLogger("train").handlers == handlers


# --- Python and packages -------------------------------------------------------------------------------------


def test_an_old_python_can_read_the_first_checks(monkeypatch):
    for module in (doctor, preflight.checks.basics):
        ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    (finding,) = preflight.checks.basics.check_python()
    assert finding.status == FAILURE and "expected 3.10 or newer" in finding.found and "PYTHON=" in finding.remedy


def test_packages_are_held_to_the_requirements(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    lines = ["# a comment", "", "-r other.txt", "torch==99.0", "numpy>=1.0", "no-such-thing==1.0", "wandb==0.31.0"]
    file.write_text("\n".join([*lines, 'never==1.0; python_version < "3"']))
    version = preflight.checks.basics.metadata.version

    def without_wandb(name):
        return version("no-such-thing" if name == "wandb" else name)

    monkeypatch.setattr(preflight.checks.basics.metadata, "version", without_wandb)
    torch_, numpy_, missing, wandb_ = preflight.checks.basics.check_packages(file)
    assert torch_.status == WARNING and "tested with 99.0" in torch_.found and 'install "torch==99.0"' in torch_.remedy
    assert numpy_.status == OK
    assert missing.status == FAILURE and 'install "no-such-thing==1.0"' in missing.remedy
    assert wandb_.status == WARNING and "needed for --wandb" in wandb_.found
    monkeypatch.setitem(preflight.checks.basics.OLDEST, "torch", "98.0")
    assert next(preflight.checks.basics.check_packages(file)).status == FAILURE


def test_a_local_build_of_the_tested_version_is_that_version(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("torch==2.13.0")
    monkeypatch.setattr(preflight.checks.basics.metadata, "version", lambda _: "2.13.0+cu130")
    assert statuses(preflight.checks.basics.check_packages(tmp_path / "requirements.txt")) == [OK]


def test_a_package_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = preflight.checks.basics.check_imports(("json", "broken_package", "not_there_1"))
    assert finding.status == FAILURE
    assert "broken_package (OSError: libcudart.so: cannot open); not_there_1 (no module not_there_1)" in finding.found
    assert list(preflight.checks.basics.check_imports(("json",))) == []


def test_optional_packages_are_never_wrong():
    findings = found(preflight.checks.basics.check_optional_packages)
    assert set(statuses(findings)) == {OK} and "not needed" in findings[-1].found


# --- the machine ---------------------------------------------------------------------------------------------


@pytest.fixture
def clean_environment(monkeypatch):
    for name, *_ in preflight.checks.machine.COSTLY:
        monkeypatch.delenv(name, raising=False)
    for name in (*preflight.checks.machine.ALLOCATOR, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with some GPUs of 80 GB."""

    def become(n, free=79e9, capability=(9, 0), problem=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(80e9)))
        monkeypatch.setattr(preflight.checks.machine, "kernel_problem", lambda _: problem)

    return become


@pytest.mark.parametrize("name,values", [(name, values) for name, values, _ in preflight.checks.machine.COSTLY])
def test_settings_that_cost_speed(clean_environment, monkeypatch, name, values):
    assert statuses(found(preflight.checks.machine.check_environment)) == [OK]
    for value in values.split():
        monkeypatch.setenv(name, value)
        bad = the_bad_one(found(preflight.checks.machine.check_environment), WARNING)
        assert bad.name == f"{name}={value}" and f"unset {name}" in bad.remedy
    monkeypatch.setenv(name, "unheard-of")
    assert statuses(found(preflight.checks.machine.check_environment)) == [OK]


def test_settings_of_the_allocator_and_of_threads(clean_environment, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert (
        "OMP_NUM_THREADS=4" in the_bad_one(found(preflight.checks.machine.check_environment, nproc=2), WARNING).remedy
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert (
        "OMP_NUM_THREADS=4" in the_bad_one(found(preflight.checks.machine.check_environment, nproc=2), WARNING).remedy
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert statuses(found(preflight.checks.machine.check_environment, nproc=2)) == [OK]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert (
        "expandable_segments" in the_bad_one(found(preflight.checks.machine.check_environment, nproc=2), WARNING).remedy
    )


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64_000_000, 0, 64_000_000))
    assert statuses(found(preflight.checks.machine.check_shared_memory)) == [OK]
    bad = the_bad_one(found(preflight.checks.machine.check_shared_memory, "--dataset_workers", 2), WARNING)
    assert "64 MB" in bad.found and "--ipc=host" in bad.remedy


def test_gpus_that_torch_does_not_see(monkeypatch, gpus):
    gpus(0)
    assert statuses(found(preflight.checks.machine.check_gpus)) == [OK]
    monkeypatch.setattr(preflight.checks.machine, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "--index-url" in the_bad_one(found(preflight.checks.machine.check_gpus), WARNING).remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in the_bad_one(found(preflight.checks.machine.check_gpus), WARNING).remedy
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "nvidia-smi" in the_bad_one(found(preflight.checks.machine.check_gpus), WARNING).remedy


@pytest.mark.parametrize(
    "machine,options,status,word",
    [
        ({}, (), OK, "79.0 of 80.0 GB free"),
        ({"free": 30e9}, (), WARNING, "something else holds the rest"),
        ({"capability": (7, 5)}, ("--dtype", "bfloat16"), WARNING, "imitates"),
        ({"capability": (7, 5)}, ("--dtype", "float32"), OK, "capability 7.5"),
        ({"problem": "no kernel image"}, (), FAILURE, "no kernel image"),
    ],
)
def test_gpus_that_are_not_as_they_should_be(gpus, machine, options, status, word):
    gpus(1, **machine)
    (finding,) = found(preflight.checks.machine.check_gpus, *options)
    assert finding.status == status and word in finding.found and bool(finding.remedy) == (status != OK)


def test_gpus_for_all_ranks(gpus, no_torchrun):
    gpus(5)
    (well,) = found(preflight.checks.machine.check_ranks)
    assert well.name == "--nproc_per_node 4" and "cuda:0 to cuda:3, teacher on cuda:4" in well.found
    assert "needs 6 visible GPUs" in the_bad_one(found(preflight.checks.machine.check_ranks, nproc=5)).found
    (well,) = found(preflight.checks.machine.check_ranks, "--teacher_placement", "colocated")
    assert well.name == "--nproc_per_node 5" and "beside each" in well.found
    assert "LOCAL_WORLD_SIZE" not in os.environ
    gpus(1)
    assert "--teacher_placement colocated" in the_bad_one(found(preflight.checks.machine.check_ranks)).remedy


def test_a_compiler_is_looked_for_only_if_asked(monkeypatch):
    assert found(preflight.checks.machine.check_compile) == []
    monkeypatch.setattr("processes.devices.can_compile", lambda _: False)
    assert "C++ compiler" in the_bad_one(found(preflight.checks.machine.check_compile, "--compile")).found


# --- kernels -------------------------------------------------------------------------------------------------


def spoilt(form, spoil):
    def wrong(*inputs, **rest):
        return spoil(form, *inputs, **rest)

    return wrong


def mixed_heads(form, x, *rest):
    y, state = form(x, *rest)
    return y.roll(1, dims=2), state


def slow_decay(form, x, log_decay, *rest):
    return form(x, log_decay * 0.5, *rest)


def no_gradient_of_B(form, x, log_decay, B_, C, chunk_size):
    return form(x, log_decay, B_.detach() + 0 * B_, C, chunk_size)


def no_number(form, x, *rest):
    y, state = form(x, *rest)
    return torch.where(torch.arange(y.shape[1])[:, None, None] == 7, torch.nan, y), state


def late(form, x, *rest):
    return form(x.roll(1, dims=-1), *rest)


def same(form, *inputs):
    return form(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scan", [same, mixed_heads, slow_decay, no_gradient_of_B, no_number])
def test_a_spoilt_scan_is_seen(scan, dtype):
    kernels = Kernels("mamba-ssm", spoilt(plain_scan, scan), "plain PyTorch", causal_conv)
    finding, conv = preflight.checks.machine.compare_kernels(kernels, CPU, dtype, tiny_config())
    assert finding.name == f"scan, {str(dtype)[6:]}" and conv.status == WARNING and "causal-conv1d" in conv.remedy
    assert finding.status == (OK if scan is same else FAILURE), finding
    assert bool(finding.remedy) == (scan is not same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [same, late])
def test_a_spoilt_convolution_is_seen(conv, dtype):
    kernels = Kernels("plain PyTorch", plain_scan, "causal-conv1d", spoilt(causal_conv, conv))
    scan, finding = preflight.checks.machine.compare_kernels(kernels, CPU, dtype, tiny_config())
    assert finding.status == (OK if conv is same else FAILURE), finding
    assert scan.status == WARNING and "mamba-ssm" in scan.remedy


def test_a_kernel_of_a_real_size_is_within_its_tolerance():
    kernels = Kernels("mamba-ssm", plain_scan, "causal-conv1d", causal_conv)
    small = LlambaConfig(d_model=512, ssm_cfg={"n_v_heads": 4, "n_qk_heads": 4})  # with the published head's width
    assert statuses(preflight.checks.machine.compare_kernels(kernels, CPU, torch.bfloat16, small)) == [OK, OK]


def test_kernels_of_a_cpu_are_plain():
    assert [finding.found for finding in found(preflight.checks.machine.check_kernels)] == [
        "plain PyTorch, as always on a CPU"
    ]


# --- links ---------------------------------------------------------------------------------------------------


def test_slow_links_are_named():
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    assert preflight.checks.links.judge_links("links", {(one, other): 20.0, (other, one): 30.0}).status == OK
    slow = preflight.checks.links.judge_links("links", {(one, other): 20.0, (other, None): 3.0})
    assert slow.status == WARNING and "3.0 GB/s (cuda:1 to host) to 20.0 GB/s" in slow.found
    assert "--teacher_signal hidden" in slow.remedy
    assert statuses(found(preflight.checks.links.check_links)) == [OK]


def test_every_pair_of_gpus_is_measured(gpus, monkeypatch):
    gpus(3)
    measured = []
    monkeypatch.setattr(preflight.checks.links, "copy_rate", lambda *ends: measured.append(ends) or 30.0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} == {0, 1})
    host, pairs = found(preflight.checks.links.check_links)
    assert len(set(measured)) == 6 + 6 and pairs.name == "links between GPUs (2 of 6 direct)"
    assert statuses([host, pairs]) == [OK, OK]


def test_processes_that_do_not_meet_are_ended():
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="2 processes have not met .*; .*/etc/hosts"):
        preflight.checks.all_reduce.all_reduce_rate(2, 2**10, on_gpus=False, patience_s=0)
    assert {process for process in psutil.Process().children() if is_worker(process)} <= before


def is_worker(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_slow_all_reduce_on_gpus(gpus, monkeypatch):
    gpus(3)
    monkeypatch.setattr(preflight.checks.links, "all_reduce_rate", lambda *_: 1.0)
    assert "slow" in the_bad_one(found(preflight.checks.links.check_collectives, collectives=True), WARNING).found
    assert found(preflight.checks.links.check_collectives) == []
