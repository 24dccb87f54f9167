"""Checks of options against each other, which need no file and no model: each yields a line with flags, values and
remedy. `args` is an instance of a dataclass of arguments.py.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inputs.option_values import preset_values
from inputs.value_types import AutoLayers

WARMUP = "warmup_steps"
FEWEST_TOKENS = 16  # of an MMLU prompt: about what the letters of its choices and "Answer:" take


def train_problems(args: Any) -> Iterator[str]:
    """Yields what does not go together in the options of training."""
    for check in (_layer_problems, _teacher_problems, _training_problems, _evaluation_problems, _plan_problems):
        yield from check(args)


def eval_problems(args: Any) -> Iterator[str]:
    """Yields what does not go together in the options of an evaluation."""
    yield from _layer_problems(args)
    for name, number in (("layers", args.auto_layers), ("heads", args.auto_heads)):
        if number is not None and (name in args.given or ({"hybrid", "all"} & set(args.which) and args.ckpt is None)):
            yield (
                f"--{name} auto:{number}: an evaluation chooses no {name}; give those of choice.json, or leave the "
                "option out, with a --ckpt, which has its own"
            )
    if args.ckpt is not None and not {"hybrid_ft", "all"} & set(args.which):
        which = f"--which {' '.join(args.which)}"
        yield f"--ckpt {args.ckpt}: {which} does not score it; add hybrid_ft, or leave --ckpt out"
    if not (args.mmlu or args.tasks or args.held_out or args.retrieval):
        yield "--no_mmlu: nothing is left to measure; add --tasks, --held_out or --retrieval"
    prompts = [*["--no_mmlu"] * args.mmlu, *["no --tasks"] * bool(args.tasks)]
    if prompts and args.max_length is not None and 1 <= args.max_length < FEWEST_TOKENS:
        yield (
            f"--max_length {args.max_length}: nothing of a question is left in so few tokens; expected at least "
            f"{FEWEST_TOKENS}, or {' and '.join(prompts)}"
        )
    if args.resume and args.output is None:
        yield "--resume: resumes from the results beside --output, which is not given; give it"
    if args.resume and args.overwrite:
        yield "--resume --overwrite: the one keeps what the other throws away; give one of them"


def _layer_problems(args: Any) -> Iterator[str]:
    shown = f"--layers {' '.join(map(str, args.layers))}"
    if any(text.startswith("auto:") for text in args.heads):
        yield f"--heads {' '.join(args.heads)}: auto:K stands alone"
    if args.auto_heads is not None and args.auto_heads < 1:
        yield f"--heads auto:{args.auto_heads}: expected at least 1 head; leave --heads out for none"
    if any(isinstance(index, AutoLayers) for index in args.layers):
        yield f"{shown}: auto:K stands alone"
    elif args.auto_layers is not None and args.auto_layers < 1:
        yield f"--layers auto:{args.auto_layers}: expected at least 1 layer; -1 is for none"
    elif args.auto_layers is not None and args.heads:
        yield (
            f"--layers auto:{args.auto_layers} --heads {','.join(args.heads)}: layers are chosen as if no heads were "
            "kept, maybe those of these heads; give --heads auto:K, or name the --layers"
        )
    elif any(index < 0 for index in args.layers):
        yield f"{shown}: a negative index means no layer and stands alone"
    elif len(set(args.layers)) != len(args.layers):
        yield f"{shown}: expected each index once"


def _teacher_problems(args: Any) -> Iterator[str]:
    if args.layer_map_interval > 0 and not args.has_teacher:
        yield (
            f"--layer_map_interval {args.layer_map_interval} --kl_weight 0: a map compares with the teacher, and "
            "none runs; leave one of them out"
        )
    if args.stage == "align" and args.teacher_device is not None:
        yield (
            f"--teacher_device {args.teacher_device}: with --stage align the teacher is on each student's own device; "
            "leave it out"
        )
    elif args.teacher_placement == "colocated" and args.teacher_device is not None:
        yield (
            f"--teacher_device {args.teacher_device}: a colocated teacher is on each student's own device; "
            "leave it out, or use --teacher_placement dedicated"
        )
    if args.stage == "distil" and args.ce_weight == args.kl_weight == 0:
        yield "--ce_weight 0 --kl_weight 0: the loss is empty; give one of them a weight"


def _training_problems(args: Any) -> Iterator[str]:
    if args.resume is not None and args.resume_step:
        yield (
            f"--resume {args.resume} --resume_step {args.resume_step}: --resume takes its counters from the "
            "checkpoint; leave --resume_step out"
        )
    if args.checkpoint_blocks is not None and not args.gradient_checkpointing:
        yield (
            f"--checkpoint_blocks {args.checkpoint_blocks}: says how many blocks --gradient_checkpointing "
            "recomputes, which is off; give both"
        )
    if args.gradient_bits != 16 and args.gradient_exchange != "owners":
        yield (
            f"--gradient_bits {args.gradient_bits}: an all-reduce sends gradients as they are; add --gradient_exchange "
            "owners, or leave it out"
        )
    if args.min_lr > args.max_lr:
        yield f"--min_lr {args.min_lr}: expected at most --max_lr {args.max_lr}; lower it"
    ratios = (args.warmup_ratio, args.decay_ratio)
    if args.warmup_steps is None and sum(ratios) > 1 >= max(ratios):
        yield f"--warmup_ratio {ratios[0]} --decay_ratio {ratios[1]}: expected parts of the run, together at most 1"
    yield from warmup_problems(args, args.max_steps)
    for name in ("save_interval", "resume_step"):
        if getattr(args, name) % max(args.grad_accumulation_steps, 1):
            yield (
                f"--{name} {getattr(args, name)}: expected a multiple of --grad_accumulation_steps "
                f"{args.grad_accumulation_steps}, so that checkpoints hold whole optimizer steps"
            )


def warmup_problems(args: Any, total_steps: int) -> Iterator[str]:
    """Yields whether --warmup_steps leave no room for the decay in a run of so many optimizer steps. Those of a preset
    may: a short run cuts them (`training_utils.warmup_steps`).
    """
    if args.warmup_steps is None or not 0 <= args.decay_ratio <= 1:
        return
    room = room_for_warmup(args, total_steps)
    if args.warmup_steps > room and args.warmup_steps != preset_values(args.preset, type(args), "train").get(WARMUP):
        yield (
            f"--warmup_steps {args.warmup_steps}: the run has {total_steps} optimizer steps, of which the last "
            f"{total_steps - room} are the decay's (--decay_ratio {args.decay_ratio}); expected at most {room}"
        )


def room_for_warmup(args: Any, total_steps: int) -> int:
    """Returns how many of a run's optimizer steps are not the decay's."""
    return total_steps - round(args.decay_ratio * total_steps)


def _evaluation_problems(args: Any) -> Iterator[str]:
    if args.eval_interval <= 0:
        for name in ("eval_dataset_name", "eval_dataset_subset", "eval_dataset_split", "eval_mmlu_dir"):
            if getattr(args, name) is not None:
                yield (
                    f"--{name} {getattr(args, name)}: is for evaluations during training, and there are none; give "
                    "--eval_interval"
                )
        return
    name, subset, split = args.held_out_text()
    is_trained_on = (name, subset) == (args.dataset_name, args.dataset_subset)
    if is_trained_on and _have_rows_in_common(split, args.dataset_split):
        yield (
            f"--eval_interval {args.eval_interval}: {name!r}, split {split!r}, is trained on; give other text with "
            "--eval_dataset_name FILE, or keep a part of this one from training, as --dataset_split "
            '"train[:99%]" --eval_dataset_split "train[99%:]" does with --no_dataset_streaming'
        )


def _plan_problems(args: Any) -> Iterator[str]:
    for name in ("gpus", "gpu_gb", "link_gb_per_s", "nodes", "plan_json"):
        if not args.dry_run and getattr(args, name) is not None:
            yield f"--{name} {getattr(args, name)}: is for a plan; add --dry_run, or leave it out"


def is_same_name(name: str, other: str) -> bool:
    """Returns whether two names of data sets mean the same one; two ways to write a path do."""
    return Path(name).absolute() == Path(other).absolute()


def _have_rows_in_common(split: str, other: str) -> bool:
    """Returns whether two splits, such as "test" and "train[:99%]+test", share a split that is whole in one of them,
    or the same part of it. This is a first look: text/overlap.py compares the rows, once the data is opened.
    """
    pairs = [(one.strip(), two.strip()) for one in split.split("+") for two in other.split("+")]
    return any(
        ("all" in (one, two) or one.split("[")[0] == two.split("[")[0])
        and (one == two or "[" not in one or "[" not in two)
        for one, two in pairs
    )
