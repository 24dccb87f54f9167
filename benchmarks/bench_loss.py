"""The loss from hidden states and heads, forward and backward, side by side: time, memory and accuracy.

    python benchmarks/bench_loss.py --json loss.json

All candidates compute 0.5 * CE + 0.5 * KL(teacher || student) at temperature 1, means over the unmasked tokens, and
the gradients by the student's hidden states and head. 0.5 and 0.5 are the other libraries' defaults.

plain               full logits, distillation.losses.compute_distill_loss, autograd; "compiled": under torch.compile.
fused               distillation.losses.fused_distill_loss as training calls it, on CUDA compiled; "compiled": with
                    --compile.
liger               liger-kernel's LigerFusedLinearJSDLoss, beta 0 (forward KL), at its default chunk of 1024 tokens and
                    at 128; it compiles its chunks by itself.
liger triton        liger-kernel's Triton forms, LigerFusedLinearJSD and LigerFusedLinearCrossEntropyLoss; CUDA only.
torchtune           its chunked forward KL and chunked CE on the logits of 8 chunks, its default; "compiled": as its
                    recipes do. It leaves out the teacher's entropy, which has no gradient; the comparison with the
                    reference takes that into account.
trl                 TRL's chunked divergence, beta 0, and its chunked log-probabilities for the CE.
trl gkd             full logits, GKDTrainer.generalized_jsd_loss, beta 0, and PyTorch's CE.

peak_bytes is the peak above inputs, heads and the two gradients in the inputs' dtype, which every form needs.
loss_error, hidden_grad_error, head_grad_error: distance from the float64 reference, relative to its norm. The reference
is computed from the same inputs (in bfloat16 these are already rounded).
"""

import importlib.util
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from harness import Row, measure, need, need_compiler, parse_options, report, run_child, run_rounds
from torch import Tensor

D_MODEL = 256  # of student and teacher
CE_WEIGHT = KL_WEIGHT = 0.5
BASELINE = "plain"
# bfloat16 shows its accuracy. CPUs without units for it are so slow that one round of a small case has to suffice.
CASES = ["V=128256 N=1024 float32", "V=128256 N=2048 float32", "V=32000 N=1024 float32", "V=8000 N=256 bfloat16"]
CUDA_CASES = ["V=128256 N=8192 bfloat16"]
QUICK_CASES = ["V=2000 N=100 float32"]
REFERENCE_CHUNK = 64  # tokens
IGNORED = -100  # the label of a masked token in the other libraries


@dataclass
class Inputs:
    """Holds the inputs of the loss, of N tokens. Masked ones have the label IGNORED."""

    student_hidden: Tensor  # (N, D)
    student_head: Tensor  # (V, D)
    teacher_hidden: Tensor  # (N, D)
    teacher_head: Tensor  # (V, D)
    labels: Tensor  # (N,)

    def leaves(self) -> tuple[Tensor, Tensor]:
        return self.student_hidden, self.student_head

    def student_logits(self) -> Tensor:
        return F.linear(self.student_hidden, self.student_head)  # (N, V)

    @torch.no_grad()
    def teacher_logits(self) -> Tensor:
        return F.linear(self.teacher_hidden, self.teacher_head)  # (N, V)

    def loss_mask(self) -> Tensor:
        return self.labels != IGNORED


Loss = Callable[[], Tensor]


def compiled_form(function: Callable) -> Callable:
    """Compiles a loss. Raises NotInstalled without a compiler."""
    need_compiler(device_type())
    return torch.compile(function)


def device_type() -> str:
    """Returns "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_inputs(case: str) -> Inputs:
    """Draws inputs of a teacher near the student; the logits' deviation is 2, and one token in 64 is masked."""
    match = re.fullmatch(r"V=(\d+) N=(\d+) (\w+)", case)
    if match is None:
        raise ValueError(f"{case!r} is not the name of a case; an example is {CASES[0]!r}")
    vocab, n_tokens, dtype = int(match[1]), int(match[2]), vars(torch)[match[3]]
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    student_hidden, student_head = normal(n_tokens, D_MODEL), normal(vocab, D_MODEL) * 2 / D_MODEL**0.5
    teacher_hidden = student_hidden + 0.3 * normal(n_tokens, D_MODEL)
    teacher_head = student_head + 0.3 * normal(vocab, D_MODEL) * 2 / D_MODEL**0.5
    labels = torch.randint(vocab, (n_tokens,), generator=generator)
    labels[::64] = IGNORED
    device = device_type()
    student_hidden, student_head = (t.to(device, dtype).requires_grad_() for t in (student_hidden, student_head))
    teacher_hidden, teacher_head = teacher_hidden.to(device, dtype), teacher_head.to(device, dtype)
    return Inputs(student_hidden, student_head, teacher_hidden, teacher_head, labels.to(device))


def plain(inputs: Inputs, compiled: bool = False) -> Loss:
    from distillation.losses import compute_distill_loss

    loss_function = compiled_form(compute_distill_loss) if compiled else compute_distill_loss
    labels, loss_mask = inputs.labels[None], inputs.loss_mask()[None]  # (1, N)

    def loss() -> Tensor:
        student, teacher = inputs.student_logits()[None], inputs.teacher_logits()[None]  # (1, N, V)
        return loss_function(student, teacher, labels, loss_mask, CE_WEIGHT, KL_WEIGHT, 1.0)[0]

    return loss


def fused(inputs: Inputs, compiled: bool | None = None) -> Loss:
    from distillation.fused_loss import fused_distill_loss
    from distillation.losses import LossInputs, LossWeights
    from distillation.objective import compiles_loss

    if compiled is None:
        compiled = compiles_loss(inputs.student_head.device)
    elif compiled:
        need_compiler(device_type())
    loss_mask, vocab = inputs.loss_mask(), len(inputs.student_head)
    student, teacher = (inputs.student_hidden, inputs.student_head, None), (inputs.teacher_hidden, inputs.teacher_head)
    loss_inputs = LossInputs(*student, *teacher, inputs.labels, loss_mask, vocab)
    weights = LossWeights(CE_WEIGHT, KL_WEIGHT, temperature=1.0)
    return lambda: fused_distill_loss(loss_inputs, weights, compiled=compiled)[0]


def liger(inputs: Inputs, chunk_size: int = 1024) -> Loss:
    need("liger_kernel")
    need_compiler(device_type())
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(CE_WEIGHT, KL_WEIGHT, beta=0.0, ignore_index=IGNORED, chunk_size=chunk_size)
    return lambda: module(
        inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head, inputs.labels
    )


def liger_triton(inputs: Inputs) -> Loss:
    need("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss, LigerFusedLinearJSD

    divergence, cross_entropy = LigerFusedLinearJSD(jsd_beta=0.0), LigerFusedLinearCrossEntropyLoss()

    def loss() -> Tensor:
        student, teacher = (inputs.student_hidden, inputs.student_head), (inputs.teacher_hidden, inputs.teacher_head)
        ce = cross_entropy(inputs.student_head, inputs.student_hidden, inputs.labels)
        return CE_WEIGHT * ce + KL_WEIGHT * divergence(*student, *teacher, inputs.labels)

    return loss


def torchtune_losses() -> ModuleType:
    """Imports torchtune.modules.loss from its file. It needs torch alone, while `import torchtune` needs torchao and a
    dozen packages more.
    """
    need("torchtune")
    file = distribution("torchtune").locate_file("torchtune/modules/loss/__init__.py")
    spec = importlib.util.spec_from_file_location("torchtune_losses", str(file))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def torchtune(inputs: Inputs, compiled: bool = False) -> Loss:
    losses = torchtune_losses()
    divergence, cross_entropy = losses.ForwardKLWithChunkedOutputLoss(), losses.CEWithChunkedOutputLoss()
    if compiled:
        divergence.fkl_loss = compiled_form(divergence.fkl_loss)
        cross_entropy.compute_cross_entropy = compiled_form(cross_entropy.compute_cross_entropy)
    labels, n_chunks = inputs.labels[None], divergence.num_output_chunks  # (1, N)

    def chunked_logits(hidden: Tensor, head: Tensor) -> list[Tensor]:
        return [F.linear(chunk, head) for chunk in hidden[None].chunk(n_chunks, dim=1)]  # n_chunks of (1, n, V)

    def loss() -> Tensor:
        student = chunked_logits(inputs.student_hidden, inputs.student_head)
        teacher = chunked_logits(inputs.teacher_hidden, inputs.teacher_head)
        return CE_WEIGHT * cross_entropy(student, labels) + KL_WEIGHT * divergence(student, teacher, labels)

    return loss


def trl(inputs: Inputs) -> Loss:
    need("trl")
    from trl.trainer.distillation_trainer import _chunked_divergence_loss
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE, _ChunkedLogProbFunction

    loss_mask, labels = inputs.loss_mask(), inputs.labels.clamp(min=0)
    n_tokens = loss_mask.sum()

    def loss() -> Tensor:
        student, head = inputs.student_hidden, inputs.student_head
        kl, *_ = _chunked_divergence_loss(
            student[None], inputs.teacher_hidden[None], head, inputs.teacher_head, loss_mask[None], beta=0.0
        )
        log_p, *_ = _ChunkedLogProbFunction.apply(
            student, head, None, labels, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",)
        )
        return CE_WEIGHT * -log_p.masked_fill(~loss_mask, 0).sum() / n_tokens + KL_WEIGHT * kl

    return loss


def trl_gkd(inputs: Inputs) -> Loss:
    need("trl")
    from trl.experimental.gkd import GKDTrainer

    def loss() -> Tensor:
        student, teacher = inputs.student_logits(), inputs.teacher_logits()  # (N, V)
        kl = GKDTrainer.generalized_jsd_loss(student[None], teacher[None], inputs.labels[None], beta=0.0)
        return CE_WEIGHT * F.cross_entropy(student.float(), inputs.labels, ignore_index=IGNORED) + KL_WEIGHT * kl

    return loss


CANDIDATES: dict[str, Callable[[Inputs], Loss]] = {
    "plain": plain,
    "plain compiled": lambda inputs: plain(inputs, compiled=True),
    "fused": fused,
    "fused compiled": lambda inputs: fused(inputs, compiled=True),
    "liger": liger,
    "liger chunk 128": lambda inputs: liger(inputs, chunk_size=128),
    "liger triton": liger_triton,
    "torchtune": torchtune,
    "torchtune compiled": lambda inputs: torchtune(inputs, compiled=True),
    "trl": trl,
    "trl gkd": trl_gkd,
}


def reference(case: str, folder: str) -> Row:
    """Saves loss, gradients and the teacher's entropy in float64, by the plain form on a few tokens at a time."""
    from distillation.losses import compute_distill_loss

    inputs = make_inputs(case)
    tensors = (inputs.student_hidden, inputs.student_head, inputs.teacher_hidden, inputs.teacher_head)
    hidden, head, teacher_hidden, teacher_head = (t.detach().double() for t in tensors)
    leaves = [hidden.requires_grad_(), head.requires_grad_()]
    n_tokens = inputs.loss_mask().sum()
    loss = entropy = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(inputs.labels), REFERENCE_CHUNK):
        chunk = slice(start, start + REFERENCE_CHUNK)
        loss_mask = inputs.loss_mask()[chunk]
        teacher_logits = teacher_hidden[chunk] @ teacher_head.T  # (n, V)
        total, *_ = compute_distill_loss(
            (hidden[chunk] @ head.T)[None],
            teacher_logits[None],
            inputs.labels[None, chunk],
            loss_mask[None],
            CE_WEIGHT,
            KL_WEIGHT,
            1.0,
        )
        share = total * loss_mask.sum() / n_tokens
        share.backward()
        loss = loss + share.detach().cpu()
        log_q = F.log_softmax(teacher_logits, dim=-1)  # (n, V)
        entropy = entropy - ((log_q.exp() * log_q).sum(-1) * loss_mask).sum().cpu() / n_tokens.cpu()
    torch.save((loss, entropy, [leaf.grad for leaf in leaves]), reference_file(case, folder))
    return {}


def reference_file(case: str, folder: str) -> Path:
    return Path(folder) / f"{case}.pt"


def errors(candidate: str, value: Tensor, inputs: Inputs, file: Path) -> Row:
    """Returns how far a loss, and the gradients that it left on the inputs, are from the reference."""
    expected, entropy, gradients = torch.load(file, map_location=value.device)
    offset = KL_WEIGHT * entropy if candidate.startswith("torchtune") else 0.0
    row = {"loss_error": ((value - offset - expected) / expected).abs().item()}
    for name, leaf, gradient in zip(("hidden", "head"), inputs.leaves(), gradients, strict=True):
        assert leaf.grad is not None
        row[f"{name}_grad_error"] = ((leaf.grad - gradient).norm() / gradient.norm()).item()
    return row


def run(case: str, candidate: str, folder: str) -> Row:
    """Returns one candidate's time, peak and errors. The gradients of the run before are held when a run begins, so
    that the peak, which counts from there, does not include them.
    """
    inputs = make_inputs(case)
    loss = CANDIDATES[candidate](inputs)
    value = torch.zeros(())

    def work() -> None:
        nonlocal value
        for leaf in inputs.leaves():
            leaf.grad = None
        total = loss()
        total.backward()
        value = total.detach()  # the graph holds what a candidate has saved, and must not outlive its run

    return {**measure(work), **errors(candidate, value, inputs, reference_file(case, folder))}


def main() -> None:
    on_cuda = torch.cuda.is_available()
    cases = CASES + CUDA_CASES if on_cuda else CASES
    candidates = [name for name in CANDIDATES if name != "liger triton" or on_cuda]
    options = parse_options(__doc__, cases, candidates, [BASELINE], QUICK_CASES, ["plain", "fused"])
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for case in options.cases:
            run_child(__file__, "reference", case, folder)
            rounds = options.rounds if on_cuda or not case.endswith("bfloat16") else 1
            rows += run_rounds(__file__, {case: options.candidates}, rounds, BASELINE, folder)
    report(rows, options.json)


if __name__ == "__main__":
    main()
