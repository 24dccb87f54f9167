"""The distillation loss against golden figures, PyTorch's own losses and finite differences: values, gradients,
masks, vocabularies of different width, and precision.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from distillation.losses import compute_distill_loss, mask_unknown_labels, shared_vocab

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
needs_golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason=f"golden vectors are not at {GOLDEN}")
B, S, V = 2, 5, 11


def inputs(student_vocab=V, teacher_vocab=V, dtype=torch.float32, seed=0):
    """Returns student and teacher logits, labels that all know, and a mask with holes."""
    g = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(B, S, student_vocab, generator=g)).to(dtype).requires_grad_()
    teacher = (3 * torch.randn(B, S, teacher_vocab, generator=g)).to(dtype)
    labels = torch.randint(0, min(student_vocab, teacher_vocab), (B, S), generator=g)
    loss_mask = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]], dtype=torch.bool)
    return student, teacher, labels, loss_mask


def by_torch(student, teacher, labels, loss_mask, temperature):
    """Returns (kl, ce) the other way: picks the unmasked tokens first, then PyTorch's means over them."""
    student, teacher, labels = student[loss_mask], teacher[loss_mask], labels[loss_mask]  # (N, V), (N, V), (N)
    ce = F.cross_entropy(student, labels)
    p = F.softmax(teacher / temperature, dim=-1)
    kl = F.kl_div(F.log_softmax(student / temperature, dim=-1), p, reduction="batchmean")
    return kl * temperature**2, ce


# --- values and gradients ------------------------------------------------------------------------------------


@needs_golden
@pytest.mark.parametrize("name", ["untied", "tied_grouped"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_golden_losses_and_gradients(name, temperature):
    case = json.loads((GOLDEN / name / "case.json").read_text())
    io = load_file(GOLDEN / name / "io.safetensors")
    student = io["hybrid_logits"][..., : case["min_vocab"]].clone().requires_grad_()
    weights = case["ce_weight"], case["kl_weight"]
    golden = student, io["teacher_logits"], io["labels"], io["loss_mask"]
    figures = compute_distill_loss(*golden, *weights, temperature)
    figures[0].backward()
    for figure, key in zip(figures, ("total", "kl", "ce"), strict=True):
        torch.testing.assert_close(figure.detach(), io[f"{key}_T{temperature}"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(student.grad, io[f"dlogits_T{temperature}"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_equals_pytorchs_own_losses(temperature):
    student, teacher, labels, loss_mask = inputs()
    total, kl, ce = compute_distill_loss(student, teacher, labels, loss_mask, 0.7, 0.2, temperature)
    expected_kl, expected_ce = by_torch(student, teacher, labels, loss_mask, temperature)
    torch.testing.assert_close((kl, ce), (expected_kl, expected_ce), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(total, 0.7 * expected_ce + 0.2 * expected_kl, rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(total, student)
    (expected,) = torch.autograd.grad(0.7 * expected_ce + 0.2 * expected_kl, student)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_numbers_worked_out_by_hand():
    """One token, two entries: student half and half, teacher 3 to 1, label the teacher's favourite."""
    student = torch.zeros(1, 1, 2)
    teacher = torch.tensor([3.0, 1.0]).log().view(1, 1, 2)
    figures = compute_distill_loss(student, teacher, torch.tensor([[0]]), torch.tensor([[True]]), 1.0, 0.5, 1.0)
    kl = 0.75 * torch.tensor(1.5).log() + 0.25 * torch.tensor(0.5).log()
    ce = torch.tensor(2.0).log()
    torch.testing.assert_close(figures, (ce + 0.5 * kl, kl, ce))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradients_against_finite_differences(temperature):
    student, teacher, labels, loss_mask = inputs(dtype=torch.float64)
    labels[1, 3] = V  # unknown

    def total(logits):
        return compute_distill_loss(logits, teacher, labels, loss_mask, 1.0, 0.3, temperature)[0]

    assert total(student).dtype == torch.float64
    assert torch.autograd.gradcheck(total, (student,))


def test_equal_models_have_no_divergence():
    student, _, labels, loss_mask = inputs()
    total, kl, _ = compute_distill_loss(student, student.detach(), labels, loss_mask, 0.0, 1.0, 1.0)
    total.backward()
    assert kl.item() == pytest.approx(0.0, abs=1e-6)
    torch.testing.assert_close(student.grad, torch.zeros_like(student.grad))


def test_temperature_comes_with_its_square():
    """At temperature T the KL of T times the logits is the KL of the logits, times T^2; the CE knows no T."""
    student, teacher, labels, loss_mask = inputs()
    _, kl, ce = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 1.0, 1.0)
    _, warm_kl, _ = compute_distill_loss(4 * student, 4 * teacher, labels, loss_mask, 1.0, 1.0, 4.0)
    torch.testing.assert_close(warm_kl, 16 * kl, rtol=1e-5, atol=1e-6)
    assert torch.equal(compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 1.0, 4.0)[2], ce)


def test_the_divergence_runs_from_the_teacher():
    student, teacher, labels, loss_mask = inputs()
    forward = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 1.0, 1.0)[1]
    backward = compute_distill_loss(teacher, student, labels, loss_mask, 1.0, 1.0, 1.0)[1]
    assert (forward - backward).abs() > 0.01
    torch.testing.assert_close(forward, by_torch(student, teacher, labels, loss_mask, 1.0)[0])


def test_without_a_teacher():
    student, _, labels, loss_mask = inputs()
    total, kl, ce = compute_distill_loss(student, None, labels, loss_mask, 0.5, 0.1, 2.0)
    assert kl.item() == 0.0
    torch.testing.assert_close(ce, F.cross_entropy(student[loss_mask], labels[loss_mask]))
    torch.testing.assert_close(total, 0.5 * ce)


# --- masks and vocabularies ----------------------------------------------------------------------------------


def test_masked_tokens_do_not_count():
    student, teacher, labels, loss_mask = inputs()
    total = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 0.1, 1.0)[0]
    total.backward()
    assert (student.grad[~loss_mask] == 0).all()
    assert (student.grad[loss_mask] != 0).all()
    other = labels.masked_fill(~loss_mask, 0)
    with torch.no_grad():
        changed = student + 5 * (~loss_mask)[..., None] * torch.randn_like(student)
    assert torch.equal(compute_distill_loss(changed, teacher, other, loss_mask, 1.0, 0.1, 1.0)[0], total)


def test_masks_of_integers_are_masks():
    student, teacher, labels, loss_mask = inputs()
    expected = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 0.1, 1.0)
    for dtype in (torch.uint8, torch.int64):
        figures = compute_distill_loss(student, teacher, labels, loss_mask.to(dtype), 1.0, 0.1, 1.0)
        assert [a.item() for a in figures] == [b.item() for b in expected]


def test_nothing_to_learn_is_zero():
    student, teacher, labels, loss_mask = inputs()
    figures = compute_distill_loss(student, teacher, labels, torch.zeros_like(loss_mask), 1.0, 0.1, 1.0)
    figures[0].backward()
    assert [figure.item() for figure in figures] == [0.0, 0.0, 0.0]
    assert (student.grad == 0).all()


@pytest.mark.parametrize("student_vocab,teacher_vocab", [(V + 4, V), (V, V + 4)])
def test_softmax_runs_over_the_entries_that_both_have(student_vocab, teacher_vocab):
    student, teacher, labels, loss_mask = inputs(student_vocab, teacher_vocab)
    figures = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 0.1, 1.0)
    kl, ce = by_torch(student[..., :V], teacher[..., :V], labels, loss_mask, 1.0)
    torch.testing.assert_close(figures, (ce + 0.1 * kl, kl, ce), rtol=1e-5, atol=1e-6)
    figures[0].backward()
    assert (student.grad[..., V:] == 0).all()
    assert shared_vocab(student_vocab, teacher_vocab) == V


@pytest.mark.parametrize("label", [V, V + 3, -1, -100])
def test_unknown_labels_are_left_out_and_counted(label):
    student, teacher, labels, loss_mask = inputs(student_vocab=V + 4)
    labels[0, 1] = label  # unmasked
    labels[0, 2] = label  # masked already: not counted
    mask, n_ignored = mask_unknown_labels(labels, loss_mask, V)
    expected = loss_mask.clone()
    expected[0, 1] = False
    assert torch.equal(mask, expected)
    assert n_ignored.item() == 1
    figures = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 0.1, 1.0)
    kl, ce = by_torch(student[..., :V], teacher, labels, expected, 1.0)
    torch.testing.assert_close(figures, (ce + 0.1 * kl, kl, ce), rtol=1e-5, atol=1e-6)


def test_the_last_entry_is_known():
    labels = torch.tensor([[0, V - 1, V]])
    mask, n_ignored = mask_unknown_labels(labels, torch.ones_like(labels, dtype=torch.bool), V)
    assert mask.tolist() == [[True, True, False]]
    assert n_ignored.item() == 1


# --- precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_computed_in_float32(dtype):
    student, teacher, labels, loss_mask = inputs(dtype=dtype)
    figures = compute_distill_loss(student, teacher, labels, loss_mask, 1.0, 0.1, 2.0)
    upcast = student.detach().float().requires_grad_()
    expected = compute_distill_loss(upcast, teacher.float(), labels, loss_mask, 1.0, 0.1, 2.0)
    for figure, value in zip(figures, expected, strict=True):
        assert figure.dtype == torch.float32
        assert torch.equal(figure, value)
    figures[0].backward()
    expected[0].backward()
    assert torch.equal(student.grad, upcast.grad.to(dtype))


def test_large_logits_stay_finite():
    student, teacher, labels, loss_mask = inputs()
    total = compute_distill_loss(student * 1e4, teacher * 1e4, labels, loss_mask, 1.0, 0.1, 1.0)[0]
    total.backward()
    assert total.isfinite() and student.grad.isfinite().all()
