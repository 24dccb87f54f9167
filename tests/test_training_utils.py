"""The student with its loss against the reference, DDP's buckets, and the means of a meter on one rank and on two."""

import math

import pytest
import torch

from distillation.losses import compute_distill_loss
from distillation.objective import Distillation, DistillationModel, settle_buckets, wrap_ddp
from processes.ranks import process_groups
from tests.parsing import train_options
from tests.tiny import tiny_student, tiny_teacher, tokens, weights
from tests.two_ranks import on_two_ranks
from text.batch import Batch
from training_utils import Meter, to_device

CPU = torch.device("cpu")


# --- the student with its loss -------------------------------------------------------------------------------


@torch.no_grad()
def test_both_signals_give_the_reference_loss():
    """The student has 48 entries after padding, the teacher 40: labels from there on are ignored and counted."""
    student, teacher = tiny_student(vocab_size=48), tiny_teacher(vocab_size=40)
    batch = Batch.from_windows(tokens(2, 9) % 40)
    batch.labels[0, 3] = 45
    batch.loss_mask[1, :2] = False
    args = train_options("--ce_weight 0.5 --kl_weight 0.2 --temperature 2")
    hidden = teacher.model(batch.input_ids).last_hidden_state
    logits = teacher(batch.input_ids).logits
    reference = compute_distill_loss(
        student(batch.input_ids).logits, logits, batch.labels, batch.loss_mask, 0.5, 0.2, 2.0
    )
    for head, signal in ((teacher.lm_head.weight, hidden), (None, logits)):
        total, figures = DistillationModel(student, head, 40, args)(batch, signal)
        torch.testing.assert_close(total, reference[0])
        torch.testing.assert_close(figures, torch.stack([*reference, torch.tensor(1.0)]))


def test_the_teachers_head_is_neither_trained_nor_saved():
    student, teacher = tiny_student(), tiny_teacher()
    model = DistillationModel(student, teacher.lm_head.weight.detach(), 50, train_options())
    assert len(list(model.parameters())) == len(list(student.parameters()))
    assert not any("teacher" in name for name in model.state_dict())


def ddp_student(args, seed):
    student = tiny_student()
    model = wrap_ddp(DistillationModel(student.train(), tiny_teacher().lm_head.weight.detach()[:50], 50, args), CPU)
    batch = to_device(Batch.from_windows(tokens(2, 10, seed)), CPU)
    return model, batch, torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("line", ["", "--kl_weight 0", "--teacher_signal logits"])
def test_settling_the_buckets_changes_nothing_else(no_torchrun, line):
    """Weights, random state and the next step stay bit for bit; DDP has rebuilt its buckets."""
    args = train_options(f"--dtype float32 --batch_size 2 --seq_length 9 {line}")
    with process_groups(CPU):
        found = []
        for settles in (False, True):
            model, batch, signal = ddp_student(args, seed=3)
            if args.teacher_signal == "logits":
                model.module.teacher_head, signal = None, torch.cat([signal, signal[..., :18]], dim=-1)
            before, random = weights(model), torch.get_rng_state()
            if settles:
                settle_buckets(model, (2, 9))
                assert torch.equal(torch.get_rng_state(), random)
                assert all(torch.equal(before[name], value) for name, value in weights(model).items())
                assert all(not p.grad.any() for p in model.parameters())  # zeros: none is without
            loss, figures = model(batch, signal if args.kl_weight else None)
            loss.backward()
            found.append((figures, {name: p.grad.clone() for name, p in model.named_parameters()}))
            assert model.reducer._rebuild_buckets() is not settles  # which would come now, before the second step
            del model, loss
        (figures, gradients), (settled_figures, settled_gradients) = found
        assert torch.equal(figures, settled_figures)
        assert all(torch.equal(value, settled_gradients[name]) for name, value in gradients.items())


# --- the meter -----------------------------------------------------------------------------------------------


def test_means_of_a_meter(no_torchrun):
    with process_groups(CPU):
        meter = Meter(Distillation.named)
        meter.add(torch.tensor([1.0, 2.0, 3.0, 4.0]), (7, 9))
        meter.add(torch.tensor([3.0, 4.0, 5.0, 6.0]), (2, 0))
        expected = {"loss": 2.0, "kl": 3.0, "ce": 4.0, "ignored_labels": 10.0, "teacher_wait_s": 0.75}
        assert meter.means(teacher_wait_s=0.75) == expected
        assert meter.means(teacher_wait_s=0.75) == expected  # to ask changes nothing
        assert meter.windows() == [7, 9, 2, 0]
        meter.clear()
        assert meter.windows() == []
        meter.add(torch.tensor([1.0, 1.0, 1.0, 0.0]), (5,))
        assert meter.means() == {"loss": 1.0, "kl": 1.0, "ce": 1.0, "ignored_labels": 0.0}
        assert meter.windows() == [5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_meter_knows_which_windows_made_a_loss_that_is_not_finite(no_torchrun, bad):
    with process_groups(CPU):
        meter = Meter(Distillation.named)
        for loss, windows in ((1.0, (0, 1)), (bad, (2, 3)), (2.0, (4, 5)), (bad, range(6, 8))):
            meter.add(torch.tensor([loss, 1.0, 1.0, 0.0]), windows)
        assert meter.windows(only_bad=True) == [2, 3, 6, 7]
        assert meter.windows() == list(range(8))
        means = meter.means()
    assert not math.isfinite(means["loss"]) and means["kl"] == means["ce"] == 1.0


def work(ranks):
    meter = Meter(Distillation.named)
    for micro_step in range(3):
        figures = torch.tensor([1.0, 2.0, 3.0, 4.0]) * (ranks.rank + 1) + micro_step
        meter.add(figures, (2 * micro_step + ranks.rank,))
    return {"mean": meter.means(teacher_wait_s=ranks.rank), "windows": meter.windows()}


def test_a_meter_averages_over_ranks(tmp_path):
    """Rank 0 saw 1, 2, 3 as losses in its three micro steps, rank 1 saw 2, 3, 4; and so on."""
    expected = {"loss": 2.5, "kl": 4.0, "ce": 5.5, "ignored_labels": 21.0, "teacher_wait_s": 0.5}
    two_ranks = on_two_ranks(work, tmp_path)
    for found in two_ranks:
        assert found["mean"] == pytest.approx(expected)
    assert [found["windows"] for found in two_ranks] == [[0, 2, 4], [1, 3, 5]]  # each its own
