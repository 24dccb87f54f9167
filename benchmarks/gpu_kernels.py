"""The sections of bench_gpu.py that need no model: the card itself, and the loss."""

import functools
import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch._dynamo
import torch.nn.functional as F
from gpu_measure import PartRun, Work, compare, matmul_rate, relative_error, timed
from harness import NotInstalled, describe_machine, need
from torch import Tensor

from distillation.fused_loss import fused_distill_loss
from distillation.losses import LossInputs, LossWeights, compute_distill_loss
from distillation.objective import compiles_loss
from preflight.gpu_check.facts import driver_version

CE_WEIGHT, KL_WEIGHT, TEMPERATURE = 1.0, 0.1, 1.0  # the defaults of training


# --- the card ------------------------------------------------------------------------------------------------


def card(run: PartRun) -> None:
    """Describes the card, and measures the two rates that bound everything else: of copies and of matrix products."""
    run.emit("machine", "", machine=", ".join([describe_machine(), *describe_card(run.device)]))
    n = 2**20 if run.quick else 2**30
    source = torch.randint(-9, 9, (n,), dtype=torch.int16, device=run.device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    timed(copy, run.device, 5)
    seconds = statistics.median(timed(copy, run.device, 10) for _ in range(5))
    moved = 2 * source.nbytes  # read and written
    run.emit("copy on the device", "torch", seconds=seconds, GB_per_s=round(moved / seconds / 1e9))
    run.emit("product in bfloat16", "torch", TFLOP_per_s=round(matmul_rate(run) / 1e12, 3))


def describe_card(device: torch.device) -> list[str]:
    """Returns the card's properties, free memory, driver and CUDA version."""
    if device.type != "cuda":
        return ["no GPU"]
    properties = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return [
        f"{properties.multi_processor_count} multiprocessors",
        f"compute capability {properties.major}.{properties.minor}",
        f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        f"driver {driver_version()}",
        f"CUDA {torch.version.cuda}",
    ]


# --- the loss ------------------------------------------------------------------------------------------------


class LossTensors(NamedTuple):
    """Holds the inputs of the loss, of N tokens."""

    hidden: Tensor  # (N, D), of the student
    head: Tensor  # (V, D)
    teacher: Tensor  # (N, D)
    teacher_head: Tensor  # (V, D)
    labels: Tensor  # (N,)
    loss_mask: Tensor  # (N,)

    @classmethod
    def draw(cls, run: PartRun) -> "LossTensors":
        """Draws inputs as large as a step's, if the card has memory for the plain form; both models differ a little."""
        n, vocab, d_model = 2048, 128256, 4096
        if run.quick:
            n, vocab, d_model = 48, 300, 32
        elif torch.cuda.mem_get_info()[0] < 40e9:
            n = 512

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, device=run.device, dtype=torch.bfloat16)

        hidden, head = normal(n, d_model), normal(vocab, d_model) * (2 / d_model**0.5)  # logits of deviation 2
        teacher, teacher_head = hidden + 0.1 * normal(n, d_model), head + 0.1 * head.std() * normal(vocab, d_model)
        labels = torch.randint(0, vocab, (n,), device=run.device)
        loss_mask = torch.rand(n, device=run.device) < 0.98
        return cls(hidden.requires_grad_(), head.requires_grad_(), teacher, teacher_head, labels, loss_mask)


def loss(run: PartRun) -> None:
    """Compares forms of the loss from hidden states and heads, with the gradients by the student's."""
    inputs = LossTensors.draw(run)
    n_tokens, d_model = inputs.hidden.shape
    vocab = inputs.head.shape[0]
    case = f"V={vocab} N={n_tokens} bfloat16"
    compiles = compiles_loss(run.device)
    forms: dict[str, Callable[[LossTensors], Tensor]] = {"plain": plain_loss}
    if compiles and not run.short:
        forms["plain, compiled"] = functools.partial(plain_loss, loss_of=torch.compile(compute_distill_loss))
    forms["fused"] = functools.partial(fused_loss, compiled=compiles)
    forms["fused, eager"] = fused_loss
    chunk_sizes = (16, 32) if run.quick else (64, 128, 256, 512, 1024)
    for chunk_tokens in () if run.short else chunk_sizes:
        form = functools.partial(fused_loss, chunk_tokens=chunk_tokens, compiled=compiles)
        forms[f"fused, chunks of {chunk_tokens}"] = form
    candidates: dict[str, Callable[[], Work]] = {
        name: functools.partial(with_gradients, inputs, form) for name, form in forms.items()
    }
    candidates["liger"] = lambda: with_gradients(inputs, liger_triton(run.device))
    candidates["liger, KL alone"] = lambda: with_gradients(inputs, liger_triton(run.device, 0.0), comparable=False)
    candidates["liger, chunked"] = lambda: with_gradients(inputs, liger_chunked(run.device))

    truth = exact_loss(inputs)

    def errors(result: tuple[Tensor, ...]) -> dict[str, float]:
        total, *gradients = result
        return {
            "loss_error": (abs(total.double() - truth[0]) / truth[0]).item(),
            "gradient_error": largest_error(tuple(gradients), truth[1:]),
        }

    # A batch's chunks are of one size: compiled code that takes any size is not what training runs.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        compare(run, case, candidates, errors)
    # Both models' logits and two gradients: no form can be faster.
    run.emit(case, "four products", seconds=4 * 2 * n_tokens * vocab * d_model / matmul_rate(run))


def with_gradients(inputs: LossTensors, form: Callable[[LossTensors], Tensor], comparable: bool = True) -> Work:
    def work() -> tuple[Tensor, ...] | None:
        total = form(inputs)
        result = total.detach(), *torch.autograd.grad(total, [inputs.hidden, inputs.head])
        return result if comparable else None

    return work


def plain_loss(p: LossTensors, loss_of: Callable[..., tuple[Tensor, ...]] = compute_distill_loss) -> Tensor:
    logits, teacher_logits = F.linear(p.hidden, p.head), F.linear(p.teacher, p.teacher_head)  # (N, V)
    weights = (CE_WEIGHT, KL_WEIGHT, TEMPERATURE)
    return loss_of(logits[None], teacher_logits[None], p.labels[None], p.loss_mask[None], *weights)[0]


def fused_loss(p: LossTensors, chunk_tokens: int | None = None, compiled: bool = False) -> Tensor:
    vocab, teacher = p.head.shape[0], (p.teacher, p.teacher_head)
    inputs = LossInputs(p.hidden, p.head, None, *teacher, p.labels, p.loss_mask, vocab)
    weights = LossWeights(CE_WEIGHT, KL_WEIGHT, TEMPERATURE)
    return fused_distill_loss(inputs, weights, chunk_tokens, compiled)[0]


def liger_triton(device: torch.device, ce_weight: float = CE_WEIGHT) -> Callable[[LossTensors], Tensor]:
    """Builds Liger's fused linear JSD, which is the forward KL at beta 0, plus its fused linear cross entropy."""
    if device.type != "cuda":
        raise NotInstalled("a GPU for its Triton kernels")
    need("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    kl_of, ce_of = LigerFusedLinearJSD(jsd_beta=0.0, temperature=TEMPERATURE), LigerFusedLinearCrossEntropyLoss()

    def form(p: LossTensors) -> Tensor:
        labels = p.labels.masked_fill(~p.loss_mask, -100)
        kl = KL_WEIGHT * kl_of(p.hidden, p.head, p.teacher, p.teacher_head, labels)
        return kl + ce_weight * ce_of(p.head, p.hidden, labels) if ce_weight else kl

    return form


def liger_chunked(device: torch.device) -> Callable[[LossTensors], Tensor]:
    """Builds Liger's chunked JSD with CE, which compiles itself."""
    need("liger_kernel")
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss_of = LigerFusedLinearJSDLoss(
        CE_WEIGHT, KL_WEIGHT, 0.0, temperature=TEMPERATURE, compiled=device.type == "cuda"
    )

    def form(p: LossTensors) -> Tensor:
        labels = p.labels.masked_fill(~p.loss_mask, -100)
        return loss_of(p.hidden, p.head, p.teacher, p.teacher_head, labels)

    return form


def exact_loss(p: LossTensors) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the reference's loss in float64, computed in chunks of tokens, and its gradients rounded to float32."""
    hidden, head = (m.detach().double().requires_grad_() for m in (p.hidden, p.head))
    teacher_head = p.teacher_head.double()
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for start in range(0, hidden.shape[0], 128):
        chunk = slice(start, start + 128)
        part = LossTensors(
            hidden[chunk], head, p.teacher[chunk].double(), teacher_head, p.labels[chunk], p.loss_mask[chunk]
        )
        share = part.loss_mask.sum().double() / p.loss_mask.sum()
        part_loss = plain_loss(part) * share
        part_loss.backward()
        total += part_loss.detach()
    assert hidden.grad is not None and head.grad is not None
    return total, hidden.grad.float(), head.grad.float()


def largest_error(out: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    return max(relative_error(one, other) for one, other in zip(out, truth, strict=True))
