"""The real entry on real ranks, on random tiny models and real text: what ranks agree on, what a step does, what is
left on disk, and how bad input ends. Ranks are forks of a fresh process, and torchrun's where it matters that they are.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import distillation.models
import train_gpus
from llamba import LlambaForCausalLM
from tests import fresh, run_and_dump
from tests.tiny import tiny_student, tiny_teacher

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "presets" / "tiny" / "teacher"
TEXT = ROOT / "presets" / "tiny" / "text" / "heldout.jsonl"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher with 1030 entries and a student with 1024, for the tiny preset's tokenizer of at most 1024."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    assert len(tokenizer) <= 1024
    tiny_teacher(vocab_size=1030).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    tiny_student(vocab_size=1024).save_pretrained(folder / "student")
    return folder


def options(models, output_dir, **changes):
    values = {
        "teacher_model": models / "teacher",
        "student_model": models / "student",
        "dataset_name": TEXT,
        "dataset_cache_dir": models / "cache",
        "output_dir": output_dir,
        "layers": "1 3",
        "dtype": "float32",
        "seq_length": 32,
        "batch_size": 2,
        "max_steps": 6,
        "max_lr": 1e-3,
        "warmup_ratio": 0.0,
        "log_interval": 2,
        "save_interval": 3,
        **changes,
    }
    argv = ["--local_files_only"]
    for name, value in values.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None:
            argv += [f"--{name}", *str(value).split()]
    return argv


def start_torchrun(*torchrun_options, argv, script="tests/run_and_dump.py"):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", *torchrun_options, script, *argv]
    return subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def torchrun(n_ranks, argv, script="tests/run_and_dump.py"):
    """Runs to the end; returns (exit code, standard error)."""
    process = start_torchrun("--standalone", f"--nproc_per_node={n_ranks}", argv=argv, script=script)
    _, stderr = process.communicate(timeout=240)
    return process.returncode, stderr


def train(n_ranks, argv, main=train_gpus.main, **environment):
    """A run in forks that has to succeed; returns what it wrote."""
    codes, log = fresh.ranks(argv, n_ranks, main, **environment)
    assert codes == [0] * n_ranks, log[-4000:]
    return log


@pytest.fixture(scope="module")
def run(models, tmp_path_factory):
    """Runs once for each set of options that a test asks for; returns the output directory."""
    done = {}

    def run_once(n_ranks=2, **changes):
        key = (n_ranks, *sorted(changes.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp("run") / "out"
            log = train(n_ranks, options(models, folder, no_dataset_streaming=True, **changes), run_and_dump.main)
            (folder / "log.txt").write_text(log)
            done[key] = folder
        return done[key]

    return run_once


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder, rank=0):
    return torch.load(folder / f"rank-{rank}.pt", weights_only=True)


def moved(folder, step):
    """Names of weights that differ between checkpoint-0 and checkpoint-<step>."""
    before, after = (
        LlambaForCausalLM.from_pretrained(folder / f"checkpoint-{n}", dtype="auto").state_dict() for n in (0, step)
    )
    return {name for name in before if not torch.equal(before[name], after[name])}


FROZEN = {"freeze_mlp": True, "freeze_replaced_layers": True}


# --- what ranks agree on -------------------------------------------------------------------------------------


def test_all_ranks_hold_the_same_weights(run):
    folder = run(2, **FROZEN)
    first, second = weights(folder, 0), weights(folder, 1)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_two_students_equal_one_with_twice_the_batch(run):
    two, one = run(2, **FROZEN), run(1, batch_size=4, **FROZEN)
    for a, b in zip(metrics(two), metrics(one), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        assert a["tokens"] == b["tokens"]
    two_weights, one_weights = weights(two), weights(one)
    for name in two_weights:
        torch.testing.assert_close(two_weights[name], one_weights[name], rtol=1e-3, atol=1e-4)


def test_two_nodes_equal_two_ranks_of_one(run, models, tmp_path):
    """Each node runs a teacher of its own; two torchruns on this machine stand for two nodes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    argv = options(models, tmp_path / "out", no_dataset_streaming=True, **FROZEN)
    common = ["--nnodes=2", "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}"]
    nodes = [start_torchrun(*common, f"--node_rank={rank}", argv=argv) for rank in (0, 1)]
    ends = [node.communicate(timeout=240)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    one_node = run(2, **FROZEN)
    for a, b in zip(metrics(tmp_path / "out"), metrics(one_node), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert a["kl"] == pytest.approx(b["kl"], rel=1e-6)
    for rank in (0, 1):
        for name, weight in weights(tmp_path / "out", rank).items():
            torch.testing.assert_close(weight, weights(one_node)[name], rtol=1e-4, atol=1e-6)


def test_accumulated_steps_equal_one_large_batch(run):
    accumulated = run(1, grad_accumulation_steps=2, save_interval=4, **FROZEN)
    for a, b in zip(metrics(accumulated), metrics(run(1, batch_size=4, **FROZEN)), strict=True):
        assert a["micro_step"] == 2 * a["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_both_teacher_signals_give_the_same_losses(run):
    hidden, logits = run(2, **FROZEN), run(2, teacher_signal="logits", **FROZEN)
    for a, b in zip(metrics(hidden), metrics(logits), strict=True):
        for name in ("loss", "kl", "ce"):
            assert a[name] == pytest.approx(b[name], rel=1e-5)
        assert a["kl"] > 0.01


@pytest.mark.parametrize("changes", [{"teacher_prefetch": 1}, {"teacher_placement": "colocated"}])
def test_where_and_when_the_teacher_works_changes_no_figure(run, changes):
    """Bit for bit: each rank's part is computed alone, wherever that is; and what was fetched ahead is not counted."""
    ahead, other = metrics(run(2, **FROZEN)), metrics(run(2, **changes, **FROZEN))
    for a, b in zip(ahead, other, strict=True):
        for name in ("micro_step", "tokens", "loss", "kl", "ce", "grad_norm", "lr"):
            assert a[name] == b[name], name
    for name, weight in weights(run(2, **FROZEN)).items():
        assert torch.equal(weight, weights(run(2, **changes, **FROZEN))[name]), name


# --- what a step does ----------------------------------------------------------------------------------------


def test_the_first_loss_is_the_reference_loss(run, models):
    """The logged figures against a plain single-process computation on the same windows."""
    import arguments
    from data import build_dataloader
    from distillation.losses import compute_distill_loss

    folder = run(2, **FROZEN)
    argv = options(models, folder, no_dataset_streaming=True, **FROZEN)
    args = arguments.parse_train_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    args.batch_size = 4
    batch = next(iter(build_dataloader(args, tokenizer, rank=0, world_size=1, is_builder=True)))
    student = LlambaForCausalLM.from_pretrained(folder / "checkpoint-0").eval()
    teacher = AutoModelForCausalLM.from_pretrained(models / "teacher").eval()
    with torch.no_grad():
        total, kl, ce = compute_distill_loss(
            student(batch.input_ids).logits,
            teacher(batch.input_ids).logits,
            batch.labels,
            batch.loss_mask,
            args.ce_weight,
            args.kl_weight,
            args.temperature,
        )
    first = metrics(folder)[0]
    assert (first["loss"], first["kl"], first["ce"]) == pytest.approx((total.item(), kl.item(), ce.item()), rel=1e-5)


def test_frozen_weights_stay_and_all_others_move(run):
    folder = run(2, **FROZEN)
    changed = moved(folder, 6)
    everything = set(weights(folder))
    frozen = {name for name in everything if ".mlp." in name or ".layers.1." in name or ".layers.3." in name}
    assert changed == everything - frozen


def test_weights_move_in_bfloat16_at_a_small_learning_rate(run):
    """At lr 1e-5 a bfloat16 AdamW loses most of its steps; with float32 masters they add up."""
    folder = run(1, dtype="bfloat16", max_lr=1e-5, max_steps=30, save_interval=0, weight_decay=0.0)
    before, after = (LlambaForCausalLM.from_pretrained(folder / f"checkpoint-{n}", dtype="auto") for n in (0, 30))
    assert after.dtype == torch.bfloat16
    name = "backbone.layers.0.mixer.in_proj.weight"
    old, new = before.state_dict()[name], after.state_dict()[name]
    spacing = old.abs().float() * 2**-8  # half of a bfloat16 step
    reachable = spacing < 30 * 1e-5 * 0.5  # weights that half of the summed steps would carry across
    assert reachable.float().mean() > 0.02
    assert (old != new)[reachable].float().mean() > 0.5


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_train_like_float32(run, dtype):
    reference, half = metrics(run(2, **FROZEN)), metrics(run(2, dtype=dtype, **FROZEN))
    for a, b in zip(reference, half, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=0.02)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=0.1)


def test_without_kl_no_teacher_runs(run):
    folder = run(2, kl_weight=0.0, **FROZEN)
    assert all(row["kl"] == 0 and row["teacher_wait_s"] == 0 for row in metrics(folder))
    with_teacher = metrics(run(2, **FROZEN))[0]
    assert metrics(folder)[0]["ce"] == pytest.approx(with_teacher["ce"], rel=1e-5)  # the layers came all the same


def losses(folder):
    return [row["loss"] for row in metrics(folder)]


@pytest.mark.parametrize("more", [{}, {"checkpoint_blocks": 2, "loss_chunk_tokens": 10}])
def test_ways_to_save_memory_change_no_loss(run, more):
    other = run(2, gradient_checkpointing=True, **more, **FROZEN)
    assert losses(other) == pytest.approx(losses(run(2, **FROZEN)), rel=1e-5)


@pytest.mark.parametrize(
    "backend,layers", [("aot_eager", "1"), ("inductor", "0 1"), pytest.param("inductor", "1", marks=pytest.mark.bench)]
)
def test_compiled_blocks_change_no_loss(run, models, tmp_path, backend, layers):
    """The C++ of one mixer, forward and backward, is a minute of a compiler's work, in `make test-bench`; here its
    graphs alone are made, and the compiler works for attention and the loss.
    """
    if not (short := models / "short").exists():
        tiny_teacher(vocab_size=1030, num_hidden_layers=2).save_pretrained(short / "teacher")
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(short / "teacher")
        tiny_student(vocab_size=1024, n_layer=2).save_pretrained(short / "student")
    changes = dict(teacher_model=short / "teacher", student_model=short / "student", layers=layers, **FROZEN)
    argv = options(models, tmp_path / "out", no_dataset_streaming=True, compile=True, **changes)
    train(1, argv, run_and_dump.main, COMPILE_BACKEND=backend)
    assert losses(tmp_path / "out") == pytest.approx(losses(run(1, **changes)), rel=1e-5)


# --- what is left on disk ------------------------------------------------------------------------------------


def test_checkpoints_metrics_and_log(run):
    folder = run(2, **FROZEN)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-0", "checkpoint-3", "checkpoint-6"}
    state = json.loads((folder / "checkpoint-3" / "training_state.json").read_text())
    assert (state["micro_step"], state["step"], state["arguments"]["layers"]) == (3, 3, [1, 3])
    assert AutoTokenizer.from_pretrained(folder / "checkpoint-6").eos_token == "<|endoftext|>"
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoint-6").config.attention_layers == [1, 3]

    rows = metrics(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["tokens"] == 6 * 2 * 2 * 32
    names = {"step", "micro_step", "loss", "ce", "kl", "lr", "grad_norm", "tokens", "tokens_per_s", "step_time_s"}
    assert names | {"teacher_wait_s", "data_wait_s"} <= rows[0].keys()
    log = (folder / "log.txt").read_text()
    assert "[train] micro_step 6 (opt 6) | loss " in log
    assert log.count("[train] micro_step 2 ") == 1  # one rank speaks
    assert "replaced layers" in log


def test_the_environment_of_slow_links_changes_nothing(run, models, tmp_path, monkeypatch):
    """What users with bad interconnect set; gloo ignores the NCCL part, and torch's DETAIL crashes DDP on gloo."""
    slow = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_ALGO": "Ring", "NCCL_MAX_NCHANNELS": "1"}
    slow |= {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
    for name, value in slow.items():
        monkeypatch.setenv(name, value)
    code, stderr = torchrun(2, options(models, tmp_path / "out", no_dataset_streaming=True, **FROZEN))
    assert code == 0, stderr[-3000:]
    assert [row["loss"] for row in metrics(tmp_path / "out")] == [row["loss"] for row in metrics(run(2, **FROZEN))]
    assert "NCCL_P2P_DISABLE=1" in stderr and "DETAIL taken as INFO" in stderr


def test_streaming_resume_step_and_wandb_offline(models, tmp_path):
    """A run that goes on from a checkpoint's weights: counters and schedule at their place, the hybrid as it was."""
    first = tmp_path / "first"
    changes = dict(shuffle_buffer=20, max_steps=4, save_interval=2, decay_ratio=0.5, wandb=True)
    train(1, options(models, first, **changes))
    assert list((first / "wandb").glob("offline-run-*"))

    second = tmp_path / "second"
    argv = options(models, second, **{**changes, "wandb": None}, resume_step=2)
    argv[argv.index("--student_model") + 1] = str(first / "checkpoint-2")
    train(1, argv)
    rows, expected = metrics(second), metrics(first)[2:]
    assert [(r["step"], r["micro_step"], r["lr"]) for r in rows] == [
        (r["step"], r["micro_step"], r["lr"]) for r in expected
    ]
    assert {path.name for path in second.glob("checkpoint-*")} == {"checkpoint-4"}


# --- bad input -----------------------------------------------------------------------------------------------


def fail(models, tmp_path, monkeypatch, **changes):
    """The error of a run in this process, which must come before any weight is read."""
    for loader in ("get_student_model", "get_teacher_model"):
        monkeypatch.setattr(distillation.models, loader, lambda *a, **k: pytest.fail("a model was loaded"))
    argv = options(models, **{"output_dir": tmp_path / "out", "no_dataset_streaming": True, **changes})
    monkeypatch.setattr(sys, "argv", ["train_gpus.py", *argv])
    with pytest.raises(ValueError) as error:
        train_gpus.main()
    return str(error.value)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"layers": "1 9"}, ["--layers 1 9", "out of range", "0 to 3"]),
        ({"dataset_text_field": "body"}, ["--dataset_text_field", "body", "text"]),
        ({"batch_size": 100_000}, ["too small", "--batch_size"]),
        ({"teacher_device": "cuda:3"}, ["--teacher_device cuda:3"]),
        ({"temperature": 0}, ["--temperature 0"]),
        ({"teacher_model": "meta-llama/Absent"}, ["--teacher_model meta-llama/Absent", "hf download"]),
        ({"dataset_split": "validation"}, ["--dataset_split", "validation"]),
        ({"dataset_name": "nowhere.jsonl"}, ["--dataset_name", "nowhere.jsonl"]),
        ({"output_dir": "/proc/nowhere"}, ["--output_dir /proc/nowhere", "cannot be written"]),
        ({"grad_accumulation_steps": 900, "save_interval": 900}, ["--grad_accumulation_steps 900", "micro steps"]),
        ({"log_file": "/proc/nowhere/log"}, ["--log_file /proc/nowhere/log", "cannot be written"]),
        ({"teacher_device": "meta"}, ["--teacher_device meta", "expected cpu"]),
        ({"gradient_checkpointing": True, "checkpoint_blocks": 5}, ["--checkpoint_blocks 5", "has 4"]),
        ({"resume_step": 600}, ["--resume_step 600", "nothing is left"]),
        ({"save_interval": 3, "grad_accumulation_steps": 2}, ["--save_interval 3", "--grad_accumulation_steps 2"]),
        ({"eval_interval": 2}, ["--eval_interval 2", "is trained on", "--eval_dataset_name"]),
        ({"eval_windows": -1}, ["--eval_windows -1"]),
        ({"eval_interval": 2, "eval_dataset_name": "nowhere.jsonl"}, ["--eval_dataset_name 'nowhere.jsonl'"]),
    ],
)
def test_bad_input_is_one_clear_error_before_a_model_is_loaded(models, tmp_path, monkeypatch, changes, words):
    message = fail(models, tmp_path, monkeypatch, **changes)
    for word in words:
        assert word in message


def test_streaming_that_ends_on_a_save_or_within_an_accumulation(models, tmp_path):
    """Micro steps after the last update change nothing: the last checkpoint is that of the update, saved once."""
    text = tmp_path / "short.jsonl"
    text.write_text("".join(TEXT.read_text().splitlines(keepends=True)[:8]))
    for accumulate, save_interval in ((1, 1), (3, 0)):
        folder = tmp_path / f"out-{accumulate}"
        changes = dict(grad_accumulation_steps=accumulate, save_interval=save_interval, max_steps=1000, batch_size=1)
        log = train(1, options(models, folder, dataset_name=text, **changes))
        last = metrics(folder)[-1]["micro_step"]
        assert max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")) == last
        assert "before the learning rate had decayed" in log


@pytest.mark.parametrize("rank,under_torchrun", [(0, False), (1, True)])
def test_a_rank_that_fails_ends_the_others_and_tells_why(models, tmp_path, monkeypatch, rank, under_torchrun):
    """The others wait in a collective meanwhile, whichever rank it is."""
    monkeypatch.setenv("FAIL_ON_RANK", str(rank))
    monkeypatch.setenv("FAIL_AT_MICRO_STEP", "4")
    folder = tmp_path / "out"
    argv = options(models, folder, no_dataset_streaming=True)
    began = time.monotonic()
    if under_torchrun:
        code, text = torchrun(2, argv)
        assert code not in (0, 75)
    else:
        codes, text = fresh.ranks(argv, 2, run_and_dump.main)
        assert codes == [1, 1]
    assert time.monotonic() - began < 120
    cause = f"rank {rank} failed: OSError: the disk of rank {rank} is gone"
    assert text.count(f"this run ends because {cause}") == 1  # the other rank's word
    assert text.count("OSError: the disk of rank") == 2  # and the traceback of the one that failed
    assert "Traceback" in text and "take_a_batch_or_fail" in text
    assert (folder / "checkpoint-0").is_dir() and not (folder / "checkpoint-6").exists()
    assert not any((folder / f"rank-{n}.pt").exists() for n in (0, 1))
    assert json.loads((folder / "status.json").read_text())["status"] == "running"  # nobody has said otherwise


def test_a_tokenizer_that_is_too_large_for_the_student(models, tmp_path, monkeypatch):
    tiny_student(vocab_size=96).save_pretrained(tmp_path / "small")
    message = fail(models, tmp_path, monkeypatch, student_model=tmp_path / "small")
    assert "--student_model" in message and "96" in message


def test_an_output_directory_with_results_is_left_alone(models, tmp_path, monkeypatch):
    (tmp_path / "out" / "checkpoint-30").mkdir(parents=True)
    assert "checkpoint-30" in fail(models, tmp_path, monkeypatch)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-30", ".lock"}
    assert list((tmp_path / "out" / "checkpoint-30").iterdir()) == []


def test_under_torchrun_one_rank_reports_and_the_exit_code_is_not_zero(models, tmp_path):
    code, stderr = torchrun(2, options(models, tmp_path, layers="1 9"), "train_gpus.py")
    assert code != 0
    assert stderr.count("error: --layers 1 9") == 1
    assert 'train_gpus.py", line' not in stderr  # no traceback of ours
