"""Distils a teacher into a hybrid student: N student ranks under DDP, the teacher on the last visible GPU.

    torchrun --standalone --nproc_per_node=4 train_gpus.py --layers 14 16 17 30 --output_dir runs/mine

1. Text becomes tokens, windows, batches. 2. The student takes over the teacher's layers. 3. For each batch the
teacher answers all ranks at once, and each student learns from its part. 4. Checkpoints and metrics go to
--output_dir.
"""

import contextlib
import dataclasses
import itertools
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from arguments import TrainArguments, parse_train_args
from checkpointing.resume import checkpoints_to_try, choose_checkpoint
from checkpointing.run_folder import (
    begin_status,
    check_shared,
    check_space,
    ended_before_restart,
    keep_options,
    prepare_output_dir,
    telling_refusal,
    write_status,
    writing_to,
)
from checkpointing.saver import Saver
from checkpointing.state import Progress, position_to_go_on, random_state, restore, starting_point
from data import CachedLoader, build_dataloader
from distillation.models import Models, check_models, load_models
from distillation.teacher import Lane, ask_ahead
from inputs.options import as_yaml
from llamba.parts import parameter_table
from model_utils import (
    DTYPES,
    adopt_special_tokens,
)
from monitoring.evaluator import Evaluator, read_material
from monitoring.health import SpikeWatch, UpdateHealth, tell_oddities
from monitoring.layer_map import LayerMap
from monitoring.run_log import RunLog, keeping_warnings
from monitoring.speed import Gauges
from monitoring.trackers import check_trackers
from preflight.plan_report import print_plan
from processes.devices import check_compiler, choose_devices, default_prefetch
from processes.exits import EXIT_DIVERGED, EXIT_STOPPED, REASONS, StopRequest, hearing_signals, run_entry
from processes.ranks import Ranks, is_main_rank, launched_rank, launched_world_size, process_groups
from text.batch import Batch
from text.stream_loader import StreamingLoader
from training_utils import (
    DistillationModel,
    LossScale,
    Meter,
    build_optimizer,
    build_schedule,
    settle_buckets,
    to_device,
    update,
    wrap_ddp,
)
from utils import Stopwatch, TimedIterator, describe_environment, setup_logging

logger = logging.getLogger("train")


def main() -> int:
    args = parse_train_args()
    options = f"# {launched_world_size()} rank(s), started in {Path.cwd()}\n\n{as_yaml(args)}"
    setup_logging(args.log_file, is_main_rank())
    if args.dry_run:
        return print_plan(args) if is_main_rank() else 0
    if (code := ended_before_restart(Path(args.output_dir))) is not None:
        return code
    with hearing_signals(args.time_limit) as stop, keeping_warnings(launched_rank()) as warnings:
        device, teacher_device = choose_devices(
            args.teacher_device, args.teacher_placement, runs_teacher=args.kl_weight > 0
        )
        if args.teacher_prefetch is None:
            args.teacher_prefetch = default_prefetch(teacher_device)
        if args.compile:
            check_compiler(device.type)
        if is_main_rank():
            check_trackers(args)
        candidates = checkpoints_to_try(args, launched_world_size())
        models = check_models(args, candidates[0] if candidates else None)
        with contextlib.ExitStack() as stack:
            if is_main_rank():
                with writing_to(args):
                    stack.enter_context(prepare_output_dir(args, candidates))
                    stop.count_from(begin_status(Path(args.output_dir)))
                stack.enter_context(telling_refusal(Path(args.output_dir)))
            ranks = stack.enter_context(process_groups(device))
            warnings.write_to(Path(args.output_dir))
            return run(args, models, candidates, ranks, teacher_device, stop, options)


def run(
    args: TrainArguments,
    models: Models,
    candidates: list[Path],
    ranks: Ranks,
    teacher_device: torch.device,
    stop: StopRequest,
    options: str,
) -> int:
    """options: what args.yaml shall say. Returns the exit code."""
    torch.manual_seed(args.seed)
    logger.info(describe_environment())
    check_shared(args, ranks)
    checkpoint = choose_checkpoint(args, candidates, ranks)
    progress = starting_point(args, checkpoint, ranks)

    # 1. Text to batches. The first is drawn now: data that cannot fill it is found out before models load.
    material = read_material(args, models.tokenizer, ranks)
    loader = build_dataloader(
        args,
        models.tokenizer,
        rank=ranks.rank,
        world_size=ranks.world_size,
        is_builder=ranks.local_rank == 0,
        position=None if checkpoint is None else position_to_go_on(checkpoint, args, ranks.rank),
        control_group=ranks.control,
    )
    total_steps = count_steps(args, loader, 0 if checkpoint is None else progress.step)
    if progress.step >= total_steps:
        return ending(args, progress, total_steps, 0, ranks)
    batches = iter(loader)
    first = next(batches, None)
    batches = iter(()) if first is None else itertools.chain([first], batches)

    # 2. The student takes over the teacher's layers, or is the hybrid of the checkpoint.
    if checkpoint is not None:
        models = models._replace(student=str(checkpoint))
    student, head, lane = load_models(args, models, ranks, teacher_device)
    adopt_special_tokens(student, models.tokenizer)
    logger.info("student with layers %s from the teacher\n%s", args.layers, parameter_table(student))
    model = wrap_ddp(DistillationModel(student, head, models.vocab, args, progress.loss_chunk_tokens), ranks.device)
    optimizer = build_optimizer(model, args)
    if checkpoint is not None:
        restore(checkpoint, student, optimizer, ranks.rank, ranks.device)

    # 3. and 4. Learn from text and teacher, log, save.
    if ranks.is_main:
        check_space(args, student, (total_steps - progress.step) * args.grad_accumulation_steps)
        with writing_to(args):
            keep_options(Path(args.output_dir), options)
    saved = -1 if checkpoint is None and progress.micro_step == 0 else progress.micro_step
    saver = Saver(args, student, optimizer, models.tokenizer, ranks, saved)
    evaluator = Evaluator(args, material, models.tokenizer, ranks, model.module, lane, stop)
    gauges = Gauges(args, student, ranks.device, ranks.world_size)
    log = RunLog(args, progress.micro_step, ranks.is_main, step=progress.step, total_steps=total_steps, gauges=gauges)
    with log, stop.deferring():
        code = distil(args, batches, total_steps, progress, model, optimizer, lane, ranks, log, saver, evaluator, stop)
    lane.close()
    return code


def count_steps(args: TrainArguments, loader: CachedLoader | StreamingLoader, behind: int) -> int:
    """Optimizer steps of the whole run: --max_steps or --epochs, whichever ends first. How long a stream is, nobody
    knows; it may end before the learning rate has decayed. behind: steps whose batches the loader has left behind.
    """
    total, accumulate = args.max_steps, args.grad_accumulation_steps
    if isinstance(loader, CachedLoader):
        total = min(total, behind + len(loader) // accumulate)
        if total == 0:
            raise ValueError(
                f"--grad_accumulation_steps {accumulate}: the data has {len(loader)} micro steps, fewer than one "
                "optimizer step; lower it, raise --epochs or use more text"
            )
    if args.resume_step // accumulate >= total:
        raise ValueError(
            f"--resume_step {args.resume_step}: the run has {total} optimizer steps of {accumulate} micro steps; "
            "nothing is left to train, raise --max_steps or --epochs"
        )
    return total


def distil(
    args: TrainArguments,
    batches: Iterator[Batch],
    total_steps: int,
    progress: Progress,
    model: DistributedDataParallel,
    optimizer: ZeroRedundancyOptimizer,
    lane: Lane,
    ranks: Ranks,
    log: RunLog,
    saver: Saver,
    evaluator: Evaluator,
    stop: StopRequest,
) -> int:
    """The run from `progress` on. Returns the exit code."""
    start, accumulate = progress, args.grad_accumulation_steps
    micro_step, tokens_per_step = start.micro_step, accumulate * ranks.world_size * args.batch_size * args.seq_length
    schedule = build_schedule(optimizer, args, total_steps, done=start.step)
    loss_scale = LossScale(**start.loss_scale) if start.loss_scale else LossScale.for_dtype(DTYPES[args.dtype])
    meter, spikes = Meter(ranks.device), SpikeWatch()
    health = UpdateHealth(args, model.module.student, optimizer, ranks)
    layer_map = LayerMap(args, model.module.student, lane, ranks.is_main)
    model.train()
    settle_buckets(model, args, ranks.device)
    progress = dataclasses.replace(progress, loss_chunk_tokens=model.module.chunk_tokens)
    logger.info("%d optimizer steps of %d micro steps, from step %d", total_steps, accumulate, start.step)
    if micro_step == 0:
        saver.save(progress)

    asked_to_stop = 0
    n_left = (total_steps - start.step) * accumulate
    timed_batches = TimedIterator(itertools.islice(batches, n_left))  # and not one more
    stopwatch = Stopwatch()
    for batch, asked in ask_ahead(timed_batches, lane, args.teacher_prefetch or 0):
        batch = to_device(batch, ranks.device)
        signal = asked.result()  # (B, S, D_t) or (B, S, vocab); None without a teacher
        micro_step += 1
        steps_now = (micro_step - start.micro_step) % accumulate == 0
        with contextlib.nullcontext() if steps_now else model.no_sync():
            loss, figures = model(batch, signal)
            (loss * (loss_scale.value / accumulate)).backward()
        meter.add(figures, batch.window_ids)

        if steps_now:
            lr = float(schedule.get_last_lr()[0])
            means = meter.mean(teacher_wait_s=lane.waits.take(), data_wait_s=timed_batches.take())
            grad_norm, outcome = update(model, optimizer, loss_scale, args.grad_clip, means["loss"])
            schedule.step()
            progress = progress.after(
                micro_step,
                tokens_per_step,
                outcome,
                loss_scale=dataclasses.asdict(loss_scale),
                position=batch.position,
                rng=random_state(ranks.device),
            )
            tell_oddities(progress.step, means["loss"], grad_norm, outcome, spikes, meter, ranks.rank)
            meter.clear()
            row = metrics_row(progress, means, lr, grad_norm, tokens_per_step, stopwatch.lap())
            health.add_to(row)
            layer_map.add_to(row, batch)
            evaluator.add_to(row, total_steps)
            log.write(row)
            if saver.is_due(progress):
                log.flush_to_disk()
                saver.save(progress)
            stopwatch.lap()  # an evaluation and the copy for a checkpoint are no part of a step's time
        asked_to_stop, *saving = ranks.maximum(stop.code, *saver.status())
        saver.advance(*saving)
        if asked_to_stop or progress.bad_in_a_row >= args.max_bad_steps:
            break

    log.flush_to_disk()
    saver.finish(progress, stop)
    return ending(args, progress, total_steps, asked_to_stop, ranks)


def metrics_row(
    progress: Progress, means: dict[str, float], lr: float, grad_norm: float, tokens: int, seconds: float
) -> dict[str, Any]:
    """The row of metrics.jsonl for the optimizer step that has led to `progress`: of `tokens`, in `seconds`."""
    return {
        "step": progress.step,
        "micro_step": progress.micro_step,
        **means,
        "lr": lr,
        "grad_norm": grad_norm,
        "skipped_updates": progress.skipped_updates,
        "tokens": progress.tokens,
        "tokens_per_s": tokens / seconds,
        "step_time_s": seconds,
    }


def ending(args: TrainArguments, progress: Progress, total_steps: int, asked_to_stop: int, ranks: Ranks) -> int:
    """Tells how the run ended, in the log, in status.json and by the exit code."""
    status, code, text = "complete", 0, f"complete: {progress.step} of {total_steps} optimizer steps"
    if progress.bad_in_a_row >= args.max_bad_steps:
        status, code = "diverged", EXIT_DIVERGED
        text = (
            f"{progress.bad_in_a_row} updates in a row were skipped, their loss or gradient was not finite: the run "
            "diverged. Weights and optimizer are those before them; lower --max_lr, or look at the windows named "
            "above, and go on with --resume auto"
        )
    elif progress.step < total_steps and asked_to_stop:
        status, code = "stopped", EXIT_STOPPED
        text = f"stopped by {REASONS[asked_to_stop]} at step {progress.step} of {total_steps}; go on with --resume auto"
    elif progress.step < total_steps:
        text = f"the data ended at step {progress.step} of {total_steps}, before the learning rate had decayed"
    if ranks.is_main:
        logger.log(logging.INFO if progress.step >= total_steps else logging.WARNING, text)
        write_status(Path(args.output_dir), status, code, micro_step=progress.micro_step, text=text)
    return code


if __name__ == "__main__":
    sys.exit(run_entry(main))
