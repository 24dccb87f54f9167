"""The training loop of the original design, the baseline of bench_step.py. The teacher on rank 0 runs the gathered
batch, its full logits are broadcast to every rank, the loss takes both models' full logits in float32, and AdamW steps
on the weights without masters. Models, data and loss are the project's; only the loop differs.
"""

from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from arguments import TrainArguments
from distillation.losses import compute_distill_loss
from text.batch import Batch


def train(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    batches: Iterable[Batch],
    args: TrainArguments,
    after_step: Callable[[Tensor, Tensor, Tensor], None],
) -> None:
    """Takes one optimizer step for each batch of this rank. Only rank 0 has a teacher. `after_step` is called with the
    loss, the KL and the cross entropy of this rank's batch.
    """
    model = DistributedDataParallel(student)
    optimizer = ZeroRedundancyOptimizer(
        student.parameters(),
        optimizer_class=torch.optim.AdamW,
        lr=args.max_lr,
        betas=(0.9, 0.95),
        weight_decay=args.weight_decay,
    )
    model.train()
    for batch in batches:
        teacher_logits = ask_teacher(teacher, batch.input_ids, student.config.vocab_size, student.dtype)  # (B, S, V)
        student_logits = model(batch.input_ids, use_cache=False).logits  # (B, S, V)
        loss, kl, ce = compute_distill_loss(
            student_logits,
            teacher_logits,
            batch.labels,
            batch.loss_mask,
            args.ce_weight,
            args.kl_weight,
            args.temperature,
        )
        loss.backward()
        nn.utils.clip_grad_norm_(student.parameters(), args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        after_step(loss.detach(), kl.detach(), ce.detach())


@torch.no_grad()
def ask_teacher(teacher: PreTrainedModel | None, input_ids: Tensor, vocab: int, dtype: torch.dtype) -> Tensor:
    """Returns this rank's part of the teacher's logits, (B, S, V), a view of the logits of all ranks."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    gathered = [torch.empty_like(input_ids) for _ in range(world_size)]  # of (B, S)
    dist.all_gather(gathered, input_ids)
    inputs = torch.cat(gathered)  # (W*B, S)
    if teacher is not None:
        logits = teacher(inputs, use_cache=False).logits  # (W*B, S, V)
    else:
        logits = torch.empty(*inputs.shape, vocab, dtype=dtype)
    dist.broadcast(logits, src=0)
    return logits.chunk(world_size)[rank]
