"""The plan and the doctor of `--stage align`. That the plan's bytes are those of real runs is in test_footprint.py."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from arguments import parse_train_args
from conversion.alignment import Alignment, freeze_all_but_mixers
from conversion.teacher_stream import TeacherStream
from distillation.objective import DistillationModel
from llamba import LlambaConfig
from monitoring.speed import _mixing_operations, alignment_operations_per_token
from preflight.alignment_footprint import shares_tensors, stream_of
from preflight.checks import alignment, loss, machine, storage, weights
from preflight.checks.basics import FAILURE, OK
from preflight.footprint import build_models, measure_footprint
from preflight.machine import Machine, gpus_needed
from preflight.plan import alternatives, asked_placement, make_plan
from preflight.plan_report import print_plan
from preflight.time_report import assumptions
from preflight.update_footprint import gradient_bytes
from tests.preflight.cases import found, planned, statuses, the_bad_one
from tests.preflight.test_footprint import folder, options

__all__ = ["folder"]  # a fixture
MACHINE = Machine(n_gpus=4, gpu_bytes=80e9, speed=790e12)
ALIGN = "--stage align --dtype float32 --batch_size 2 --seq_length 40"


def aligned(folder, text=ALIGN):
    return parse_train_args(options(folder, "made", text))


def test_what_is_held_and_what_travels(folder):
    """Layers 2 and 3 are the teacher's: mixers 0 and 1 are trained, and of the teacher only the attention in whose
    place they are is not the student's own.
    """
    args = aligned(folder)
    footprint = measure_footprint(args)
    teacher, student = build_models(args)
    mixers = sum(p.nbytes for layer in student.backbone.layers[:2] for p in layer.mixer.parameters())
    attention = sum(p.nbytes for layer in teacher.model.layers[:2] for p in layer.self_attn.parameters())
    assert footprint.weights["weights, trained"] == gradient_bytes(footprint.student) == mixers
    assert footprint.teacher.weights == attention and footprint.teacher.answer == footprint.teacher.head == 0
    plan = make_plan(args, footprint, MACHINE, asked_placement(args, MACHINE))
    assert (plan.n_students, list(plan.gpus)) == (4, ["every GPU"])
    assert list(plan.gpus["every GPU"]) == ["micro step", "update"]
    assert plan.received == {"gradients": mixers * 3 // 2, "updated weights": mixers * 3 // 4}
    operations = sum(footprint.operations.values()) + footprint.teacher.operations
    moved = sum(footprint.moved.values()) + footprint.teacher.moved
    work = MACHINE.seconds(operations, moved)
    assert plan.step.student + plan.step.teacher == pytest.approx(work)
    assert plan.seconds == pytest.approx(work + plan.step.update + plan.step.wire)


def test_activations_are_those_of_one_layer(folder, tmp_path):
    peaks, gradients = [], []
    for n_layer in (2, 4, 16):
        for role, depth in (("teacher", "num_hidden_layers"), ("student", "n_layer")):
            source = folder / "made" / role
            config = LlambaConfig.from_pretrained(source) if role == "student" else AutoConfig.from_pretrained(source)
            setattr(config, depth, n_layer)
            config.save_pretrained(tmp_path / "made" / role)
        footprint = measure_footprint(aligned(tmp_path, f"{ALIGN} --layers -1"))
        peaks.append(sum(footprint.passes["micro step"].values()))
        gradients.append(gradient_bytes(footprint.student))
    assert gradients[2] == 8 * gradients[0]
    assert peaks[0] <= peaks[1] <= peaks[2] <= peaks[0] + 64 * 16  # an error of each layer, four bytes


@pytest.mark.parametrize(("stages", "shares"), [(["align"], True), (["align", "distil"], False), (None, False)])
def test_a_student_that_was_trained_shares_nothing(folder, tmp_path, stages, shares):
    """Nor does one that was not made from a teacher: it is counted whole beside it."""
    args, student_model = aligned(folder), str(folder / "made" / "student")
    for stage in stages or []:
        checkpoint = Path(shutil.copytree(folder / "made" / "student", tmp_path / stage))
        run = {"student_model": student_model, "stage": stage}
        (checkpoint / "training_state.json").write_text(json.dumps({"arguments": run}))
        student_model = str(checkpoint)
    if stages is None:
        student_model = str(folder / "wide" / "student")
    args = dataclasses.replace(args, student_model=student_model)
    footprint = measure_footprint(args)
    teacher, _ = build_models(args)
    attention = sum(p.nbytes for layer in teacher.model.layers[:2] for p in layer.self_attn.parameters())
    everything = sum(p.nbytes for p in teacher.parameters())
    assert footprint.teacher.weights == (attention if shares else everything)
    assert ("is counted beside it" in assumptions(args, MACHINE)) != shares


@pytest.mark.parametrize(
    ("written", "dtype", "shares"),
    [("float32", "float32", True), ("float32", "bfloat16", True), ("bfloat16", "bfloat16", True)]
    + [("bfloat16", "float32", False), ("bfloat16", "float16", False)],
)
def test_a_student_that_was_rounded_may_share_nothing(folder, tmp_path, written, dtype, shares):
    """Of a teacher in more bits; its own dtype is not asked for."""
    student = Path(shutil.copytree(folder / "made" / "student", tmp_path / "student"))
    (student / "conversion.json").write_text(json.dumps({"made_with": {"dtype": written}}))
    args = dataclasses.replace(aligned(folder), student_model=str(student), dtype=dtype)
    assert shares_tensors(args) == shares


@pytest.mark.parametrize("layers", ["-1", "2 3"])
def test_mfu_counts_what_a_step_multiplies(folder, layers):
    """But for the scan, which is computed once more in backward, and for rotations."""
    shape = "--stage align --dtype float32 --batch_size 1 --seq_length 256"
    args = aligned(folder, f"{shape} --layers {layers}")
    footprint = measure_footprint(args)
    teacher, student = build_models(args)
    freeze_all_but_mixers(student)
    stream = stream_of(args, teacher, student)
    made = Alignment(DistillationModel(student, stream.head, len(stream.head), args, 1), stream)
    again = sum(_mixing_operations(module, 256) for block in made.blocks.values() for module in block.mixer.modules())
    step = sum(footprint.operations.values()) + footprint.teacher.operations
    assert alignment_operations_per_token(made, 256) == pytest.approx(step / 256 - again, rel=0.02)


def test_the_printed_plan(folder, capsys, no_torchrun, monkeypatch):
    """A machine of one GPU is enough; no other place of the teacher is offered, and no option of distillation."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert print_plan(aligned(folder, f"{ALIGN} --dry_run --gpus 1")) == 0
    text = capsys.readouterr().out
    assert re.search(r"rank 0 +cuda:0 +a teacher that shares its student's weights", text)
    assert "\nFits." in text and "teacher's weights, not shared" in text and "dedicated" not in text
    assert "The student is taken to be made from this teacher" in text
    print_plan(aligned(folder, f"{ALIGN} --dry_run --gpus 2 --gpu_gb 0.1"))
    text = capsys.readouterr().out
    assert "Does not fit." in text and "To make the alignment fit:" in text and "saves" in text
    assert not re.search("gradient_checkpointing|freeze|teacher_signal|teacher_placement|eval_interval", text)
    print_plan(aligned(folder, f"{ALIGN} --eval_interval 5 --dry_run --gpus 2 --gpu_gb 0.1"))
    text = capsys.readouterr().out
    assert re.search(r"every GPU, GB +micro step +evaluate +update\n", text) and "--eval_interval 0 " in text
    assert "not included" not in text


def test_every_gpu_has_a_student(folder):
    args = aligned(folder, f"{ALIGN} --teacher_placement dedicated --kl_weight 0")
    assert gpus_needed(args, 4) == 4 and asked_placement(args, MACHINE) == "colocated"
    changes = [change for change, _ in alternatives(dataclasses.replace(args, batch_size=4))]
    assert changes == ["--batch_size 2 --grad_accumulation_steps 2", "--dtype bfloat16"]
    changes = [change for change, _ in alternatives(dataclasses.replace(args, batch_size=1, eval_interval=5))]
    assert changes == ["--eval_interval 0", "--dtype bfloat16"]


def test_sixteen_bit_logits_of_an_evaluation_take_no_wider_head(folder):
    """A GPU multiplies 16-bit matrices into float32; only a CPU has to widen them."""
    text = "--stage align --batch_size 1 --seq_length 64 --eval_interval 5 --loss_chunk_tokens 1"
    found = [measure_footprint(aligned(folder, f"{text} --dtype {dtype}")) for dtype in ("bfloat16", "float32")]
    bfloat16, float32 = (sum(footprint.passes["evaluate"].values()) for footprint in found)
    assert bfloat16 < float32 < 4 * 256 * 8192  # bytes of a head in float32


# --- the doctor ----------------------------------------------------------------------------------------------


def test_no_gpu_is_kept_for_a_teacher(gpus):
    gpus(4)
    run = planned("--stage", "align")
    assert machine.default_nproc(run) == 4
    (finding,) = found(machine.check_ranks, "--stage", "align", nproc=4)
    assert finding.status == OK and finding.found == "students on cuda:0 to cuda:3, teacher beside each"


def test_the_loss_is_checked_where_an_evaluation_needs_it():
    for check in (loss.check_loss, loss.check_equal_models):
        assert found(check, "--stage", "align") == []
        assert statuses(found(check, "--stage", "align", "--eval_interval", "5")) == [OK]


def test_a_teacher_layer_by_layer_is_the_whole_one(monkeypatch):
    assert found(alignment.check_alignment) == []
    for dtype in ("float32", "bfloat16"):
        (finding,) = found(alignment.check_alignment, "--stage", "align", "--dtype", dtype, "--kl_weight", 0)
        assert finding.status == OK and "relative difference" in finding.found, finding
    right = TeacherStream.__call__
    monkeypatch.setattr(TeacherStream, "__call__", lambda stream, ids: 1.5 * right(stream, ids))
    bad = the_bad_one(found(alignment.check_alignment, "--stage", "align"))
    assert bad.status == FAILURE and "expected below 0.0001" in bad.found and bad.remedy


def test_a_large_teacher_is_not_loaded(monkeypatch):
    monkeypatch.setattr(weights, "SMALL_MODEL", 1000)
    monkeypatch.setattr(weights, "get_teacher_model", lambda *_: pytest.fail("was loaded"))
    (finding,) = found(alignment.check_alignment, "--stage", "align")
    assert finding.status == OK and "not tried" in finding.found


def test_host_memory_has_the_teacher_once(monkeypatch):
    """On a CPU a rank holds the attention that its student has not; a distillation's teacher is whole."""
    monkeypatch.setattr(storage, "available_memory", lambda: 10**12)
    taken = {}
    for stage in ("align", "distil"):
        (finding,) = found(storage.check_host_memory, "--stage", stage, nproc=2)
        taken[stage] = float(re.search(r"takes ([\d.]+) GB", finding.found)[1])
    assert taken["align"] < taken["distil"]
