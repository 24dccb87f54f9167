"""The checks of doctor.py that compute a loss: a student equal to its teacher must have none. Weights are read only if
the teacher is small.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from arguments import TrainArguments
from distillation.fused_loss import fused_distill_loss
from distillation.losses import LossInputs, LossWeights
from distillation.objective import compiles_loss
from llamba import LlambaConfig, LlambaForCausalLM
from llamba.families import other_form
from model_utils import DTYPES, apply_replacements
from preflight.checks.basics import FAILURE, OK, CheckSkipped, Finding, PlannedRun
from preflight.checks.machine import run_device
from preflight.checks.models import configs, skeletons
from preflight.checks.weights import probe_ids, small_teacher

# Bounds on what rounding causes. Two models that compute the same in different ways differ in their last digits.
MOST_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
MOST_DIFFERENCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}  # relative, of CE and hidden states
EQUAL = "student equal to its teacher ({})"


def check_loss(run: PlannedRun) -> Iterator[Finding]:
    """Computes the loss with the same random hidden states and head as student and as teacher."""
    if not needs_loss(run.args):
        return
    device, dtype = run_device(), DTYPES[run.args.dtype]
    hidden, head = torch.randn(64, 256, device=device, dtype=dtype), torch.randn(4096, 256, device=device, dtype=dtype)
    head /= 8  # logits of deviation 2
    labels = torch.randint(4096, (64,), device=device)
    kl, ce = kl_and_ce(run.args, hidden, head, hidden, head, labels)
    plain_ce = F.cross_entropy(F.linear(hidden.float(), head.float()), labels).item()
    yield judge("loss alone", dtype, kl, abs(ce / plain_ce - 1), f"CE {ce:.4f}")


def needs_loss(args: TrainArguments) -> bool:
    """Returns whether the run computes the loss of distillation: an alignment does so in evaluations only."""
    return args.stage == "distil" or args.eval_interval > 0


def kl_and_ce(
    args: TrainArguments, hidden: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor
) -> tuple[float, float]:
    """Returns KL and CE as training computes them, from hidden states (N, D), (N, D_t), heads (V, D), (V, D_t) and
    labels (N,).
    """
    vocab, signal = len(teacher_head), teacher
    signal_head: Tensor | None = teacher_head
    if args.teacher_signal == "logits":
        signal, signal_head = F.linear(teacher, teacher_head), None
    mask, compiled = torch.ones_like(labels, dtype=torch.bool), args.compile or compiles_loss(hidden.device)
    inputs = LossInputs(hidden, head, None, signal, signal_head, labels, mask, vocab)
    weights = LossWeights(args.ce_weight, args.kl_weight, args.temperature)
    _, kl, ce, _ = fused_distill_loss(inputs, weights, args.loss_chunk_tokens, compiled)
    return kl.item(), ce.item()


def judge(name: str, dtype: torch.dtype, kl: float, difference: float, more: str) -> Finding:
    """Returns the finding on a KL that has to be 0. difference: the relative one of all else that has to be equal."""
    title = EQUAL.format(name)
    found = f"KL {kl:.2g}, {more}, relative difference {difference:.1g}"
    if abs(kl) <= MOST_KL[dtype] and difference <= MOST_DIFFERENCE[dtype]:
        return Finding(OK, title, found)
    expected = f"expected a KL below {MOST_KL[dtype]:g} and a difference below {MOST_DIFFERENCE[dtype]:g}"
    remedy = "do not train on this machine yet: try --dtype float32, another torch, or without the fast kernels"
    return Finding(FAILURE, title, f"{found}; {expected}", remedy)


def check_equal_models(run: PlannedRun) -> Iterator[Finding]:
    """Computes the loss of a student that consists of the teacher's layers, embedding, norm and head."""
    teacher_config, student_config = configs(run)
    if not needs_loss(run.args) or not run.args.has_teacher:
        return
    try:
        teacher = small_teacher(run)
    except ValueError as error:  # reported by `check_logits`
        raise CheckSkipped("the teacher cannot be loaded") from error
    if teacher is None or other_form(teacher_config) is not None:
        n_parameters = sum(p.numel() for p in skeletons(run)[0].parameters())
        found = f"not tried with {n_parameters / 1e9:.1f} billion parameters ({teacher_config.model_type})"
        yield Finding(OK, EQUAL.format("whole models"), f"{found}; the loss alone was")
        return
    dtype, ids = DTYPES[run.args.dtype], probe_ids(run, teacher.device)[0]  # (N + 1,)
    with torch.no_grad():
        of_teacher = teacher.base_model(ids[None, :-1], use_cache=False).last_hidden_state[0]  # (N, D)
        if not of_teacher.isfinite().all():  # reported by `check_logits`
            raise CheckSkipped("the teacher's logits are not finite")
        student = teacher_as_student(teacher, student_config)
        of_student = student.backbone(ids[None, :-1], use_cache=False).last_hidden_state[0]
        head, own_head = teacher.get_output_embeddings().weight, student.lm_head.weight
        kl, ce = kl_and_ce(run.args, of_student, own_head, of_teacher, head, ids[1:])
        _, ce_of_teacher = kl_and_ce(run.args, of_teacher, head, of_teacher, head, ids[1:])
    difference = ((of_student - of_teacher).float().norm() / of_teacher.float().norm()).item()
    yield judge("whole models", dtype, kl, max(difference, abs(ce / ce_of_teacher - 1)), f"CE {ce:.4f}")


def teacher_as_student(teacher: PreTrainedModel, config: LlambaConfig) -> LlambaForCausalLM:
    """Builds a student of the teacher's own modules. config: the student's, for the mixers that they replace."""
    given = teacher.config
    config = LlambaConfig(
        vocab_size=given.vocab_size,
        pad_vocab_size_multiple=1,
        d_model=given.hidden_size,
        n_layer=given.num_hidden_layers,
        norm_epsilon=given.rms_norm_eps,
        mlp_cfg=config.mlp_cfg,
        ssm_cfg=config.ssm_cfg,
    )
    student = LlambaForCausalLM._from_config(config, dtype=teacher.dtype, attn_implementation="sdpa")
    student = student.to(teacher.device).eval().requires_grad_(False)
    apply_replacements(student, teacher, list(range(config.n_layer)))
    for own, source in (
        (student.backbone.embedding, teacher.get_input_embeddings()),
        (student.backbone.final_layernorm, teacher.base_model.norm),
        (student.lm_head, teacher.get_output_embeddings()),
    ):
        own.load_state_dict(source.state_dict())
    return student
