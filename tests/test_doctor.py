"""Every check of doctor.py on what is right and on what is spoilt, GPUs played; and the whole program on the tiny
preset, as a process.
"""

import ast
import dataclasses
import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import datasets
import psutil
import pytest
import torch
from transformers import AutoTokenizer

import checkup.all_reduce
import checkup.basics
import checkup.links
import checkup.machine
import checkup.models
import checkup.storage
import doctor
from arguments import parse_train_args
from checkup.basics import FAILURE, OK, WARNING, Case, Finding, NotLookedAt, run_check
from llamba import LlambaConfig
from llamba.kernels import Kernels, causal_conv, plain_scan
from losses import fused_distill_loss
from tests.tiny import tiny_config

ROOT = Path(__file__).parents[1]
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


@pytest.fixture
def copy_of(tmp_path):
    """A copy of a model of the tiny preset, to be spoilt."""

    def make(role):
        return Path(shutil.copytree(TINY / role, tmp_path / role))

    return make


def change_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


# --- the whole program ---------------------------------------------------------------------------------------


def test_the_tiny_preset_is_well(tmp_path):
    options = ["--preset", "tiny", "--output_dir", str(tmp_path / "new" / "run"), "--eval_interval", "5"]
    command = [sys.executable, "doctor.py", *options, "--collectives", "--json", str(tmp_path / "findings.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    findings = [Finding(**row) for row in json.loads((tmp_path / "findings.json").read_text())]
    assert not [finding for finding in findings if finding.status == FAILURE]
    lines = done.stdout.splitlines()
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
    for module in (doctor, checkup.basics):
        ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    (finding,) = checkup.basics.check_python()
    assert finding.status == FAILURE and "expected 3.10 or newer" in finding.found and "PYTHON=" in finding.remedy


def test_packages_are_held_to_the_requirements(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    lines = ["# a comment", "", "-r other.txt", "torch==99.0", "numpy>=1.0", "no-such-thing==1.0", "wandb==0.31.0"]
    file.write_text("\n".join([*lines, 'never==1.0; python_version < "3"']))
    version = checkup.basics.metadata.version

    def without_wandb(name):
        return version("no-such-thing" if name == "wandb" else name)

    monkeypatch.setattr(checkup.basics.metadata, "version", without_wandb)
    torch_, numpy_, missing, wandb_ = checkup.basics.check_packages(file)
    assert torch_.status == WARNING and "tested with 99.0" in torch_.found and 'install "torch==99.0"' in torch_.remedy
    assert numpy_.status == OK
    assert missing.status == FAILURE and 'install "no-such-thing==1.0"' in missing.remedy
    assert wandb_.status == WARNING and "needed for --wandb" in wandb_.found
    monkeypatch.setitem(checkup.basics.OLDEST, "torch", "98.0")
    assert next(checkup.basics.check_packages(file)).status == FAILURE


def test_a_local_build_of_the_tested_version_is_that_version(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("torch==2.13.0")
    monkeypatch.setattr(checkup.basics.metadata, "version", lambda _: "2.13.0+cu130")
    assert statuses(checkup.basics.check_packages(tmp_path / "requirements.txt")) == [OK]


def test_a_package_that_does_not_load(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = checkup.basics.check_imports(("json", "broken_package", "not_there_1"))
    assert finding.status == FAILURE
    assert "broken_package (OSError: libcudart.so: cannot open); not_there_1 (no module not_there_1)" in finding.found
    assert list(checkup.basics.check_imports(("json",))) == []


def test_optional_packages_are_never_wrong():
    findings = found(checkup.basics.check_optional_packages)
    assert set(statuses(findings)) == {OK} and "not needed" in findings[-1].found


# --- the machine ---------------------------------------------------------------------------------------------


@pytest.fixture
def clean_environment(monkeypatch):
    for name, *_ in checkup.machine.COSTLY:
        monkeypatch.delenv(name, raising=False)
    for name in (*checkup.machine.ALLOCATOR, "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """A machine with some GPUs of 80 GB."""

    def become(n, free=79e9, capability=(9, 0), problem=None):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), int(80e9)))
        monkeypatch.setattr(checkup.machine, "kernel_problem", lambda _: problem)

    return become


@pytest.mark.parametrize("name,values", [(name, values) for name, values, _ in checkup.machine.COSTLY])
def test_settings_that_cost_speed(clean_environment, monkeypatch, name, values):
    assert statuses(found(checkup.machine.check_environment)) == [OK]
    for value in values.split():
        monkeypatch.setenv(name, value)
        bad = the_bad_one(found(checkup.machine.check_environment), WARNING)
        assert bad.name == f"{name}={value}" and f"unset {name}" in bad.remedy
    monkeypatch.setenv(name, "unheard-of")
    assert statuses(found(checkup.machine.check_environment)) == [OK]


def test_settings_of_the_allocator_and_of_threads(clean_environment, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert "OMP_NUM_THREADS=4" in the_bad_one(found(checkup.machine.check_environment, nproc=2), WARNING).remedy
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert "OMP_NUM_THREADS=4" in the_bad_one(found(checkup.machine.check_environment, nproc=2), WARNING).remedy
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert statuses(found(checkup.machine.check_environment, nproc=2)) == [OK]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:cudaMallocAsync")
    assert "expandable_segments" in the_bad_one(found(checkup.machine.check_environment, nproc=2), WARNING).remedy


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(64_000_000, 0, 64_000_000))
    assert statuses(found(checkup.machine.check_shared_memory)) == [OK]
    bad = the_bad_one(found(checkup.machine.check_shared_memory, "--dataset_workers", 2), WARNING)
    assert "64 MB" in bad.found and "--ipc=host" in bad.remedy


def test_gpus_that_torch_does_not_see(monkeypatch, gpus):
    gpus(0)
    assert statuses(found(checkup.machine.check_gpus)) == [OK]
    monkeypatch.setattr(checkup.machine, "has_driver", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "--index-url" in the_bad_one(found(checkup.machine.check_gpus), WARNING).remedy
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "unset CUDA_VISIBLE_DEVICES" in the_bad_one(found(checkup.machine.check_gpus), WARNING).remedy
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "nvidia-smi" in the_bad_one(found(checkup.machine.check_gpus), WARNING).remedy


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
    (finding,) = found(checkup.machine.check_gpus, *options)
    assert finding.status == status and word in finding.found and bool(finding.remedy) == (status != OK)


def test_gpus_for_all_ranks(gpus, no_torchrun):
    gpus(5)
    (well,) = found(checkup.machine.check_ranks)
    assert well.name == "--nproc_per_node 4" and "cuda:0 to cuda:3, teacher on cuda:4" in well.found
    assert "needs 6 visible GPUs" in the_bad_one(found(checkup.machine.check_ranks, nproc=5)).found
    (well,) = found(checkup.machine.check_ranks, "--teacher_placement", "colocated")
    assert well.name == "--nproc_per_node 5" and "beside each" in well.found
    assert "LOCAL_WORLD_SIZE" not in os.environ
    gpus(1)
    assert "--teacher_placement colocated" in the_bad_one(found(checkup.machine.check_ranks)).remedy


def test_a_compiler_is_looked_for_only_if_asked(monkeypatch):
    assert found(checkup.machine.check_compile) == []
    monkeypatch.setattr("utils.can_compile", lambda _: False)
    assert "C++ compiler" in the_bad_one(found(checkup.machine.check_compile, "--compile")).found


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
    finding, conv = checkup.machine.compare_kernels(kernels, CPU, dtype, tiny_config())
    assert finding.name == f"scan, {str(dtype)[6:]}" and conv.status == WARNING and "causal-conv1d" in conv.remedy
    assert finding.status == (OK if scan is same else FAILURE), finding
    assert bool(finding.remedy) == (scan is not same)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("conv", [same, late])
def test_a_spoilt_convolution_is_seen(conv, dtype):
    kernels = Kernels("plain PyTorch", plain_scan, "causal-conv1d", spoilt(causal_conv, conv))
    scan, finding = checkup.machine.compare_kernels(kernels, CPU, dtype, tiny_config())
    assert finding.status == (OK if conv is same else FAILURE), finding
    assert scan.status == WARNING and "mamba-ssm" in scan.remedy


def test_a_kernel_of_a_real_size_is_within_its_tolerance():
    kernels = Kernels("mamba-ssm", plain_scan, "causal-conv1d", causal_conv)
    small = LlambaConfig(d_model=512, ssm_cfg={"n_v_heads": 4, "n_qk_heads": 4})  # with the published head's width
    assert statuses(checkup.machine.compare_kernels(kernels, CPU, torch.bfloat16, small)) == [OK, OK]


def test_kernels_of_a_cpu_are_plain():
    assert [finding.found for finding in found(checkup.machine.check_kernels)] == ["plain PyTorch, as always on a CPU"]


# --- links ---------------------------------------------------------------------------------------------------


def test_slow_links_are_named():
    one, other = torch.device("cuda:0"), torch.device("cuda:1")
    assert checkup.links.judge_links("links", {(one, other): 20.0, (other, one): 30.0}).status == OK
    slow = checkup.links.judge_links("links", {(one, other): 20.0, (other, None): 3.0})
    assert slow.status == WARNING and "3.0 GB/s (cuda:1 to host) to 20.0 GB/s" in slow.found
    assert "--teacher_signal hidden" in slow.remedy
    assert statuses(found(checkup.links.check_links)) == [OK]


def test_every_pair_of_gpus_is_measured(gpus, monkeypatch):
    gpus(3)
    measured = []
    monkeypatch.setattr(checkup.links, "copy_rate", lambda *ends: measured.append(ends) or 30.0)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} == {0, 1})
    host, pairs = found(checkup.links.check_links)
    assert len(set(measured)) == 6 + 6 and pairs.name == "links between GPUs (2 of 6 direct)"
    assert statuses([host, pairs]) == [OK, OK]


def test_processes_that_do_not_meet_are_ended():
    before = set(psutil.Process().children())
    with pytest.raises(ValueError, match="2 processes have not met .*; .*/etc/hosts"):
        checkup.all_reduce.all_reduce_rate(2, 2**10, on_gpus=False, patience_s=0)
    assert {process for process in psutil.Process().children() if is_worker(process)} <= before


def is_worker(process):
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return False


def test_a_slow_all_reduce_on_gpus(gpus, monkeypatch):
    gpus(3)
    monkeypatch.setattr(checkup.links, "all_reduce_rate", lambda *_: 1.0)
    assert "slow" in the_bad_one(found(checkup.links.check_collectives, collectives=True), WARNING).found
    assert found(checkup.links.check_collectives) == []


# --- models --------------------------------------------------------------------------------------------------


def test_a_shard_is_missing(copy_of):
    folder = copy_of("student")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    bad = the_bad_one(found(checkup.models.check_models, "--student_model", folder))
    assert "model-00002-of-00002.safetensors" in bad.found and bad.remedy == "copy them again"


def test_names_of_the_hub_that_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr("model_utils.snapshot_download", lambda *_, **__: raise_(OSError("not cached")))
    teacher, student = found(checkup.models.check_models, preset="llamba-8b")
    assert statuses([teacher, student]) == [WARNING, WARNING]
    assert "download it (16 GB)" in teacher.found and "(17 GB)" in student.found
    assert teacher.remedy.startswith("hf download meta-llama/Llama-3.1-8B-Instruct")
    findings = found(checkup.models.check_models, "--local_files_only", preset="llamba-8b")
    assert statuses(findings) == [FAILURE, FAILURE]


def raise_(error):
    raise error


def test_a_student_that_is_none(copy_of):
    bad = the_bad_one(found(checkup.models.check_models, "--student_model", copy_of("teacher")))
    assert "model_type 'llama'" in bad.found


def test_models_that_do_not_go_together(copy_of):
    bad = the_bad_one(found(checkup.models.check_configs, "--layers", 1, 9))
    assert "[9] out of range" in bad.found
    bad = the_bad_one(found(checkup.storage.check_disk, "--layers", 1, 9), WARNING)
    assert bad.found == "not looked at: teacher and student do not go together, see above"
    bad = the_bad_one(found(checkup.models.check_configs, "--gradient_checkpointing", "--checkpoint_blocks", 9))
    assert "--checkpoint_blocks 9" in bad.found
    (well,) = found(checkup.models.check_configs)
    assert well.status == OK and "[1, 2, 3]" in well.found


def test_a_checkpoint_that_is_none(tmp_path):
    assert "starts at 0" in found(checkup.models.check_resume, "--resume", "auto", "--output_dir", tmp_path)[0].found
    (tmp_path / "checkpoint-5").mkdir()
    findings = found(checkup.models.check_resume, "--resume", "auto", "--output_dir", tmp_path)
    assert findings[0].status == FAILURE and "no good checkpoint" in findings[0].found
    (tmp_path / "checkpoint-5" / "training_state.json").write_text("{}")
    both = case("--resume", "auto", "--output_dir", tmp_path)
    told = [run_check("name", check, both) for check in (checkup.models.check_resume, checkup.models.check_models)]
    assert statuses(told[0]) == [FAILURE, WARNING] and statuses(told[1]) == [OK, OK], "a bad checkpoint is told once"


# --- tokens --------------------------------------------------------------------------------------------------


def test_a_vocabulary_that_is_too_small(copy_of):
    folder = copy_of("student")
    change_json(folder / "config.json", vocab_size=1000)
    findings = found(checkup.models.check_tokens, "--student_model", folder)
    bad = the_bad_one(findings)
    assert "--student_model has a vocabulary of 1000" in bad.found and "24 token(s) beyond it" in bad.found
    assert any("1000 entries are shared; the loss leaves out the others" in finding.found for finding in findings)


def test_a_student_with_other_tokens(copy_of):
    folder = copy_of("student")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    change = {"model": {**tokenizer["model"], "vocab": {**vocab, "q": vocab["Q"], "Q": vocab["q"]}}}
    change_json(folder / "tokenizer.json", **change)
    bad = the_bad_one(found(checkup.models.check_tokens, "--student_model", folder))
    assert bad.name == "student's tokenizer" and "2 of its tokens, such as 'Q', have other ids" in bad.found
    fewer_merges = {**tokenizer["model"], "merges": tokenizer["model"]["merges"][:100]}
    change_json(folder / "tokenizer.json", model=fewer_merges)
    bad = the_bad_one(found(checkup.models.check_tokens, "--student_model", folder))
    assert bad.name == "student's tokenizer" and "cuts a probe into other tokens" in bad.found
    for file in folder.glob("tokenizer*"):
        file.unlink()
    findings = found(checkup.models.check_tokens, "--student_model", folder)
    assert set(statuses(findings)) == {OK} and "none of its own" in findings[-1].found


def test_a_tokenizer_without_an_end(copy_of):
    folder = copy_of("teacher")
    change_json(folder / "tokenizer_config.json", eos_token=None)
    assert "has no eos_token" in the_bad_one(found(checkup.models.check_tokens, "--teacher_model", folder)).found


def test_special_tokens_of_another_model(copy_of):
    teacher, student = copy_of("teacher"), copy_of("student")
    change_json(teacher / "config.json", bos_token_id=5)
    bad = the_bad_one(found(checkup.models.check_special_tokens, "--teacher_model", teacher))
    assert bad.name == "teacher's bos_token_id" and bad.found == "5 in config.json, 0 in the tokenizer"
    change_json(student / "config.json", eos_token_id=7)
    bad = the_bad_one(found(checkup.models.check_special_tokens, "--student_model", student), WARNING)
    assert bad.name == "student's eos_token_id"
    change_json(student / "config.json", bos_token_id=None, eos_token_id=[3, 0])
    findings = found(checkup.models.check_special_tokens, "--student_model", student)
    assert set(statuses(findings)) == {OK}


def test_the_probe_has_every_script():
    tokenizer = AutoTokenizer.from_pretrained(TINY / "teacher")
    assert tokenizer.decode(tokenizer(checkup.models.PROBE)["input_ids"]) == checkup.models.PROBE
    assert all(part in checkup.models.PROBE for part in ("fox", "def f(x)", "模型", "🚀", "1234567890"))


# --- the loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal,dtype", [("hidden", "float32"), ("logits", "float32"), ("hidden", "bfloat16")])
def test_equal_models_have_no_loss(signal, dtype):
    options = ("--teacher_signal", signal, "--dtype", dtype, "--temperature", 2)
    for check in (checkup.models.check_loss, checkup.models.check_equal_models):
        (finding,) = found(check, *options)
        assert finding.status == OK, finding


def test_a_loss_that_sees_a_difference(monkeypatch):
    def warmer(hidden, head, bias, signal, *rest):
        return fused_distill_loss(hidden, head, bias, signal * 1.05, *rest)

    def other_label(hidden, head, bias, signal, signal_head, labels, *rest):
        return fused_distill_loss(hidden, head, bias, signal, signal_head, labels.roll(1), *rest)

    for spoilt_loss in (warmer, other_label):
        monkeypatch.setattr(checkup.models, "fused_distill_loss", spoilt_loss)
        bad = the_bad_one(found(checkup.models.check_loss))
        assert "expected a KL below" in bad.found and bad.remedy


def test_a_layer_that_is_not_the_teachers(monkeypatch):
    def forgetful(student, teacher, layers):
        doctor_models_apply(student, teacher, layers)
        with torch.no_grad():
            student.backbone.layers[2].mlp.down_proj.weight *= 1.1

    doctor_models_apply = checkup.models.apply_replacements
    monkeypatch.setattr(checkup.models, "apply_replacements", forgetful)
    assert "whole models" in the_bad_one(found(checkup.models.check_equal_models)).name


def test_a_large_teacher_is_not_loaded(monkeypatch):
    monkeypatch.setattr(checkup.models, "SMALL_MODEL", 1000)
    monkeypatch.setattr(checkup.models, "get_teacher_model", lambda *_: pytest.fail("was loaded"))
    (finding,) = found(checkup.models.check_equal_models)
    assert finding.status == OK and "only the loss" in finding.found


# --- data ----------------------------------------------------------------------------------------------------


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(path, *texts):
    path.write_text("".join(json.dumps({"text": text, "n": 1}) + "\n" for text in texts))
    return path


@pytest.mark.parametrize("streaming", ["--dataset_streaming", "--no_dataset_streaming"])
def test_text_that_can_be_read(tmp_path, datasets_cache, streaming):
    file = rows(tmp_path / "text.jsonl", "abcd", "", "abcdef")
    finding, empty = found(checkup.storage.check_data, "--dataset_name", file, streaming)
    assert finding.status == OK and "2 of the first 3 rows have text, of 5 characters" in finding.found
    assert empty.status == WARNING and "skipped 1 of 3 rows" in empty.found


@pytest.mark.parametrize(
    "options,word",
    [
        (("--dataset_text_field", "content"), "no such column"),
        (("--dataset_text_field", "n"), "expected text"),
        (("--dataset_split", "test"), "no such split"),
        (("--dataset_split", "train[:50%]", "--dataset_streaming"), "--dataset_split"),
    ],
)
def test_text_that_cannot_be_read(tmp_path, datasets_cache, options, word):
    file = rows(tmp_path / "text.jsonl", "abcd")
    options = ("--dataset_name", file, "--no_dataset_streaming", *options)
    assert word in the_bad_one(found(checkup.storage.check_data, *options)).found


def test_data_that_is_not_there(tmp_path, datasets_cache):
    bad = the_bad_one(found(checkup.storage.check_data, "--dataset_name", tmp_path / "none.jsonl"))
    assert "no such file" in bad.found
    empty = rows(tmp_path / "empty.jsonl", "", "")
    bad = next(f for f in found(checkup.storage.check_data, "--dataset_name", empty) if f.status == FAILURE)
    assert "none of the first 2 rows has text" in bad.found
    hub = ("--dataset_name", "someone/something", "--dataset_subset", "part")
    bad = the_bad_one(found(checkup.storage.check_data, *hub, "--local_files_only"))
    assert "load_dataset('someone/something', 'part', split='train')" in bad.remedy
    online = dataclasses.replace(case(*hub).args, local_files_only=False)
    bad = the_bad_one(run_check("data", checkup.storage.check_data, Case(online)), WARNING)
    assert "not on this disk" in bad.found


def test_a_data_set_of_the_hub_that_was_prepared_before(tmp_path, datasets_cache):
    """As `load_dataset` leaves it in its cache."""
    folder = tmp_path / "cache" / "someone___something" / "default" / "0.0.0" / ("0" * 40)
    folder.mkdir(parents=True)
    info = {"splits": {"train": {"name": "train", "num_bytes": 999, "num_examples": 30, "dataset_name": "something"}}}
    info |= {"dataset_size": 999, "version": "0.0.0", "config_name": "default", "dataset_name": "something"}
    table = datasets.Dataset.from_dict({"text": ["abcd"] * 30})
    info["features"] = {"text": {"dtype": "string", "_type": "Value"}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with datasets.arrow_writer.ArrowWriter(path=str(folder / "something-train.arrow"), features=table.features) as w:
        w.write_table(table.data.table)
        w.finalize()
    for more in (("--no_dataset_streaming", "--dataset_split", "train[:50%]"), ("--dataset_streaming",)):
        options = ("--dataset_name", "someone/something", "--local_files_only", *more)
        (finding,) = found(checkup.storage.check_data, *options)
        assert finding.status == OK and "16 of the first 16 rows" in finding.found
    options = ("--dataset_name", "someone/something", "--no_dataset_streaming")
    (finding,) = found(checkup.storage.check_room_for_packed_data, *options)
    assert finding.status == OK and "about 2e-06 GB" in finding.found, "its rows are there already: 3e-06 with them"


def test_of_a_part_of_a_split_the_first_rows_are_read(tmp_path, datasets_cache):
    file = rows(tmp_path / "text.jsonl", *["abcd"] * 40)
    options = ("--dataset_name", file, "--no_dataset_streaming", "--dataset_split", "train[:50%]")
    assert statuses(found(checkup.storage.check_data, *options)) == [OK]
    assert not list((tmp_path / "cache").rglob("*.arrow")), "no table is made"


def test_held_out_text_is_looked_at_too(tmp_path, datasets_cache):
    assert found(checkup.storage.check_held_out_data) == []
    options = ("--eval_interval", 5, "--eval_dataset_name", tmp_path / "none.jsonl")
    assert "--eval_dataset_name" in the_bad_one(found(checkup.storage.check_held_out_data, *options)).found
    options = ("--eval_interval", 5, "--eval_mmlu_dir", tmp_path)
    assert "--eval_mmlu_dir" in the_bad_one(found(checkup.storage.check_held_out_data, *options)).found
    options = ("--eval_interval", 5, "--eval_mmlu_dir", TINY / "mmlu")
    assert statuses(found(checkup.storage.check_held_out_data, *options)) == [OK, OK]


def full_disk(free):
    return lambda _: shutil._ntuple_diskusage(10**12, 10**12 - free, free)


def test_room_for_packed_data(tmp_path, monkeypatch):
    options = ("--dataset_cache_dir", tmp_path / "packed")
    assert statuses(found(checkup.storage.check_room_for_packed_data, *options)) == [OK]
    assert found(checkup.storage.check_room_for_packed_data, "--dataset_streaming") == []
    monkeypatch.setattr(shutil, "disk_usage", full_disk(1_000_000))
    bad = the_bad_one(found(checkup.storage.check_room_for_packed_data, *options), WARNING)
    assert "about 0.0029 GB" in bad.found and "--dataset_cache_dir" in bad.remedy
    bad = the_bad_one(found(checkup.storage.check_room_for_packed_data, "--dataset_text_field", "n"), WARNING)
    assert "the data cannot be read" in bad.found
    (tmp_path / "packed").write_text("")
    assert "cannot be written" in the_bad_one(found(checkup.storage.check_room_for_packed_data, *options)).found


# --- checkpoints and memory ----------------------------------------------------------------------------------


def test_an_output_dir_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    bad = the_bad_one(found(checkup.storage.check_output_dir, "--output_dir", tmp_path / "file" / "run"))
    assert f"{tmp_path / 'file'} cannot be written" in bad.found

    def read_only(**_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", read_only)
    bad = the_bad_one(found(checkup.storage.check_output_dir, "--output_dir", tmp_path / "run"))
    assert "Read-only file system" in bad.found


def test_an_output_dir_that_holds_another_run(tmp_path):
    (tmp_path / "checkpoint-5").mkdir()
    options = ("--output_dir", tmp_path)
    assert "--resume auto" in the_bad_one(found(checkup.storage.check_output_dir, *options)).remedy
    for more in (("--resume", "auto"), ("--resume_step", 5)):
        assert statuses(found(checkup.storage.check_output_dir, *options, *more)) == [OK]


def test_a_full_disk(tmp_path, monkeypatch):
    options = ("--output_dir", tmp_path / "run", "--save_total_limit", 1)
    assert statuses(found(checkup.storage.check_disk, *options)) == [OK]
    monkeypatch.setattr(shutil, "disk_usage", full_disk(20_000_000))
    assert "expected room for two" in the_bad_one(found(checkup.storage.check_disk, *options)).found
    monkeypatch.setattr(shutil, "disk_usage", full_disk(30_000_000))
    options = ("--output_dir", tmp_path / "run", "--max_steps", 100000)
    assert "--save_total_limit" in the_bad_one(found(checkup.storage.check_disk, *options), WARNING).found
    assert not (tmp_path / "run").exists()


def test_little_host_memory(tmp_path, monkeypatch):
    assert statuses(found(checkup.storage.check_host_memory)) == [OK]
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(checkup.storage, "MEMORY_LIMIT", limit)
    limit.write_text("max\n")
    assert statuses(found(checkup.storage.check_host_memory)) == [OK]
    limit.write_text("25000000\n")
    assert "--no_background_save" in the_bad_one(found(checkup.storage.check_host_memory), WARNING).remedy
    assert statuses(found(checkup.storage.check_host_memory, "--no_background_save")) == [OK]
    assert "a machine with more" in the_bad_one(found(checkup.storage.check_host_memory, nproc=8), WARNING).remedy


# --- charts --------------------------------------------------------------------------------------------------


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """Someone without any login or setting of W&B."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def online(monkeypatch, check=checkup.storage.check_wandb):
    return run_check("W&B", check, Case(dataclasses.replace(case("--wandb").args, local_files_only=False)))


def test_wandb_without_login_or_network(nobody, monkeypatch):
    connections = []

    def connect(address, timeout):
        connections.append(address)
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", connect)
    assert found(checkup.storage.check_wandb) == []
    assert "offline" in found(checkup.storage.check_wandb, "--wandb")[0].found  # the preset touches no network
    bad = the_bad_one(online(monkeypatch))
    assert "without a login for api.wandb.ai" in bad.found and "wandb login" in bad.remedy and not connections
    nobody.write_text("machine api.wandb.ai login user password not-a-key\n")
    bad = the_bad_one(online(monkeypatch), WARNING)
    assert "cannot be reached" in bad.found and bad.remedy == "--wandb_mode offline"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "login for wandb.example.org" in the_bad_one(online(monkeypatch)).found
    monkeypatch.setenv("WANDB_API_KEY", "not-a-key")
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: socket.socket())
    assert statuses(online(monkeypatch)) == [OK]


def test_charts_without_their_packages(nobody, monkeypatch):
    assert found(checkup.storage.check_tensorboard, "--tensorboard") == []
    monkeypatch.setattr(checkup.storage.importlib.util, "find_spec", lambda _: None)
    assert "not installed" in the_bad_one(found(checkup.storage.check_wandb, "--wandb")).found
    assert "not installed" in the_bad_one(found(checkup.storage.check_tensorboard, "--tensorboard")).found
