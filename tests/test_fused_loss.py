"""The fused loss against the readable reference: losses, gradients, masks, chunk edges, and what it never makes."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from losses import compute_distill_loss, fused_distill_loss

WEIGHTS = (0.7, 0.3)  # of CE and KL


def problem(n=23, vocab_s=40, vocab_t=36, d=12, d_t=8, dtype=torch.float64, bias=True, seed=0):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    vocab = min(vocab_s, vocab_t)
    labels = torch.randint(0, vocab + 3, (n,), generator=g)  # some outside the shared vocabulary
    labels[1] = -100
    return {
        "student_hidden": normal(n, d).requires_grad_(),
        "student_head": normal(vocab_s, d).requires_grad_(),
        "student_bias": normal(vocab_s).requires_grad_() if bias else None,
        "teacher": normal(n, d_t),
        "teacher_head": normal(vocab, d_t),
        "labels": labels,
        "loss_mask": torch.rand(n, generator=g) < 0.8,
        "vocab": vocab,
    }


def reference(p, temperature):
    """The plain way, with autograd."""
    logits = F.linear(p["student_hidden"], p["student_head"], p["student_bias"])[None, :, : p["vocab"]]
    teacher = p["teacher"]
    if teacher is not None:
        teacher = (teacher if p["teacher_head"] is None else teacher @ p["teacher_head"].T)[None]
    return compute_distill_loss(logits, teacher, p["labels"][None], p["loss_mask"][None], *WEIGHTS, temperature)


def gradients(p, loss, scale=1.0):
    names = [name for name in ("student_hidden", "student_head", "student_bias") if p[name] is not None]
    wanted = [p[name] for name in names if p[name].requires_grad]
    return torch.autograd.grad(loss * scale, wanted)


@pytest.mark.parametrize("chunk_tokens", [1, 5, 22, 23, 24, None])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher", ["hidden", "logits", "none"])
def test_fused_equals_the_reference(chunk_tokens, temperature, teacher):
    p = problem()
    if teacher == "logits":
        p |= {"teacher": p["teacher"] @ p["teacher_head"].T, "teacher_head": None}
    elif teacher == "none":
        p |= {"teacher": None, "teacher_head": None}
    expected = reference(p, temperature)
    fused = fused_distill_loss(
        **p, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=temperature, chunk_tokens=chunk_tokens
    )
    for one, other in zip(fused, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(p, fused[0], 3.0), gradients(p, expected[0], 3.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_float32_agrees_with_float64():
    p64 = problem(n=200, vocab_s=500, vocab_t=500, d=32)
    p32 = {
        k: v.detach().float().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in p64.items()
    }
    expected = gradients(p64, reference(p64, 1.0)[0])
    for one, other in zip(
        gradients(
            p32,
            fused_distill_loss(**p32, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=1.0, chunk_tokens=64)[0],
        ),
        expected,
        strict=True,
    ):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_bfloat16_is_no_worse_than_the_plain_form():
    exact = problem(n=300, vocab_s=400, vocab_t=400, d=64, dtype=torch.bfloat16, bias=False)
    as64 = {
        k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in exact.items()
    }
    loss64 = reference(as64, 1.0)[0]
    expected = gradients(as64, loss64)
    plain_loss, fused_loss = (
        reference(exact, 1.0)[0],
        fused_distill_loss(**exact, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=1.0, chunk_tokens=50)[0],
    )
    assert fused_loss.dtype == torch.float32
    assert (fused_loss - loss64).abs() <= 1.1 * (plain_loss - loss64).abs() + 1e-6 * loss64.abs()
    fused, plain = gradients(exact, fused_loss), gradients(exact, plain_loss)
    for name, ours, theirs, truth in zip(("hidden", "head"), fused, plain, expected, strict=True):
        error, plain_error = ((g.double() - truth).norm() / truth.norm() for g in (ours, theirs))
        assert error <= 1.05 * plain_error, name


def test_small_gradients_survive_in_float16():
    """The loss scale arrives in backward only: what was divided by the tokens before it would be lost by then."""
    p = problem(n=4096, dtype=torch.float16, bias=False)
    scale = 2.0**14
    loss = fused_distill_loss(**p, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=1.0)[0]
    scaled = gradients(p, loss, scale)[0].double() / scale
    p64 = {
        k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in p.items()
    }
    truth = gradients(p64, reference(p64, 1.0)[0])[0]
    assert (scaled - truth).norm() <= 0.01 * truth.norm()


def test_a_frozen_head_gets_no_gradient_and_all_masked_is_zero():
    p = problem(bias=False)
    p["student_head"].requires_grad_(False)
    loss = fused_distill_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=1.0)[0]
    loss.backward()
    assert p["student_head"].grad is None and p["student_hidden"].grad.abs().max() > 0
    masked = ~p["loss_mask"] | (p["labels"] < 0) | (p["labels"] >= p["vocab"])
    assert masked.any() and p["student_hidden"].grad[masked].abs().max() == 0

    p = problem() | {"loss_mask": torch.zeros(23, dtype=torch.bool)}
    total, kl, ce = fused_distill_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
    total.backward()
    assert total == kl == ce == 0 and p["student_hidden"].grad.abs().max() == 0


def test_leading_shapes_and_figures_without_gradient():
    p = problem(n=24)
    flat = fused_distill_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
    shaped = p | {name: p[name].unflatten(0, (4, 6)) for name in ("student_hidden", "teacher", "labels", "loss_mask")}
    total, kl, ce = fused_distill_loss(**shaped, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
    assert torch.equal(total, flat[0]) and not kl.requires_grad and not ce.requires_grad


def test_nothing_of_size_tokens_times_vocabulary_is_made():
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if torch.is_tensor(tensor):
                    largest = max(largest, tensor.numel())
            return out

    def peak(n):
        nonlocal largest
        largest = 0
        p = problem(n=n, vocab_s=300, vocab_t=300, d=16, bias=False)
        with Watch():
            fused_distill_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=2.0, chunk_tokens=64)[0].backward()
        return largest

    assert peak(320) == peak(640) == 64 * 300  # one chunk's logits, however many tokens
