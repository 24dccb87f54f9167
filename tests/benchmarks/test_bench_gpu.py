"""benchmarks/bench_gpu.py without a GPU: its trial run from end to end, and, with stand-ins for the card, which models
fit, how kernels are attributed, and what a failed part leaves.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.autograd import DeviceType
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.bench
ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def part_run(training_options="", device=CPU, quick=True, seconds=60.0):
    from gpu_measure import PartRun

    return PartRun("a section", "a case", training_options, device, quick, time.monotonic() + seconds)


def started(**options):
    """Returns the options of a trial run that starts a process."""
    return argparse.Namespace(device="cpu", quick=True, short=False, time_limit=60.0, **options)


def emitted(capsys):
    from harness import RESULT

    lines = capsys.readouterr().out.splitlines()
    return [json.loads(line.removeprefix(RESULT)) for line in lines if line.startswith(RESULT)]


def test_the_trial_run_measures_everything(tmp_path):
    command = [sys.executable, "benchmarks/bench_gpu.py", "--device", "cpu", "--quick", "--json", tmp_path / "gpu.json"]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert all({"case", "candidate", "seconds", "peak_bytes", "ratio_to_baseline"} <= set(row) for row in rows)
    of = {section: [row for row in rows if row["section"] == section] for section in ("card", "loss", "scan", "step")}
    of["profile"] = {row["candidate"]: row for row in rows if row["case"] == "batch 2, colocated" and "share" in row}

    assert f"torch {torch.__version__}" in of["card"][0]["machine"] and of["card"][0]["machine"] in run.stdout
    losses = {row["candidate"]: row for row in of["loss"] if "note" not in row}
    assert {"plain", "fused", "fused, eager", "fused, chunks of 16", "four products"} <= set(losses)
    assert all(0 < row["gradient_error"] < 0.01 for name, row in losses.items() if name != "four products")
    assert losses["plain"]["ratio_to_baseline"] == 1 and losses["fused"]["ratio_to_baseline"] > 0
    scans = [row for row in of["scan"] if row["candidate"] == "plain PyTorch"]
    names = ["convolution", "scan", "mixer", "norm", "SwiGLU", "gate"]
    assert [row["case"].split(",")[0] for row in scans] == [name for name in names for _ in range(2)]
    assert all(0 < row["relative_error"] < 0.01 for row in scans)
    assert all(row["tokens_per_s"] > 0 and row["mfu"] > 0 and row["loss"] > 0 for row in of["step"])
    assert of["step"][0]["ratio_to_baseline"] == 1
    same_work = [row["loss"] for row in of["step"] if "batch 2" in row["case"]]
    assert len(same_work) == 4 and same_work == pytest.approx([same_work[0]] * 4, rel=1e-3)
    assert [row["checkpointing"] for row in of["step"] if "checkpointing" in row["case"]] == ["yes"]
    parts = {name: row["share"] for name, row in of["profile"].items() if name.startswith("part: ")}
    assert set(parts) == {f"part: {name}" for name in ("loss", "scan", "student", "teacher", "optimizer and the rest")}
    assert sum(parts.values()) == pytest.approx(1) and min(parts.values()) > 0
    assert 0 < of["profile"]["matrix products"]["share"] < 1
    assert all(f"\n{section}\n" in run.stdout for section in of)


def test_the_short_form_has_each_section_once():
    from bench_gpu import PARTS, SECTIONS

    assert sorted(part.section for part in PARTS if part.in_short) == sorted(SECTIONS)


# --- parts that fail -----------------------------------------------------------------------------------------


def test_a_candidate_that_fails_leaves_the_others(capsys):
    from gpu_measure import compare
    from harness import NotInstalled

    one = torch.ones(3, 2)

    def absent():
        raise NotInstalled("a peer")

    def broken():
        raise RuntimeError("no such kernel\nand more lines")

    candidates = {
        "good": lambda: lambda: one,
        "absent": absent,
        "broken": lambda: broken,
        "wrong": lambda: lambda: 2 * one,
        "nan": lambda: lambda: one * float("nan"),
        "not comparable": lambda: lambda: None,
    }
    compare(part_run(), "case", candidates, lambda out: {"error_of_it": (out - one).norm().item() / one.norm().item()})
    rows = {row["candidate"]: row for row in emitted(capsys)}  # the last row of a name counts
    assert set(rows) == set(candidates)
    assert rows["good"]["error_of_it"] == 0 and rows["good"]["ratio_to_baseline"] == 1 and "error" not in rows["good"]
    assert rows["absent"]["note"] == "not installed: a peer" and "error" not in rows["absent"]
    assert rows["broken"]["error"] == "RuntimeError: no such kernel"
    assert rows["wrong"]["error"] == "wrong result: error_of_it 1" and rows["wrong"]["seconds"] > 0
    assert rows["nan"]["error_of_it"] is None and "nan" in rows["nan"]["error"]
    assert rows["not comparable"]["ratio_to_baseline"] > 0


def test_nothing_is_started_when_time_is_up(capsys):
    from gpu_measure import compare

    compare(part_run(seconds=-1), "case", {"late": lambda: pytest.fail("started")}, lambda out: {})
    assert emitted(capsys)[0]["note"] == "not run: out of time"


@pytest.mark.parametrize(
    "last_words,error", [("time.sleep(60)", "stopped after 2 seconds"), ("sys.exit(3)", "ended with exit code 3")]
)
def test_what_a_process_said_before_it_failed_is_kept(tmp_path, monkeypatch, last_words, error):
    import bench_gpu
    from harness import RESULT

    row = {"section": "step", "case": "batch 1", "candidate": "said"}
    script = tmp_path / "fails.py"
    script.write_text(
        f"import sys, time\nprint({RESULT + json.dumps(row)!r}, flush=True)\nprint('noise')\n{last_words}"
    )
    monkeypatch.setattr(bench_gpu, "__file__", str(script))
    monkeypatch.setattr(bench_gpu, "LEAST_TIME", 0)
    part, options = bench_gpu.Part("step", "gpu_step", 60, "batch 1"), started()
    rows = bench_gpu.start_process([part], options, 2)
    assert rows == [row, {**row, "candidate": "process", "error": error}]


def test_a_process_is_not_started_in_the_last_seconds():
    import bench_gpu

    part = bench_gpu.Part("step", "gpu_step", 60, "batch 1")
    (row,) = bench_gpu.start_process([part], started(), bench_gpu.LEAST_TIME - 1)
    assert row["section"] == "step" and row["error"].startswith("not run")


def test_a_part_that_raises_is_a_line_and_not_the_end(capsys):
    import bench_gpu

    options = started(seconds=60.0)
    bench_gpu.run_part(bench_gpu.Part("no_such_section", "gpu_step", 60, "a case"), options)
    (row,) = emitted(capsys)
    assert row["case"] == "a case" and row["error"] == "KeyError: 'no_such_section'"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    import bench_gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments, answer in (([], "--device cpu --quick"), (["--device", "cpu"], "add --quick")):
        monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *arguments])
        with pytest.raises(SystemExit, match="2"):
            bench_gpu.main()
        assert answer in capsys.readouterr().err


# --- the step ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "free_gb,n_layer,checkpointing", [(85, 32, False), (60, 32, True), (56, 24, True), (30, 8, False), (20, None, None)]
)
def test_what_fits_is_chosen_by_arithmetic(monkeypatch, free_gb, n_layer, checkpointing):
    from gpu_step import choose_shapes

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free_gb * 10**9, 85 * 10**9))
    asked = part_run("--batch_size 2", torch.device("cuda:0"), quick=False)
    if n_layer is None:
        with pytest.raises(ValueError, match="19 GB of memory are too few"):
            choose_shapes(asked)
        return
    shapes, args = choose_shapes(asked)
    assert (shapes.student.n_layer, args.gradient_checkpointing) == (n_layer, checkpointing)
    assert shapes.teacher.num_hidden_layers == n_layer and set(args.layers) < set(range(n_layer))
    assert args.freeze_mlp and args.freeze_replaced_layers and args.seq_length == 1024 and args.batch_size == 2


def test_the_real_shapes_are_those_of_the_production_models():
    """The README's figures: 8.7 billion parameters, 2.9 billion trained; 8 billion of the teacher."""
    from gpu_step import build, real_shapes

    from model_utils import apply_replacements, freeze_student_layers, freeze_student_mlps

    shapes, meta = real_shapes(32), torch.device("meta")
    teacher, student = (build(config, torch.bfloat16, meta) for config in (shapes.teacher, shapes.student))
    apply_replacements(student, teacher, shapes.layers)
    freeze_student_mlps(student)
    freeze_student_layers(student, shapes.layers)
    sizes = [p.numel() for p in student.parameters()]
    trained = [p.numel() for p in student.parameters() if p.requires_grad]
    assert shapes.layers == [14, 16, 17, 30]
    assert sum(p.numel() for p in teacher.parameters()) == 8_030_261_248  # as published
    assert round(sum(sizes) / 1e9, 1) == 8.7 and round(sum(trained) / 1e9, 1) == 2.9
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}


def test_memory_is_measured_against_the_plan_of_that_run():
    """The plan and the estimate that chooses the models are of two ways to count, and agree."""
    from gpu_step import memory_need, planned_bytes, real_shapes, train_arguments

    for options in ("--batch_size 2", "--batch_size 2 --teacher_placement colocated"):
        shapes = real_shapes(32)
        args = train_arguments(part_run(options), shapes)
        assert planned_bytes(shapes, args) == pytest.approx(memory_need(shapes, args), rel=0.15)
    assert planned_bytes(real_shapes(8), args) is None


def test_floating_point_operations_of_a_token():
    from gpu_step import flops_per_token

    student = torch.nn.Sequential(torch.nn.Embedding(7, 3), torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    student[1].requires_grad_(False)
    teacher = torch.nn.Linear(3, 4)
    forward, by_inputs, by_weights = 12 + 15 + 10, 15 + 10, 10
    assert flops_per_token(student, teacher) == 2 * (forward + by_inputs + by_weights)


def test_one_rank_steps_on_a_quarter_of_the_weights():
    from gpu_step import RANKS, Share

    parameters = [torch.nn.Parameter(torch.ones(size)) for size in (80, 40, 40, 30, 30, 20, 20, 20, 20, 20)]
    optimizer = Share(parameters, lr=0.1)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    moved = [p.numel() for p in parameters if (p != 1).all()]
    assert sum(moved) == sum(p.numel() for p in parameters) / RANKS
    assert len(optimizer.state) == len(moved)


def test_a_run_trains_with_that_optimizer(monkeypatch):
    """The masters and moments of all ranks, 35 GB, would not fit beside the models."""
    import gpu_step

    seen = []

    class Watch(gpu_step.StepLog):
        def write(self, metrics):
            seen.extend(thing for thing in gc.get_objects() if type(thing) is gpu_step.Share)

    monkeypatch.setattr(gpu_step, "STEPS", 1)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    asked = part_run("--batch_size 1")
    gpu_step.train(*gpu_step.choose_shapes(asked), Watch(CPU))
    (optimizer,) = seen
    owned = sum(parameter.numel() for parameter in optimizer.state)
    total = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert 0.2 < owned / total < 0.5  # a quarter, but for the grain of two large matrices


# --- the profile ---------------------------------------------------------------------------------------------


def test_backward_belongs_to_the_part_that_ran_forward():
    """With checkpointing, forward operators run again inside backward, and may leave their module by an exception."""
    from gpu_profile import BACKWARD, REST, mark, parts_of

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.mix = torch.nn.Linear(6, 6), torch.nn.Tanh()

        def forward(self, x):
            return self.mix(self.gate(x)).exp()

    block = Block()
    mark(block, "block")
    mark(block.gate, "gate")
    x = torch.randn(4, 6, requires_grad=True)
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profiler:
        checkpoint(block, block(x), use_reentrant=False).sin().sum().backward()
        x.grad.neg()
    operators = [event for event in profiler.events() if not event.is_user_annotation]
    part_of = parts_of(operators)
    found = {}
    for event in operators:
        found.setdefault(event.name, set()).add(part_of(event))
    assert found["aten::addmm"] == {"gate"} and found[f"{BACKWARD}: AddmmBackward0"] == {"gate"}
    assert found["aten::tanh"] == {"block"} and found["TanhBackward0"] == {"block"}
    assert found["aten::exp"] == {"block"} and found["ExpBackward0"] == {"block"}
    assert found["aten::sin"] == {REST} and found["SinBackward0"] == {REST} and found["aten::neg"] == {REST}


def test_kernels_of_a_gpu_are_counted_once():
    """The events are like those of a GPU's trace: each kernel is on the device and in the list of its operator."""
    from gpu_profile import PART, breakdown

    def event(name, start, end, parent=None, kernels=(), **values):
        made = FunctionEvent(len(name), name, thread=1, start_us=start, end_us=end, **values)
        if parent:
            made.set_cpu_parent(parent)
        for kernel, duration in kernels:
            made.append_kernel(kernel, 0, duration)
        return made

    on_gpu = {"device_type": DeviceType.CUDA, "use_device": "cuda"}
    loss = event(PART + "loss", 0, 40, kernels=[(PART + "loss", 90)], is_user_annotation=True)
    matmul = event("aten::mm", 1, 5, loss, kernels=[("nvjet_hsh_128", 50)], sequence_nr=7)
    backward = event("autograd::engine::evaluate_function: MmBackward0", 50, 60, sequence_nr=7, fwd_thread=1, scope=0)
    matmul_again = event("aten::mm", 51, 55, backward, kernels=[("nvjet_hsh_128", 20)])
    optimizer = event("Optimizer.step#AdamW.step", 70, 90, is_user_annotation=True)
    multiply = event("aten::mul", 71, 75, optimizer, kernels=[("void at::native::vectorized", 10)])
    on_device = [
        event(PART + "loss", 10, 100, is_user_annotation=True, **on_gpu),  # the mark's own row of the timeline
        event("nvjet_hsh_128", 10, 60, **on_gpu),
        event("flash_fwd_gemm", 40, 80, **on_gpu),  # of a thread that is not profiled
        event("nvjet_hsh_128", 120, 140, **on_gpu),
        event("void at::native::vectorized", 140, 150, **on_gpu),
    ]
    found = breakdown([loss, matmul, backward, matmul_again, optimizer, multiply, *on_device])
    microseconds = {name: round(1e6 * seconds) for name, seconds in found.kernels.items()}
    assert microseconds == {"nvjet_hsh_128": 70, "flash_fwd_gemm": 40, "at::native::vectorized": 10}
    parts = {name: round(1e6 * seconds) for name, seconds in found.parts.items()}
    assert parts == {"loss": 70, "optimizer and the rest": 10, "teacher": 40}
    assert round(1e6 * found.products) == 70  # attention is not one of them
    assert round(1e6 * found.span) == 140 and round(1e6 * found.busy) == 100
