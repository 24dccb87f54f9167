"""The fused loss against the readable reference: losses, gradients, masks, chunk edges, and what it never makes."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.exc import TorchDynamoException
from torch.utils._python_dispatch import TorchDispatchMode

import distillation.fused_loss
from distillation.fused_loss import choose_chunk_tokens, fused_distill_loss
from distillation.losses import LossInputs, LossWeights, compute_distill_loss

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


def fused_loss(ce_weight, kl_weight, temperature, chunk_tokens=None, compiled=False, **p):
    weights = LossWeights(ce_weight, kl_weight, temperature)
    return fused_distill_loss(LossInputs(**p), weights, chunk_tokens, compiled)[:3]


def reference(p, temperature):
    """Returns the loss figures by compute_distill_loss, whose gradients are autograd's."""
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
    fused = fused_loss(
        **p, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=temperature, chunk_tokens=chunk_tokens
    )
    for one, other in zip(fused, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(p, fused[0], 3.0), gradients(p, expected[0], 3.0), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("teacher", ["hidden", "none"])
def test_the_form_that_is_compiled_equals_the_reference_and_keeps_its_inputs(monkeypatch, temperature, teacher):
    """On a GPU rows are not split, so that what it returns, and not what it was given, has to be the gradient."""
    form = distillation.fused_loss._chunk_losses_to_fuse
    given = []

    def keep(logits, teacher_logits, *rest):
        given.append((logits, logits.clone()))
        return form(logits, teacher_logits, *rest)

    monkeypatch.setattr(distillation.fused_loss, "_compiled_chunk_losses", lambda: keep)
    monkeypatch.setattr(distillation.fused_loss, "_rows_in_cache", lambda losses_of, *rest: losses_of(*rest))
    p = problem() | ({"teacher": None, "teacher_head": None} if teacher == "none" else {})
    expected = reference(p, temperature)
    settings = dict(ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=temperature, chunk_tokens=23)
    found = fused_loss(**p, **settings, compiled=True)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(p, found[0]), gradients(p, expected[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    ((logits, before),) = given
    assert torch.equal(logits, before)


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
            fused_loss(**p32, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=1.0, chunk_tokens=64)[0],
        ),
        expected,
        strict=True,
    ):
        assert (one - other).norm() <= 1e-5 * other.norm()


def as_float64(p):
    return {
        k: v.detach().double().requires_grad_(v.requires_grad) if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in p.items()
    }


@pytest.mark.parametrize("bias", [True, False])
def test_bfloat16_is_better_than_the_plain_form(bias):
    """The CE by far, since the labels' logits are not rounded; the gradients at least not worse. Summed over some
    draws: how the error of one falls is chance."""
    ce_errors, gradient_errors = [], []
    for seed in range(4):
        p = problem(n=300, vocab_s=4000, vocab_t=4000, d=64, d_t=64, dtype=torch.bfloat16, bias=bias, seed=seed)
        for head in ("student_head", "teacher_head"):
            p[head].data /= 8  # logits of size 1, as models have them
        p64 = as_float64(p)
        exact, plain = reference(p64, 1.0), reference(p, 1.0)
        fused = fused_loss(**p, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=1.0, chunk_tokens=50)
        assert fused[0].dtype == torch.float32
        errors, plain_errors = (
            [(a.double() / b - 1).abs().item() for a, b in zip(x, exact, strict=True)] for x in (fused, plain)
        )
        assert max(errors) < 3e-5 and errors[2] < 5e-6
        ce_errors.append((errors[2], plain_errors[2]))
        truth = gradients(p64, exact[0])
        for ours, theirs, true in zip(gradients(p, fused[0]), gradients(p, plain[0]), truth, strict=True):
            gradient_errors.append([((g.double() - true).norm() / true.norm()).item() for g in (ours, theirs)])
    (ce, plain_ce), (gradient, plain_gradient) = (map(sum, zip(*e, strict=True)) for e in (ce_errors, gradient_errors))
    assert ce < plain_ce / 4
    assert gradient < 1.05 * plain_gradient


# With a last chunk that is shorter, and without: another shape is compiled for once more.
@pytest.mark.parametrize(
    "dtype,temperature,n",
    [pytest.param(torch.float32, 1.0, 70, marks=pytest.mark.slow), (torch.bfloat16, 2.0, 64)],
)
def test_compiled_equals_eager(dtype, temperature, n):
    p = problem(n=n, vocab_s=500, vocab_t=500, d=32, dtype=dtype)
    settings = dict(ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=temperature, chunk_tokens=32)
    eager, compiled = (fused_loss(**p, **settings, compiled=compiled) for compiled in (False, True))
    for one, other in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-3
    for one, other in zip(gradients(p, compiled[0]), gradients(p, eager[0]), strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


def test_small_gradients_survive_in_float16():
    """The loss scale arrives in backward only: what was divided by the tokens before it would be lost by then."""
    p = problem(n=4096, dtype=torch.float16, bias=False)
    scale = 2.0**14
    loss = fused_loss(**p, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=1.0)[0]
    scaled = gradients(p, loss, scale)[0].double() / scale
    p64 = as_float64(p)
    truth = gradients(p64, reference(p64, 1.0)[0])[0]
    assert (scaled - truth).norm() <= 0.01 * truth.norm()


def test_a_frozen_head_gets_no_gradient_and_all_masked_is_zero():
    p = problem(bias=False)
    p["student_head"].requires_grad_(False)
    loss = fused_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=1.0)[0]
    loss.backward()
    assert p["student_head"].grad is None and p["student_hidden"].grad.abs().max() > 0
    masked = ~p["loss_mask"] | (p["labels"] < 0) | (p["labels"] >= p["vocab"])
    assert masked.any() and p["student_hidden"].grad[masked].abs().max() == 0

    p = problem() | {"loss_mask": torch.zeros(23, dtype=torch.bool)}
    total, kl, ce = fused_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
    total.backward()
    assert total == kl == ce == 0 and p["student_hidden"].grad.abs().max() == 0


def test_leading_shapes_and_figures_without_gradient():
    p = problem(n=24)
    flat = fused_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
    shaped = p | {name: p[name].unflatten(0, (4, 6)) for name in ("student_hidden", "teacher", "labels", "loss_mask")}
    total, kl, ce = fused_loss(**shaped, ce_weight=1.0, kl_weight=1.0, temperature=1.0)
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
            fused_loss(**p, ce_weight=1.0, kl_weight=1.0, temperature=2.0, chunk_tokens=64)[0].backward()
        return largest

    assert peak(320) == peak(640) == 64 * 300  # one chunk's logits, however many tokens


@pytest.mark.parametrize("cached_logits", [1, 40 * 3, 40 * 1000])
def test_rows_in_cache_change_nothing(monkeypatch, cached_logits):
    p = problem()
    expected = reference(p, 2.0)
    monkeypatch.setattr(distillation.fused_loss, "CACHED_LOGITS", cached_logits)
    fused = fused_loss(**p, ce_weight=WEIGHTS[0], kl_weight=WEIGHTS[1], temperature=2.0, chunk_tokens=8)
    for one, other in zip(fused, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_chunks_follow_the_vocabulary_and_what_is_free(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda:0")
    assert choose_chunk_tokens(128_256, torch.float32, cpu) == 256
    assert choose_chunk_tokens(32_000, torch.bfloat16, cpu) == 1024
    assert choose_chunk_tokens(10**10, torch.float32, cpu) == 1
    free = 0
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2 * 2**30)
    assert choose_chunk_tokens(128_256, torch.bfloat16, gpu) == 128  # of the gibibyte that torch keeps for itself
    free = 40 * 2**30
    assert choose_chunk_tokens(128_256, torch.bfloat16, gpu) == 1024


class OutOfResources(Exception):
    """Is raised by Triton where a kernel takes more shared memory than the card has; it is no RuntimeError."""


@pytest.mark.parametrize("error", [TorchDynamoException, OutOfResources])
def test_a_compiler_that_fails_is_logged_once_and_the_plain_loss_takes_over(monkeypatch, caplog, error):
    calls = 0

    def broken(function):
        def fail(*args):
            nonlocal calls
            calls += 1
            raise error("no such compiler\nand a long story")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    fresh = functools.cache(distillation.fused_loss._CompiledChunkLosses)
    monkeypatch.setattr(distillation.fused_loss, "_compiled_chunk_losses", fresh)
    p, settings = problem(), dict(ce_weight=1.0, kl_weight=1.0, temperature=1.0, chunk_tokens=5)
    plain = fused_loss(**p, **settings)
    with caplog.at_level("WARNING", logger="train"):
        for _ in range(2):
            assert torch.equal(fused_loss(**p, **settings, compiled=True)[0], plain[0])
    assert calls == 1 and caplog.messages == ["the loss cannot be compiled and runs slower: no such compiler"]


def test_memory_that_is_too_little_is_no_fault_of_the_compiler(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("tried to allocate")

    monkeypatch.setattr(torch, "compile", lambda function: full)
    monkeypatch.setattr(
        distillation.fused_loss, "_compiled_chunk_losses", functools.cache(distillation.fused_loss._CompiledChunkLosses)
    )
    with pytest.raises(torch.OutOfMemoryError):
        fused_loss(**problem(), ce_weight=1.0, kl_weight=1.0, temperature=1.0, chunk_tokens=5, compiled=True)
