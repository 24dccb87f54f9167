"""MFU and memory in the rows: the student's operations against what a step on the meta device really multiplies, the
peaks of GPUs by their names, and what the gauges read.
"""

import json
import shutil

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaAttention

from arguments import parse_train_args
from inputs.option_values import PRESETS
from llamba import DiscreteMamba2
from llamba.kept_heads import KeptHeads
from monitoring.speed import (
    MEMORY_RATES,
    PEAKS,
    Gauges,
    _mixing_operations,
    memory_rate,
    peak_operations,
    student_operations_per_token,
)
from preflight.footprint import measure_footprint
from tests.tiny import tiny_student

FROZEN = ["--freeze_mlp", "--freeze_replaced_layers"]


def four_layers_of_8b(folder):
    """Shapes of the 8B models, of which all but four layers are left out: the count is by layer."""
    for role, depth in (("teacher", "num_hidden_layers"), ("student", "n_layer")):
        shutil.copytree(PRESETS / "llamba-8b" / role, folder / role)
        config = json.loads((folder / role / "config.json").read_text())
        (folder / role / "config.json").write_text(json.dumps(config | {depth: 4}))
    return [
        "--teacher_model",
        str(folder / "teacher"),
        "--student_model",
        str(folder / "student"),
        "--layers",
        "1",
        "3",
    ]


@pytest.mark.parametrize(
    "preset,more",
    [
        *(("tiny", []), ("tiny", FROZEN), ("llamba-8b", []), ("llamba-8b", FROZEN)),
        ("tiny", ["--heads", "0:1,0:2,4:0,4:2,4:3", *FROZEN]),
    ],
)
def test_operations_are_those_of_a_real_step(tmp_path, preset, more):
    """What a step multiplies beyond the student's own: the teacher's head in the loss, the scan once more in backward,
    and the scores of attention once more there, for its five products against the forward's two.
    """
    shapes = four_layers_of_8b(tmp_path) if preset == "llamba-8b" else []
    args = parse_train_args(["--preset", preset, "--batch_size", "1", "--seq_length", "1024", *shapes, *more])
    footprint = measure_footprint(args)
    mixing = {kind: 0.0 for kind in (DiscreteMamba2, LlamaAttention, KeptHeads)}
    for module in footprint.student.modules():
        if type(module) in mixing:
            mixing[type(module)] += _mixing_operations(module, args.seq_length)
    teacher_head = 2 * footprint.teacher.head / torch.finfo(footprint.student.dtype).bits * 8
    beyond = teacher_head + mixing[DiscreteMamba2] + (mixing[LlamaAttention] + mixing[KeptHeads]) / 2
    expected = sum(footprint.operations.values()) / args.seq_length - beyond
    assert student_operations_per_token(footprint.student, args.seq_length) == pytest.approx(expected, rel=0.005)


def test_gradients_that_nobody_needs_cost_nothing():
    student = tiny_student(attention_layers=[], n_layer=2)
    every = student_operations_per_token(student, 16)
    student.requires_grad_(False)
    forward = student_operations_per_token(student, 16)
    assert every == 3 * forward
    head = 2 * student.lm_head.weight.numel()
    student.backbone.layers[1].requires_grad_(True)  # the last: gradients go through the head, and no further
    assert student_operations_per_token(student, 16) == forward + head + 2 * (forward - head) / 2
    student.requires_grad_(False)
    student.backbone.embedding.requires_grad_(True)  # the first: through all that is frozen, for no weight's sake
    mixing = sum(_mixing_operations(module, 16) for module in student.modules())
    assert student_operations_per_token(student, 16) == forward + (forward - mixing) + 2 * mixing


@pytest.mark.parametrize(
    "name,tera",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H20", 148.0),
        ("NVIDIA H800", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L40", 181.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA RTX A6000", 154.8),
        ("NVIDIA RTX 6000 Ada Generation", 364.2),
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA GeForce RTX 3090 Ti", 80.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 5090", 209.5),
        ("NVIDIA A10G", None),
        ("Quadro RTX 6000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA RTX 5000", None),
    ],
)
def test_the_peak_of_a_gpu_by_its_name(name, tera):
    expected = None if tera is None else pytest.approx(tera * 1e12)
    assert peak_operations(name, torch.bfloat16) == peak_operations(name, torch.float16) == expected
    assert peak_operations(name, torch.float32) is None


@pytest.mark.parametrize(
    "name,tera",
    [("Tesla V100-SXM2-32GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla V100S-PCIE-32GB", 130), ("Tesla T4", 65)],
)
def test_old_gpus_have_no_bfloat16(name, tera):
    assert peak_operations(name, torch.float16) == tera * 1e12
    assert peak_operations(name, torch.bfloat16) is None


def test_the_mfu_is_a_share_of_all_students_gpus():
    student = tiny_student()
    figures = Gauges(student, torch.device("cpu"), 4, seq_length=16, tflops=2).read(tokens_per_s=1000.0)
    assert figures["mfu"] == pytest.approx(1000 * student_operations_per_token(student, 16) / (4 * 2e12))


def test_a_cpu_has_no_mfu_and_the_memory_of_the_process():
    figures = Gauges(tiny_student(), torch.device("cpu"), n_students=1, seq_length=16).read(1000.0)
    assert figures.keys() == {"memory_gb"}
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert figures["memory_gb"] == pytest.approx(peak * 1024 / 1e9, rel=0.02)


@pytest.mark.parametrize("dtype,has_mfu", [(torch.bfloat16, True), (torch.float32, False)])
def test_a_gpu_is_read_and_its_peak_forgotten(monkeypatch, dtype, has_mfu):
    """Played: the calls to CUDA are, the order is what counts."""
    held = [30e9, 20e9, 0.0]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: held[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: held.pop(0))
    student = tiny_student().to(dtype)
    gauges = Gauges(student, torch.device("cuda", 0), n_students=1, seq_length=16)
    first, second = gauges.read(1e6), gauges.read(1e6)
    assert (first["memory_gb"], second["memory_gb"]) == (30.0, 20.0)
    assert ("mfu" in first) == has_mfu
    if has_mfu:
        assert first["mfu"] == pytest.approx(1e6 * student_operations_per_token(student, 16) / 989.4e12)


def test_every_card_with_a_peak_has_a_memory_rate():
    assert [name for name, _ in PEAKS] == [name for name, _ in MEMORY_RATES]
    assert memory_rate("NVIDIA H100 80GB HBM3") == 3.35e12 and memory_rate("NVIDIA H100 PCIe") == 2e12
    assert memory_rate("A card of tomorrow") is None
