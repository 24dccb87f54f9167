"""What a training step is made of: process groups and devices, the optimizer and its schedule, the student with its
loss as one module for DDP, and the update that follows the backward passes.
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import LRScheduler
from transformers import get_wsd_schedule

from arguments import TrainArguments
from data import Batch
from lifeline import Lifeline
from llamba import LlambaForCausalLM
from losses import choose_chunk_tokens, fused_distill_loss, mask_unknown_labels
from losses import compute_distill_loss as compute_distill_loss  # users of the original layout look for it here
from utils import can_compile, checked_device

logger = logging.getLogger("train")

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

# Reading an 8B model from a slow disk on one rank must not time out the others.
TIMEOUT = timedelta(hours=2)


# --- ranks and devices ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ranks:
    """Where this process stands, and the device of its student. `node` is a CPU group of the ranks of one box, whose
    teacher is run by its local rank 0; `control` is a CPU group of all ranks for small agreements.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    node: dist.ProcessGroup
    control: dist.ProcessGroup

    def maximum(self, *values: int) -> list[int]:
        """The highest of each over all ranks; what they agree by. Called by all of them at the same place."""
        highest = torch.tensor(values)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self.control)
        return highest.tolist()

    def total(self, values: Tensor) -> Tensor:
        """The sum over all ranks of a tensor on the CPU."""
        values = values.clone()
        dist.all_reduce(values, group=self.control)
        return values

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def owns_teacher(self) -> bool:
        return self.local_rank == 0

    @property
    def teacher_rank(self) -> int:
        """Global rank of the process that runs this node's teacher."""
        return self.rank - self.local_rank


def is_main_rank() -> bool:
    """Whether this is the rank that speaks for all; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


def launched_world_size() -> int:
    """Ranks of the run; known before they have met."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def choose_devices(
    teacher_device: str | None, teacher_placement: str, runs_teacher: bool
) -> tuple[torch.device, torch.device]:
    """This rank's student device and the device of its teacher: students take the first GPUs in order of local
    rank; a dedicated teacher takes the node's last visible GPU, a colocated one that of the rank's student. Without a
    GPU all are on the CPU. Raises ValueError if GPUs are short.
    """
    n_gpus, n_students = torch.cuda.device_count(), local_world_size()
    named = None if teacher_device is None else checked_device("--teacher_device", teacher_device)
    if n_gpus == 0:
        return torch.device("cpu"), named or torch.device("cpu")
    colocated = teacher_placement == "colocated"
    needed = n_students + (1 if runs_teacher and named is None and not colocated else 0)
    if n_gpus < needed:
        raise ValueError(
            f"--nproc_per_node {n_students}: needs {needed} visible GPUs ({n_students} for students"
            + (", the last for the teacher" if needed > n_students else "")
            + f"), and {n_gpus} are visible; start fewer processes, make more GPUs visible, "
            "or share students' GPUs with --teacher_device cuda:0 or --teacher_placement colocated"
        )
    student = torch.device("cuda", local_rank())
    return student, student if colocated else named or torch.device("cuda", n_gpus - 1)


def default_prefetch(teacher_device: torch.device) -> int:
    """Batches that the teacher works ahead: one on a device of its own. On a student's there is nothing to gain, and
    on a CPU much to lose: the threads of both would get in each other's way.
    """
    students = [torch.device("cpu")]
    if torch.cuda.device_count() > 0:
        students = [torch.device("cuda", i) for i in range(local_world_size())]
    return 0 if teacher_device in students else 1


@contextmanager
def process_groups(device: torch.device) -> Iterator[Ranks]:
    """Joins the ranks of torchrun's environment (NCCL on GPUs, gloo on CPUs), and leaves them together at the end.

    What uses the groups has to be gone when the block ends: a DDP model that outlives them can hang its process.
    On an error the groups are left as they are: to destroy them, NCCL would first wait for collectives that the
    other ranks are in and this one never joins. The process ends with its error, and the others hear of it.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif dist.get_debug_level() == dist.DebugLevel.DETAIL:
        logger.warning("TORCH_DISTRIBUTED_DEBUG=DETAIL taken as INFO: with it torch's DDP crashes on gloo groups")
        dist.set_debug_level(dist.DebugLevel.INFO)
    if "RANK" in os.environ:
        store, own_rank, n_ranks = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun keeps one store over its restarts, and in it the addresses of ranks that are gone.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"attempt-{attempt}", store)
        dist.init_process_group(backend, timeout=TIMEOUT, store=store, rank=own_rank, world_size=n_ranks)
    else:  # a plain `python` run
        dist.init_process_group(backend, timeout=TIMEOUT, store=dist.HashStore(), rank=0, world_size=1)
    rank, world_size, n_local = dist.get_rank(), dist.get_world_size(), local_world_size()
    control = dist.new_group(backend="gloo", timeout=TIMEOUT)
    sizes = [torch.zeros((), dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(sizes, torch.tensor(n_local), group=control)
    if any(size != n_local for size in sizes):
        raise ValueError(
            f"--nproc_per_node: nodes have {sorted({int(size) for size in sizes})} ranks; start the same number on each"
        )
    # Every rank takes part in making every node's group.
    nodes = [
        dist.new_group(range(i, i + n_local), timeout=TIMEOUT, backend="gloo") for i in range(0, world_size, n_local)
    ]
    lifeline = Lifeline(dist.new_group(backend="gloo", timeout=timedelta(days=3650)))
    try:
        yield Ranks(rank, world_size, local_rank(), n_local, device, nodes[rank // n_local], control)
        dist.barrier(group=control)  # nobody leaves while another still talks to it
    except BaseException as error:
        if lifeline.report(error):
            raise
        raise SystemExit(1) from error  # the first cause has been told
    lifeline.close()
    dist.destroy_process_group()


# --- the student and its loss --------------------------------------------------------------------------------


class DistillationModel(nn.Module):
    """The student with its loss, so that DDP sees one module from tokens to scalars.

    teacher_head: the teacher's output weight (vocab, D_t), which turns its hidden states into logits, or None
        where the teacher sends logits or does not run.
    vocab: entries that both vocabularies have.
    chunk_tokens: tokens that the loss takes at a time where the options do not say: as the run had it before, or None
        to choose by the memory that is free.
    """

    def __init__(
        self,
        student: LlambaForCausalLM,
        teacher_head: Tensor | None,
        vocab: int,
        args: TrainArguments,
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher_head: Tensor | None
        self.register_buffer("teacher_head", teacher_head, persistent=False)
        self.vocab = vocab
        self.weights = (args.ce_weight, args.kl_weight, args.temperature)
        self.chunk_tokens = args.loss_chunk_tokens or chunk_tokens
        device = student.backbone.embedding.weight.device
        self.compiled = args.compile or compiles_loss(device)

    def forward(self, batch: Batch, teacher_signal: Tensor | None) -> tuple[Tensor, Tensor]:
        """batch of (B, S); teacher_signal: hidden states (B, S, D_t), logits (B, S, vocab), or None.

        Returns the loss to descend, and its figures for a `Meter`.
        """
        hidden = self.student.backbone(batch.input_ids, use_cache=False).last_hidden_state  # (B, S, D)
        head = self.student.lm_head
        if self.chunk_tokens is None:  # once: what is free varies from step to step, and with it the rounding
            self.chunk_tokens = choose_chunk_tokens(self.vocab, hidden.dtype, hidden.device)
            logger.info("the loss takes %d tokens at a time", self.chunk_tokens)
        total, kl, ce = fused_distill_loss(
            hidden,
            head.weight,
            head.bias,
            teacher_signal,
            self.teacher_head,
            batch.labels,
            batch.loss_mask,
            self.vocab,
            *self.weights,
            self.chunk_tokens,
            self.compiled,
        )
        _, n_ignored = mask_unknown_labels(batch.labels, batch.loss_mask, self.vocab)
        return total, torch.stack([total, kl, ce, n_ignored]).detach().float()


def compiles_loss(device: torch.device) -> bool:
    """Whether the loss is compiled unasked: on GPUs. A CPU takes it in rows that stay in its cache instead."""
    return device.type == "cuda" and can_compile(device.type)


class Meter:
    """What a rank sees in the micro steps of one optimizer step; `mean` is their average over all ranks."""

    NAMES = ("loss", "kl", "ce", "ignored_labels")

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seen: list[tuple[Tensor, Sequence[int]]] = []

    def add(self, figures: Tensor, window_ids: Sequence[int]) -> None:
        """figures (4,): as `DistillationModel` returns them; window_ids: of the batch that gave them."""
        self.seen.append((figures, window_ids))

    def mean(self, **seconds: float) -> dict[str, float]:
        """Per micro step for the losses, per optimizer step for counts and for `seconds`, this rank's own. All ranks
        get the same means; what is not finite on one of them is not finite in the mean.
        """
        sums = torch.stack([figures for figures, _ in self.seen]).sum(dim=0)  # (4,)
        sums = torch.cat([sums, sums.new_tensor(list(seconds.values()))])
        dist.all_reduce(sums)
        values = [value / dist.get_world_size() for value in sums.tolist()]
        means = dict(zip([*self.NAMES, *seconds], values, strict=True))
        for name in ("loss", "kl", "ce"):
            means[name] /= len(self.seen)
        return means

    def windows(self, only_bad: bool = False) -> list[int]:
        """Ids of this rank's windows; with `only_bad` of the micro steps alone whose loss is not finite."""
        return [i for figures, ids in self.seen if not only_bad or not math.isfinite(figures[0].item()) for i in ids]

    def clear(self) -> None:
        self.seen.clear()


def wrap_ddp(model: DistillationModel, device: torch.device) -> DistributedDataParallel:
    with warnings.catch_warnings():
        # torch 2.13 deprecates the name; its successor is not known to torch 2.11.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )


def settle_buckets(model: DistributedDataParallel, args: TrainArguments, device: torch.device) -> None:
    """Has DDP arrange its buckets for good, which it does in the forward pass after the first backward pass. The order
    in which ranks are summed up, and so the last bit of a gradient, depends on them: a run that goes on must not begin
    with other buckets than it had. Two passes over made-up tokens; weights and random state are left as they were.
    """
    shape = (args.batch_size, args.seq_length)  # the real one: another would be compiled for, too
    ids = torch.zeros(shape, dtype=torch.int64, device=device)
    signal, inner = None, model.module
    if args.kl_weight > 0:
        width = inner.vocab if inner.teacher_head is None else inner.teacher_head.shape[1]
        signal = torch.zeros(*shape, width, dtype=DTYPES[args.dtype], device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for _ in range(2):
            loss, _ = model(Batch(ids, ids, torch.ones_like(ids, dtype=torch.bool)), signal)
            (loss * 0).backward()
    model.zero_grad(set_to_none=False)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return batch.with_tensors(lambda tensor: tensor.to(device, non_blocking=True))


# --- the optimizer -------------------------------------------------------------------------------------------


class MasterWeightAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) that steps on float32 master weights and moments, whatever the parameters' dtype.

    In bfloat16 a step of lr 1e-5 is below the weights' resolution and most of it would be lost; the masters
    keep it. For float32 parameters, and where `master_weights` is off, the parameter is its own master. Gradients are
    multiplied by their group's `grad_factor`, in float32 too: unscaled in float16, small ones would vanish.
    """

    SLICE = 2**24  # weights stepped at once

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        master_weights: bool = True,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, grad_factor=1.0))
        self.master_weights = master_weights

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)

    def _step_one(self, parameter: Tensor, group: dict) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            if self.master_weights and parameter.dtype != torch.float32:
                state["master"] = parameter.detach().float()
        master = state.get("master", parameter)
        # A slice at a time: the float32 gradient and AdamW's own temporaries are then the size of a slice, where a
        # vocabulary's weights alone would take gigabytes.
        tensors = (master, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
        for weight, grad, exp_avg, exp_avg_sq in zip(*(t.view(-1).split(self.SLICE) for t in tensors), strict=True):
            stepped = weight.float()  # itself, but for a 16-bit parameter without a master
            adamw(
                [stepped],
                [grad.float() * group["grad_factor"]],
                [exp_avg],
                [exp_avg_sq],
                [],
                [state["step"].clone()],  # adamw counts in place, and would count every slice
                foreach=False,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            if stepped is not weight:
                weight.copy_(stepped)
        state["step"] += 1
        if master is not parameter:
            parameter.copy_(master)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Trainable parameters: matrices decay, vectors (norms, biases, D) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(model: nn.Module, args: TrainArguments) -> ZeroRedundancyOptimizer:
    """AdamW (0.9, 0.95) whose masters and moments are kept on the one rank that owns the shard."""
    return ZeroRedundancyOptimizer(
        parameter_groups(model, args.weight_decay),
        optimizer_class=MasterWeightAdamW,
        lr=args.max_lr,
        betas=(0.9, 0.95),
        master_weights=args.master_weights,
    )


def build_schedule(optimizer: torch.optim.Optimizer, args: TrainArguments, total_steps: int, done: int) -> LRScheduler:
    """Warm-up, stable, decay over `total_steps` optimizer steps, of which `done` are behind."""
    for group in optimizer.param_groups:
        group["initial_lr"] = args.max_lr
    return get_wsd_schedule(
        optimizer,
        num_warmup_steps=round(args.warmup_ratio * total_steps),
        num_decay_steps=round(args.decay_ratio * total_steps),
        num_training_steps=total_steps,
        decay_type="linear",
        min_lr_ratio=args.min_lr / args.max_lr if args.max_lr else 0.0,
        last_epoch=done - 1,
    )


@dataclass
class LossScale:
    """The factor that keeps float16 gradients from vanishing: halved when they overflow, doubled after
    `growth_interval` good steps. For other dtypes it is 1 for good.
    """

    active: bool
    value: float
    good_steps: int = 0
    growth_interval: int = 1000

    @classmethod
    def for_dtype(cls, dtype: torch.dtype) -> "LossScale":
        return cls(True, 2.0**14) if dtype == torch.float16 else cls(False, 1.0)

    def update(self, overflowed: bool) -> None:
        if not self.active:
            return
        self.good_steps = 0 if overflowed else self.good_steps + 1
        if overflowed:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % self.growth_interval == 0:
            self.value *= 2


@torch.no_grad()
def gradient_norm(model: nn.Module) -> Tensor:
    """L2 norm of all gradients, in float32 whatever their dtype: a scalar tensor."""
    norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float32) for p in model.parameters() if p.grad is not None]
    return torch.linalg.vector_norm(torch.stack(norms))


@torch.no_grad()
def update(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss_scale: LossScale, grad_clip: float, loss: float
) -> tuple[float, Literal["stepped", "overflow", "bad"]]:
    """Unscale, clip, step, clear the gradients. Returns the gradient norm before clipping, and what came of it.

    `loss` is the mean of all ranks, and DDP has made the gradients, and so the norm, the same on all of them: they
    agree without asking whether a step is sound. If one of the two is not finite the update is skipped: an "overflow"
    if float16's scale can be blamed, else a "bad" step.
    """
    norm = gradient_norm(model).item() / loss_scale.value
    outcome: Literal["stepped", "overflow", "bad"] = "stepped"
    if not math.isfinite(loss) or not math.isfinite(norm):
        outcome = "overflow" if math.isfinite(loss) and loss_scale.value > 1 else "bad"
    else:
        factor = 1.0 / loss_scale.value
        if grad_clip and norm > grad_clip:
            factor *= grad_clip / norm
        for group in optimizer.param_groups:
            group["grad_factor"] = factor
        optimizer.step()
    loss_scale.update(overflowed=outcome == "overflow")
    # Kept as zeros: a gradient that is None gathers outside DDP's buckets until micro steps are summed up.
    optimizer.zero_grad(set_to_none=False)
    return norm, outcome
