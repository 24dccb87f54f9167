"""Distils a teacher into a hybrid student: N student ranks under DDP, the teacher on the last visible GPU.

    torchrun --standalone --nproc_per_node=4 train_gpus.py --layers 14 16 17 30 --output_dir runs/mine

1. Text becomes tokens, windows, batches. 2. The student takes over the teacher's layers. 3. For each batch the
teacher answers all ranks at once, and each student learns from its part. 4. Checkpoints and metrics go to
--output_dir.
"""

import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from arguments import TrainArguments, parse_train_args
from checkpoint import save_checkpoint
from data import Batch, CachedLoader, StreamingLoader, build_dataloader, check_tokenizer
from llamba import LlambaForCausalLM
from losses import shared_vocab
from model_utils import (
    adopt_special_tokens,
    apply_replacements,
    check_checkpoint_blocks,
    check_replacements,
    get_configs,
    get_student_model,
    get_teacher_model,
    get_tokenizer,
    locate_model,
    parameter_table,
    prepare_student,
)
from teacher import Lane, NoTeacher, ask_ahead, open_lane, share_layers
from training_utils import (
    DTYPES,
    DistillationModel,
    LossScale,
    Meter,
    Ranks,
    build_optimizer,
    build_schedule,
    choose_devices,
    default_prefetch,
    is_main_rank,
    process_groups,
    to_device,
    update,
    wrap_ddp,
)
from utils import (
    RunLog,
    Stopwatch,
    TimedIterator,
    check_compiler,
    describe_environment,
    prepare_output_dir,
    run_entry,
    setup_logging,
)

logger = logging.getLogger("train")


class Models(NamedTuple):
    """What the checks before a run have found: where the models are, and what both of them speak."""

    teacher: str
    student: str
    vocab: int  # entries that both vocabularies have
    tokenizer: PreTrainedTokenizerBase


def main() -> None:
    args = parse_train_args()
    setup_logging(args.log_file, is_main_rank())
    device, teacher_device = choose_devices(
        args.teacher_device, args.teacher_placement, runs_teacher=args.kl_weight > 0
    )
    if args.teacher_prefetch is None:
        args.teacher_prefetch = default_prefetch(teacher_device)
    if args.compile:
        check_compiler(device.type)
    models = check_models(args)
    if is_main_rank():
        prepare_output_dir(args.output_dir, args.resume_step)
    with process_groups(device) as ranks:
        run(args, models, ranks, teacher_device)


def check_models(args: TrainArguments) -> Models:
    """Whether these models go together, before a weight of them is read. Raises ValueError."""
    runs_teacher = args.kl_weight > 0
    teacher_needed = runs_teacher or bool(args.layers)
    teacher = locate_model("--teacher_model", args.teacher_model, args.local_files_only, teacher_needed)
    student = locate_model("--student_model", args.student_model, args.local_files_only)
    teacher_config, student_config = get_configs(teacher, student)
    check_replacements(student_config, teacher_config, args.layers)
    check_checkpoint_blocks(student_config, args.checkpoint_blocks)
    tokenizer = get_tokenizer("--teacher_model", teacher)
    check_tokenizer(tokenizer, "--student_model", student_config.vocab_size)
    if not runs_teacher:
        return Models(teacher, student, student_config.vocab_size, tokenizer)
    check_tokenizer(tokenizer, "--teacher_model", teacher_config.vocab_size)
    return Models(teacher, student, shared_vocab(student_config.vocab_size, teacher_config.vocab_size), tokenizer)


def run(args: TrainArguments, models: Models, ranks: Ranks, teacher_device: torch.device) -> None:
    torch.manual_seed(args.seed)
    logger.info(describe_environment())

    # 1. Text to batches. The first is drawn now: data that cannot fill it is found out before models load.
    loader = build_dataloader(
        args,
        models.tokenizer,
        rank=ranks.rank,
        world_size=ranks.world_size,
        is_builder=ranks.local_rank == 0,
        control_group=ranks.control,
    )
    total_steps = count_steps(args, loader)
    batches = all_epochs(loader, args.epochs)
    batches = itertools.chain([next(batches)], batches)

    # 2. The student takes over the teacher's layers.
    student, head, lane = load_models(args, models, ranks, teacher_device)
    adopt_special_tokens(student, models.tokenizer)
    logger.info("student with layers %s from the teacher\n%s", args.layers, parameter_table(student))
    model = wrap_ddp(DistillationModel(student, head, models.vocab, args), ranks.device)

    # 3. and 4. Learn from text and teacher, log, save.
    def save(micro_step: int, step: int) -> None:
        if ranks.is_main:
            state = {"micro_step": micro_step, "step": step, "arguments": dataclasses.asdict(args)}
            path = save_checkpoint(Path(args.output_dir), micro_step, student, models.tokenizer, state)
            logger.info("saved %s", path)

    with RunLog(args, ranks.is_main) as log:
        distil(args, batches, total_steps, model, lane, ranks, log, save)
    lane.close()


def load_models(
    args: TrainArguments, models: Models, ranks: Ranks, teacher_device: torch.device
) -> tuple[LlambaForCausalLM, torch.Tensor | None, Lane]:
    """The student of this rank, hybrid and frozen as asked; the teacher's head, if its hidden states are what comes;
    and the way to its answers. The teacher's weights are read where it runs; where it does not, by rank 0 alone, for
    its layers alone.
    """
    dtype, runs_teacher = DTYPES[args.dtype], args.kl_weight > 0
    student = get_student_model(models.student, dtype, ranks.device)
    takes_layers = bool(args.layers) and not student.config.attention_layers  # else a hybrid, trained before
    place = torch.device("meta")
    if runs_teacher and (ranks.owns_teacher or args.teacher_placement == "colocated"):
        place = teacher_device
    elif takes_layers and ranks.is_main:
        place = torch.device("cpu")
    teacher = get_teacher_model(models.teacher, dtype, place, with_head=runs_teacher)
    if takes_layers:
        apply_replacements(student, teacher, args.layers)
        share_layers(student, args.layers)
    prepare_student(student, args)
    if not runs_teacher:
        return student, None, NoTeacher(ranks.device)
    head, lane = open_lane(teacher, args.teacher_signal, args.teacher_placement, models.vocab, ranks)
    return student, head, lane


def count_steps(args: TrainArguments, loader: CachedLoader | StreamingLoader) -> int:
    """Optimizer steps of the whole run: --max_steps or --epochs, whichever ends first. How long a stream is, nobody
    knows; it may end before the learning rate has decayed.
    """
    total, accumulate = args.max_steps, args.grad_accumulation_steps
    if isinstance(loader, CachedLoader):
        micro_steps = args.epochs * len(loader)
        total = min(total, micro_steps // accumulate)
        if total == 0:
            raise ValueError(
                f"--grad_accumulation_steps {accumulate}: the data has {micro_steps} micro steps, fewer than one "
                "optimizer step; lower it, raise --epochs or use more text"
            )
    if args.resume_step // accumulate >= total:
        raise ValueError(
            f"--resume_step {args.resume_step}: the run has {total} optimizer steps of {accumulate} micro steps; "
            "nothing is left to train, raise --max_steps or --epochs"
        )
    return total


def all_epochs(loader: CachedLoader | StreamingLoader, epochs: int) -> Iterator[Batch]:
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        yield from loader


def distil(
    args: TrainArguments,
    batches: Iterator[Batch],
    total_steps: int,
    model: DistributedDataParallel,
    lane: Lane,
    ranks: Ranks,
    log: RunLog,
    save: Callable[[int, int], None],
) -> None:
    accumulate = args.grad_accumulation_steps
    micro_step = saved = args.resume_step
    step = micro_step // accumulate
    optimizer = build_optimizer(model, args)
    schedule = build_schedule(optimizer, args, total_steps, done=step)
    loss_scale = LossScale(DTYPES[args.dtype])
    meter = Meter(ranks.device)
    tokens_per_micro_step = ranks.world_size * args.batch_size * args.seq_length
    logger.info("%d optimizer steps of %d micro steps, from step %d", total_steps, accumulate, step)
    timed_batches = TimedIterator(itertools.islice(batches, total_steps * accumulate - micro_step))  # and not one more
    if micro_step == 0:
        save(micro_step, step)

    model.train()
    stopwatch = Stopwatch()
    for batch, asked in ask_ahead(timed_batches, lane, args.teacher_prefetch or 0):
        batch = to_device(batch, ranks.device)
        signal = asked.result()  # (B, S, D_t) or (B, S, vocab); None without a teacher
        micro_step += 1
        steps_now = micro_step % accumulate == 0
        with nullcontext() if steps_now else model.no_sync():
            loss, figures = model(batch, signal)
            (loss * (loss_scale.value / accumulate)).backward()
        meter.add(figures)

        if steps_now:
            lr = schedule.get_last_lr()[0]
            grad_norm = update(model, optimizer, schedule, loss_scale, args.grad_clip)
            step += 1
            seconds = stopwatch.lap()
            log.write(
                {
                    "step": step,
                    "micro_step": micro_step,
                    **meter.mean(teacher_wait_s=lane.waits.take(), data_wait_s=timed_batches.take()),
                    "lr": lr,
                    "grad_norm": grad_norm,
                    "skipped_updates": loss_scale.skipped,
                    "tokens": micro_step * tokens_per_micro_step,
                    "tokens_per_s": accumulate * tokens_per_micro_step / seconds,
                    "step_time_s": seconds,
                }
            )
        if args.save_interval and micro_step % args.save_interval == 0:
            save(micro_step, step)
            saved = micro_step
            stopwatch.lap()  # saving is no part of a step's time
    trained = step * accumulate  # micro steps after the last update have changed no weight
    if trained != saved:
        save(trained, step)
    if step < total_steps:
        logger.warning("the data ended at step %d of %d, before the learning rate had decayed", step, total_steps)


if __name__ == "__main__":
    sys.exit(run_entry(main))
