"""Distils a teacher into a hybrid student: N student ranks under DDP, the teacher on the last visible GPU. With
`--stage align` it aligns the student's mixers with the teacher's attention first, and no teacher has a GPU of its own.

    torchrun --standalone --nproc_per_node=4 train_gpus.py --layers 14 16 17 30 --output_dir runs/mine

1. Text becomes tokens, windows, batches. 2. The student takes over the teacher's layers. 3. For each batch the
teacher answers all ranks at once, and each student learns from its part. 4. Checkpoints and metrics go to
--output_dir.
"""

import sys

from arguments import TrainArguments, parse_train_args
from processes.exits import EXIT_DIVERGED, EXIT_STOPPED, REASONS, answer_early, run_entry, stop_on_signals

if __name__ == "__main__":
    ARGS = answer_early(parse_train_args)

import contextlib
import dataclasses
import functools
import itertools
import logging
from pathlib import Path
from typing import NamedTuple

import torch

from checkpointing import run_folder
from checkpointing.resume import Resume
from checkpointing.saver import NoSaver, Saver
from checkpointing.state import RunState, random_state
from data import CachedLoader, build_dataloader
from distillation.first_answer import check_first_answer
from distillation.models import Models, check_models
from distillation.teacher import ask_ahead
from inputs.option_checks import warmup_problems
from inputs.option_files import as_yaml
from inputs.teacher_parts import named_parts
from llamba.parts import parameter_table
from model_utils import adopt_special_tokens
from monitoring.evaluator import read_material
from monitoring.trackers import check_trackers
from monitoring.warnings_file import recording_warnings
from monitoring.watchers import Watchers, build_watchers
from preflight.plan_report import print_plan
from processes.devices import check_compiler, choose_devices
from processes.ranks import check_launch, is_main_rank, launched_rank, launched_world_size, process_groups
from selection import auto
from text.batch import Batch
from text.separators import choose_separator
from text.stream_loader import StreamingLoader
from training_utils import Job, Learner, Meter, build_learner, load_objective, to_device
from utils import Stopwatch, TimedIterator, describe_environment, printable, setup_logging

logger = logging.getLogger("train")


class Checked(NamedTuple):
    """Holds what `check` has found out before any weight is read."""

    device: torch.device  # of this rank's student
    teacher_device: torch.device
    resume: Resume
    models: Models
    args: TrainArguments  # with what `auto` stands for in this run


def main(args: TrainArguments | None = None) -> int:
    """Runs in three steps: check, take the folder, join the ranks. args: the command line's if not given. Returns the
    exit code.
    """
    args = args or parse_train_args()
    setup_logging(args.log_file, is_main_rank())
    if args.dry_run:
        return print_plan(args) if is_main_rank() else 0
    check_launch()
    if (code := run_folder.ended_before_restart(Path(args.output_dir))) is not None:
        return code
    with stop_on_signals(args.time_limit) as stop, recording_warnings(launched_rank()) as warnings:
        checked = check(args)
        with contextlib.ExitStack() as stack:
            if is_main_rank():
                stop.count_from(stack.enter_context(run_folder.taken(args, checked.resume.resumed)))
            refuse = functools.partial(run_folder.write_refusal, Path(args.output_dir))
            ranks = stack.enter_context(process_groups(checked.device, on_mistake=refuse))
            warnings.write_to(Path(args.output_dir))
            checked = checked._replace(**auto.chosen(checked.args, checked.device, ranks))
            return run(Job(checked.args, ranks, stop), checked)


def check(args: TrainArguments) -> Checked:
    """Finds what a user can get wrong before a weight is read or a rank waits for another. Raises ValueError."""
    device, teacher_device = choose_devices(args.teacher_device, args.placement, runs_teacher=args.has_teacher)
    if args.compile:
        check_compiler(device.type)
    if is_main_rank():
        check_trackers(args)
    resume = Resume(args, launched_world_size())
    args = auto.check_auto(args, resume.parts)
    models = check_models(args, resume.checkpoint)
    separator = choose_separator(resume.document_separator(models.tokenizer.eos_token), models.tokenizer)
    logger.info("each document ends with %s: %s", separator, separator.why)
    args = dataclasses.replace(args, document_separator=separator.token)
    return Checked(device, teacher_device, resume, models, args)


def run(job: Job, checked: Checked) -> int:
    """Trains from where `checked.resume` says to the end, or to where it is asked to stop. Returns the exit code."""
    args, ranks, resume, models = job.args, job.ranks, checked.resume, checked.models
    torch.manual_seed(args.seed)
    logger.info(describe_environment())
    run_folder.check_shared(Path(args.output_dir), ranks)
    resume.choose(ranks)
    state = resume.state()

    # 1. Text becomes batches. The first is drawn now: data that cannot fill it is found out before models load.
    material = read_material(args, models.tokenizer, ranks)
    loader = build_dataloader(
        args,
        models.tokenizer,
        rank=ranks.rank,
        world_size=ranks.world_size,
        is_builder=ranks.local_rank == 0,
        position=resume.position(ranks.rank),
        control_group=ranks.control,
    )
    total_steps = count_steps(args, loader, 0 if resume.checkpoint is None else state.step)
    if state.step >= total_steps:
        return ending(job, state, total_steps)
    if has_diverged(args, state):  # why it stopped: it may skip as many again
        state = dataclasses.replace(state, bad_in_a_row=0)
    batches = first_n(loader, (total_steps - state.step) * args.grad_accumulation_steps)

    # 2. The student takes over the teacher's layers, or is the hybrid of the checkpoint.
    if resume.checkpoint is not None:
        models = models._replace(student=str(resume.checkpoint), student_flag="--resume")
    objective, lane = load_objective(args, models, ranks, checked.teacher_device, state.loss_chunk_tokens)
    student = objective.model.student
    check_first_answer(args.teacher_model, lane, objective.model.teacher_head, batches.peek(), ranks)
    adopt_special_tokens(student, models.tokenizer)
    table = parameter_table(student, args.max_lr, args.copied_lr_factor)
    logger.info("student with %s from the teacher\n%s", named_parts(args.layers, args.kept_heads), table)
    learner = build_learner(job, objective, lane, total_steps, state.step, state.loss_scale)
    resume.restore(learner, ranks)

    # 3. and 4. Learn from text and teacher, log, save.
    run_folder.check_file_limit(Path(args.output_dir), student, ranks.world_size)
    if ranks.is_main:
        run_folder.check_space(args, student, (total_steps - state.step) * args.grad_accumulation_steps)
        begun = f"# {ranks.world_size} rank(s), started in {printable(str(Path.cwd()))}"
        run_folder.save_options(Path(args.output_dir), f"{begun}\n\n{as_yaml(args)}")
    # With --resume_step the first state needs no checkpoint: its weights are --student_model's.
    saved = -1 if resume.checkpoint is None and state.micro_step == 0 else state.micro_step
    saver = Saver(args, student, learner.exchange, models.tokenizer, ranks, saved)
    with build_watchers(job, learner, state, material, models.tokenizer) as watchers, job.stop.deferred():
        state = begin(job, learner, state, saver)
        state = distil(job, batches, learner, state, saver, watchers)
        code = ending(job, state, total_steps)
    lane.close()
    return code


def count_steps(args: TrainArguments, loader: CachedLoader | StreamingLoader, done: int) -> int:
    """Returns the optimizer steps of the whole run: --max_steps or --epochs, whichever ends first. The length of a
    stream is unknown; it may end before the learning rate has decayed. done: steps whose batches the loader skips.
    """
    total, accumulate = args.max_steps, args.grad_accumulation_steps
    if isinstance(loader, CachedLoader):
        total = min(total, done + len(loader) // accumulate)
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
    for problem in warmup_problems(args, total):  # of data that is less than --max_steps
        raise ValueError(problem)
    return total


def first_n(loader: CachedLoader | StreamingLoader, n: int) -> TimedIterator[Batch]:
    """Returns the loader's first n batches, of which it draws one at once, and never one more than is trained."""
    batches = TimedIterator(itertools.islice(loader, n))
    batches.peek()
    return batches


def begin(job: Job, learner: Learner, state: RunState, saver: Saver | NoSaver) -> RunState:
    """Brings the learner to its first step, and saves the student of a new run as it is."""
    learner.objective.begin((job.args.batch_size, job.args.seq_length))
    state = dataclasses.replace(state, loss_chunk_tokens=learner.objective.model.chunk_tokens)
    counts = (learner.total_steps, learner.accumulate, state.step)
    logger.info("%d optimizer steps of %d micro steps, from step %d", *counts)
    if state.micro_step == 0:
        saver.save(state)
        saver.wait()  # a folder that can take no checkpoint is found out before the first step
    return state


def distil(
    job: Job,
    batches: TimedIterator[Batch],
    learner: Learner,
    state: RunState,
    saver: Saver | NoSaver,
    watchers: Watchers,
) -> RunState:
    """Learns from each batch and the teacher's answer to it, until the batches end or all ranks agree to stop."""
    args, ranks, lane = job.args, job.ranks, learner.lane
    meter, stopwatch = Meter(learner.objective.named), Stopwatch()
    for batch, asked in ask_ahead(batches, lane):
        batch = to_device(batch, ranks.device)
        is_last = meter.n_micro_steps + 1 == args.grad_accumulation_steps
        meter.add(learner.micro_step(batch, asked, is_last), batch.window_ids)
        if is_last:
            means = meter.means(teacher_wait_s=lane.waits.take(), data_wait_s=batches.take())
            update = learner.update(means)
            state = state.after(update, batch.position, random_state(ranks.device))
            watchers.after_step(state, update, stopwatch.lap(), meter, batch)
            if saver.is_due(state):
                watchers.flush_to_disk()
                saver.save(state)
            meter.clear()
            stopwatch.lap()  # a step's time has neither evaluation nor the copy for a checkpoint in it
        job.stop.agreed, *saving = ranks.maximum(job.stop.code, *saver.status())
        saver.advance(*saving)
        if job.stop.agreed or has_diverged(args, state):
            break
    watchers.flush_to_disk()
    saver.finish(state, job.stop)
    return state


def has_diverged(args: TrainArguments, state: RunState) -> bool:
    """Returns whether so many updates in a row were skipped that the run has to stop."""
    return state.bad_in_a_row >= args.max_bad_steps


class Ending(NamedTuple):
    """Says how a run ended: the status of status.json, the exit code, and the words of the log."""

    status: str
    code: int
    text: str


def how_it_ended(args: TrainArguments, state: RunState, total_steps: int, stopped_by: int) -> Ending:
    """Returns how a run ended that stands at `state`. stopped_by: an index into REASONS, 0 if nobody asked it to stop.

    A run of which no update was applied is not complete, however short it was.
    """
    done, bad = f"step {state.step} of {total_steps}", state.bad_in_a_row
    is_at_end, gave_up = state.step >= total_steps, has_diverged(args, state)
    if stopped_by and not is_at_end and not gave_up:
        text = f"stopped by {REASONS[stopped_by]} at {done}; resume with --resume auto"
        return Ending("stopped", EXIT_STOPPED, text)
    applied_none = 0 < state.step == state.skipped_updates
    if applied_none and not bad:
        text = (
            f"all {state.step} update(s) were skipped while the loss scale of float16 was falling: nothing was "
            "learned; raise --max_steps, or use --dtype bfloat16"
        )
        return Ending("diverged", EXIT_DIVERGED, text)
    if gave_up or applied_none:
        which = f"all {state.step} update(s)" if applied_none else f"{bad} updates in a row"
        again = "start again from an earlier checkpoint" if is_at_end else "resume with --resume auto"
        text = (
            f"{which} were skipped, their loss or gradient was not finite: the run diverged. Weights and optimizer are "
            f"those before them; lower --max_lr, or look at the windows named above, and {again}"
        )
        return Ending("diverged", EXIT_DIVERGED, text)
    text = f"complete: {state.step} of {total_steps} optimizer steps"
    if not is_at_end:
        text = f"the data ended at {done}, before the learning rate had decayed"
    if bad:
        text += f"; the last {bad} update(s) were skipped, look at the windows named above"
    elif args.stage == "align":
        text += f"; the mixers are aligned, distil the student with --preset {args.preset} --teacher_model "
        text += f"{args.teacher_model} --student_model {args.output_dir}/latest "
        text += named_parts(args.layers, args.kept_heads)
    return Ending("complete", 0, text)


def ending(job: Job, state: RunState, total_steps: int) -> int:
    """Says how the run ended, in the log and in status.json. Returns the exit code."""
    status, code, text = how_it_ended(job.args, state, total_steps, job.stop.agreed)
    if job.ranks.is_main:
        is_well = code == 0 and state.step >= total_steps and not state.bad_in_a_row
        logger.log(logging.INFO if is_well else logging.WARNING, text)
        run_folder.write_status(Path(job.args.output_dir), status, code, micro_step=state.micro_step, text=text)
    return code


if __name__ == "__main__":
    sys.exit(run_entry(functools.partial(main, ARGS)))
