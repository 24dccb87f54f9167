"""Every option of train_gpus.py and eval_mmlu_hybrid.py: default, help, group, bounds, and whether a resumed run must
keep it; and the checks that need no file and no model. `parse_train_args` and `parse_eval_args` return typed, checked
options. Nothing heavy is imported, so that a mistake is reported at once.

    python arguments.py > docs/options.md
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inputs.options import BY_PRESET, auto_or_int, option, option_values, options_of, out_of_bounds

# Groups, as --help and docs/options.md list them.
GENERAL = "general"
PLAN = "plan"
MODELS = "models"
DATA = "data"
LOSS = "loss"
TRAINING = "training"
IN_TRAINING = "evaluation during training"
OUTPUT = "output and logs"
EVALUATION = "evaluation"
MMLU = "MMLU"
BEYOND = "beyond MMLU"


@dataclass(kw_only=True)
class CommonArguments:
    """Holds the options that training and evaluation share."""

    preset: str = option("llamba-8b", "folder under presets/ with the values of options not given", GENERAL, free=True)
    config: str | None = option(None, "YAML file, option: value; the command line overrides it", GENERAL, free=True)
    seed: int = option(0, "seed of all random choices: data order, dropout, retrieval probe", GENERAL, kept=True)
    local_files_only: bool = option(False, "use only files on this disk, and no network", GENERAL, free=True)
    teacher_model: str = option(BY_PRESET, "name or directory of the teacher, a Llama-family causal LM", MODELS)
    student_model: str = option(BY_PRESET, "name or directory of a Llamba, or a run's checkpoint", MODELS, free=True)
    layers: list[int] = option(
        BY_PRESET, "student layers that the teacher's replace, by index; -1 for none", MODELS, nargs="*", kept=True
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option(BY_PRESET, "weights and compute", MODELS, kept=True)

    def __post_init__(self) -> None:
        if self.layers and max(self.layers) < 0:
            self.layers = []


@dataclass(kw_only=True)
class TrainArguments(CommonArguments):
    """Holds the options of train_gpus.py."""

    teacher_device: str | None = option(None, "device, e.g. cuda:4 or cpu (default: the last visible GPU)", MODELS)
    teacher_signal: Literal["hidden", "logits"] = option(
        "hidden", "what the teacher sends: last hidden states (small), or logits (large, the original way)", MODELS
    )
    teacher_placement: Literal["dedicated", "colocated"] = option(
        "dedicated", "one teacher per node on its own device, or one beside every student on its device", MODELS
    )
    teacher_prefetch: int | None = option(
        None, "batches a dedicated teacher runs ahead (default: 1; 0 on a student's device)", MODELS, least=0, free=True
    )
    freeze_mlp: bool = option(False, "do not train the MLPs, those of replaced layers included", MODELS, kept=True)
    freeze_replaced_layers: bool = option(False, "do not train layers that come from the teacher", MODELS, kept=True)
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory", MODELS)
    checkpoint_blocks: int | None = option(
        None, "with --gradient_checkpointing: recompute the first N blocks only (default: all)", MODELS, least=1
    )
    compile: bool = option(False, "torch.compile the blocks and the loss; the first step takes minutes", MODELS)

    dataset_name: str = option(
        BY_PRESET, "Hugging Face data set, or a local directory or file (jsonl, csv, parquet, txt)", DATA, kept=True
    )
    dataset_subset: str | None = option(None, "configuration of the data set", DATA, kept=True)
    dataset_split: str = option("train", "split of the data set", DATA, kept=True)
    dataset_revision: str | None = option(None, "branch, tag or commit of the data set", DATA, kept=True)
    dataset_text_field: str = option("text", "column that holds the text", DATA, kept=True)
    dataset_streaming: bool = option(
        True, "read as a stream; --no_dataset_streaming tokenises once and caches on disk", DATA, kept=True
    )
    dataset_cache_dir: str | None = option(None, "cache of packed tokens (default: datasets' own)", DATA, free=True)
    dataset_workers: int = option(0, "loader processes per rank for the cached path", DATA, least=0)
    # A stream that stopped at a bad row may be resumed with --skip_bad_rows.
    skip_bad_rows: bool = option(False, "skip and count rows that cannot be read or are no text", DATA, kept="caches")
    shuffle_buffer: int = option(
        10_000, "rows of the shuffle buffer of a stream; 0 keeps the order", DATA, least=0, kept="streams"
    )
    seq_length: int = option(BY_PRESET, "tokens that the models see per window", DATA, least=1, kept=True)
    batch_size: int = option(BY_PRESET, "windows per rank and micro step", DATA, least=1, kept="streams")

    ce_weight: float = option(1.0, "weight of the cross entropy with the text", LOSS, least=0)
    kl_weight: float = option(0.1, "weight of KL(teacher || student); 0 runs no teacher", LOSS, least=0)
    temperature: float = option(
        1.0, "temperature of the KL", LOSS, above=0, expected="a number above 0; 1.0 is the usual choice"
    )
    loss_chunk_tokens: int | None = option(
        None, "tokens whose logits exist at the same time (default: by the memory that is free)", LOSS, least=1
    )

    max_steps: int = option(100_000, "optimizer steps at most", TRAINING, least=1)
    epochs: int = option(1, "passes over the data at most", TRAINING, least=1)
    grad_accumulation_steps: int = option(1, "micro steps (a batch on each rank) per optimizer step", TRAINING, least=1)
    max_lr: float = option(1e-5, "learning rate of the stable phase", TRAINING, least=0)
    min_lr: float = option(1e-8, "learning rate at the end of the decay", TRAINING, least=0)
    warmup_ratio: float = option(0.01, "part of the optimizer steps in which the learning rate rises", TRAINING)
    decay_ratio: float = option(0.1, "part of the optimizer steps, at the end, in which it falls", TRAINING)
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only", TRAINING, least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip", TRAINING, least=0)
    master_weights: bool = option(
        True, "AdamW steps on float32 copies of 16-bit weights; else small updates are lost", TRAINING, kept=True
    )
    max_bad_steps: int = option(
        5, "skipped optimizer steps in a row (loss or gradient not finite) that stop the run", TRAINING, least=1
    )
    resume: str | None = option(
        None, "checkpoint to resume from, or auto: the newest good one in --output_dir, if any", TRAINING, free=True
    )
    resume_step: int = option(
        0, "micro step to start counters and schedule at; weights are --student_model's", TRAINING, least=0, free=True
    )
    time_limit: float | None = option(
        None, "minutes until the run saves and stops", TRAINING, above=0, expected="minutes, more than 0", free=True
    )

    eval_interval: int = option(0, "optimizer steps between evaluations on held-out text; 0: off", IN_TRAINING, least=0)
    eval_dataset_name: str | None = option(None, "held-out text, as --dataset_name (default: the same)", IN_TRAINING)
    eval_dataset_subset: str | None = option(
        None, "its configuration (default: that of training, if it is the same data set)", IN_TRAINING
    )
    eval_dataset_split: str | None = option(
        None, "its split (default: that of training, if it is the same data set; else train)", IN_TRAINING
    )
    eval_windows: int = option(64, "windows of the held-out text, its first ones", IN_TRAINING, least=1)
    eval_mmlu_dir: str | None = option(None, "folder of MMLU, to score its questions too, zero-shot", IN_TRAINING)
    eval_mmlu_limit: int = option(5, "of these, questions per subject at most", IN_TRAINING, least=1)

    output_dir: str = option(BY_PRESET, "where checkpoints and metrics.jsonl are written", OUTPUT)
    save_interval: int = option(
        1000, "micro steps between checkpoints; 0 saves the first and the last only", OUTPUT, least=0
    )
    save_total_limit: int | None = option(None, "newest checkpoints to keep; older ones are deleted", OUTPUT, least=1)
    background_save: bool = option(True, "write checkpoints while training, from a copy in host memory", OUTPUT)
    health_interval: int = option(100, "optimizer steps between counts of weights that moved; 0: off", OUTPUT, least=0)
    layer_map_interval: int = option(
        0, "optimizer steps between maps of how far each layer is from the teacher's; 0: off", OUTPUT, least=0
    )
    log_interval: int = option(10, "optimizer steps between log lines", OUTPUT, least=1)
    log_file: str | None = option(None, "also write the log to this file", OUTPUT)
    tensorboard: bool = option(False, "log to TensorBoard, into the folder tensorboard of --output_dir", OUTPUT)
    wandb: bool = option(False, "log to Weights & Biases", OUTPUT)
    wandb_project: str = option("llamba-distill", "W&B project", OUTPUT)
    wandb_run_name: str | None = option(None, "W&B run name", OUTPUT)
    wandb_entity: str | None = option(None, "W&B entity", OUTPUT)
    wandb_mode: Literal["online", "offline", "disabled"] | None = option(
        None, "W&B mode (default: offline under --local_files_only, else W&B's own)", OUTPUT
    )

    dry_run: bool = option(False, "print what the run would take and whether it fits; no GPU needed", PLAN)
    gpus: int | None = option(None, "GPUs per node, with the teacher's (default: visible ones, else 5)", PLAN, above=0)
    gpu_gb: float | None = option(None, "memory per GPU in 10^9 bytes (default: visible ones', else 80)", PLAN, above=0)
    tflops: float | None = option(
        None,
        "10^12 operations/s of a GPU in --dtype, for plan and MFU (default: by its name; 989 without GPUs)",
        PLAN,
        above=0,
    )
    nodes: int | None = option(None, "nodes of this kind (default: torchrun's)", PLAN, above=0)
    plan_json: str | None = option(None, "also write the plan's figures to this file", PLAN)

    def problems(self) -> list[str]:
        """Returns a line for each option, or pair of options, that cannot be used."""
        checks = (_layer_problems, _teacher_problems, _training_problems, _evaluation_problems, _plan_problems)
        return [*out_of_bounds(self), *(problem for check in checks for problem in check(self))]

    def held_out_text(self) -> tuple[str, str | None, str]:
        """Returns name, subset and split of the text that evaluations during training read."""
        if self.eval_dataset_name is not None and not _is_same_name(self.eval_dataset_name, self.dataset_name):
            return self.eval_dataset_name, self.eval_dataset_subset, self.eval_dataset_split or "train"
        subset = self.dataset_subset if self.eval_dataset_subset is None else self.eval_dataset_subset
        return self.dataset_name, subset, self.eval_dataset_split or self.dataset_split


@dataclass(kw_only=True)
class EvalArguments(CommonArguments):
    """Holds the options of eval_mmlu_hybrid.py."""

    which: list[Literal["teacher", "student", "hybrid", "hybrid_ft", "all"]] = option(
        ["teacher"],
        "models to score; hybrid: the student with --layers replaced, untrained; hybrid_ft: --ckpt; all: all four",
        EVALUATION,
    )
    ckpt: str | None = option(None, "checkpoint of a training run", EVALUATION)
    batch_size: int | None = option(
        None, "sequences per forward pass, or auto: as many as fit (default)", EVALUATION, least=1, parse=auto_or_int
    )
    max_length: int | None = option(
        None,
        "tokens of a prompt at most; longer ones lose their start (default: the teacher's context)",
        EVALUATION,
        least=1,
    )
    output: str | None = option(
        None, "JSON file for scores and predictions; report (.md) and chart (.png) go beside it", EVALUATION
    )
    overwrite: bool = option(False, "replace --output if it exists, and drop interrupted results", EVALUATION)
    resume: bool = option(False, "resume an interrupted evaluation from its results beside --output", EVALUATION)
    device: str | None = option(None, "device to run on (default: a GPU for each rank, else the CPU)", EVALUATION)

    mmlu: bool = option(True, "score MMLU; --no_mmlu leaves it out", MMLU)
    mmlu_dir: str | None = option(
        None, "folder of the original release (CSV) or of cais/mmlu (parquet) (default: cais/mmlu by name)", MMLU
    )
    subjects: list[str] | None = option(None, "subjects to score (default: all)", MMLU)
    num_fewshot: int = option(
        5, "examples per question, 0 to 5", MMLU, least=0, most=5, expected="0 to 5, as many as MMLU's dev split has"
    )
    limit: int | None = option(None, "questions per subject, and per task of --tasks, at most", MMLU, least=1)

    tasks: list[str] = option([], "tasks of lm-evaluation-harness, by name, with commas or spaces", BEYOND)
    tasks_num_fewshot: int | None = option(None, "examples before each question (default: the task's)", BEYOND, least=0)
    held_out: str | None = option(
        None, "text for perplexity, and for KL and agreement with the teacher: named as --dataset_name", BEYOND
    )
    held_out_subset: str | None = option(None, "configuration of that data set", BEYOND)
    held_out_split: str = option("train", "split of that data set", BEYOND)
    held_out_text_field: str = option("text", "column that holds the text", BEYOND)
    held_out_windows: int = option(64, "windows of it to read", BEYOND, least=1)
    held_out_seq_length: int = option(1024, "tokens per window", BEYOND, least=1)
    retrieval: bool = option(False, "ask for values in a context of key-value pairs; hard for recurrent models", BEYOND)
    retrieval_lengths: list[int] = option([256, 1024, 4096], "tokens of these contexts", BEYOND, least=2)
    retrieval_pairs: list[int] = option(
        [4, 16, 64],
        "pairs in them",
        BEYOND,
        least=2,
        most=900,
        expected="2 to 900, as many as there are three-digit codes",
    )
    retrieval_questions: int = option(64, "questions for each length and number of pairs", BEYOND, least=1)
    layers_given: bool = False  # not an option: whether the command line or --config gives --layers

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = list(dict.fromkeys(name for part in self.tasks for name in part.split(",") if name))
        self.retrieval_lengths = list(dict.fromkeys(self.retrieval_lengths))
        self.retrieval_pairs = list(dict.fromkeys(self.retrieval_pairs))

    def problems(self) -> list[str]:
        """Returns a line for each option, or pair of options, that cannot be used."""
        found = [*out_of_bounds(self), *_layer_problems(self)]
        if not (self.mmlu or self.tasks or self.held_out or self.retrieval):
            found.append("--no_mmlu: nothing is left to measure; add --tasks, --held_out or --retrieval")
        if self.resume and self.output is None:
            found.append("--resume: resumes from the results beside --output, which is not given; give it")
        if self.resume and self.overwrite:
            found.append("--resume --overwrite: the one keeps what the other throws away; give one of them")
        return found


def parse_train_args(argv: list[str] | None = None) -> TrainArguments:
    """Returns the options of a training run. Raises ValueError that lists every problem found."""
    values, _ = option_values(TrainArguments, "train", "Distil a Llama into a hybrid Llamba. Run under torchrun.", argv)
    args = TrainArguments(**values)
    _raise_for(args.problems())
    return args


def parse_eval_args(argv: list[str] | None = None) -> EvalArguments:
    """Returns the options of an evaluation. Raises ValueError that lists every problem found."""
    values, given = option_values(EvalArguments, "eval", "Score teacher, student and hybrids on MMLU and beyond.", argv)
    args = EvalArguments(**values, layers_given="layers" in given)
    _raise_for(args.problems())
    return args


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))


# --- resuming ------------------------------------------------------------------------------------------------


def kept_options(args: TrainArguments) -> set[str]:
    """Returns the options that a resumed run must keep: another value would make it another run."""
    cases = (True, "streams" if args.dataset_streaming else "caches")
    return {name for name, about in options_of(args).items() if about.kept in cases}


def free_options() -> set[str]:
    """Returns the options that a resumed run may change and that need no warning: they change where it runs and how it
    is watched, not what it computes.
    """
    return {name for name, about in options_of(TrainArguments).items() if about.free or about.group in (OUTPUT, PLAN)}


# --- checks of options against each other --------------------------------------------------------------------


def _layer_problems(args: CommonArguments) -> Iterator[str]:
    shown = f"--layers {' '.join(map(str, args.layers))}"
    if any(index < 0 for index in args.layers):
        yield f"{shown}: a negative index means no layer and stands alone"
    elif len(set(args.layers)) != len(args.layers):
        yield f"{shown}: expected each index once"


def _teacher_problems(args: TrainArguments) -> Iterator[str]:
    if args.layer_map_interval > 0 and args.kl_weight == 0:
        yield (
            f"--layer_map_interval {args.layer_map_interval} --kl_weight 0: a map compares with the teacher, and "
            "none runs; leave one of them out"
        )
    if args.teacher_placement == "colocated" and args.teacher_device is not None:
        yield (
            f"--teacher_device {args.teacher_device}: a colocated teacher is on each student's own device; "
            "leave it out, or use --teacher_placement dedicated"
        )
    if args.ce_weight == args.kl_weight == 0:
        yield "--ce_weight 0 --kl_weight 0: the loss is empty; give one of them a weight"


def _training_problems(args: TrainArguments) -> Iterator[str]:
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
    if args.min_lr > args.max_lr:
        yield f"--min_lr {args.min_lr}: expected at most --max_lr {args.max_lr}; lower it"
    ratios = (args.warmup_ratio, args.decay_ratio)
    if not (all(ratio >= 0 for ratio in ratios) and sum(ratios) <= 1):
        yield (
            f"--warmup_ratio {ratios[0]} --decay_ratio {ratios[1]}: expected parts of the run, "
            "each at least 0 and together at most 1"
        )
    for name in ("save_interval", "resume_step"):
        if getattr(args, name) % max(args.grad_accumulation_steps, 1):
            yield (
                f"--{name} {getattr(args, name)}: expected a multiple of --grad_accumulation_steps "
                f"{args.grad_accumulation_steps}, so that checkpoints hold whole optimizer steps"
            )


def _evaluation_problems(args: TrainArguments) -> Iterator[str]:
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


def _plan_problems(args: TrainArguments) -> Iterator[str]:
    for name in ("gpus", "gpu_gb", "nodes", "plan_json"):
        if not args.dry_run and getattr(args, name) is not None:
            yield f"--{name} {getattr(args, name)}: is for a plan; add --dry_run, or leave it out"


def _is_same_name(name: str, other: str) -> bool:
    """Returns whether two names of data sets mean the same one; two ways to write a path do."""
    return Path(name).expanduser().absolute() == Path(other).expanduser().absolute()


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


if __name__ == "__main__":
    from inputs.options_page import options_page

    entries = {"train_gpus.py": (TrainArguments, "train"), "eval_mmlu_hybrid.py": (EvalArguments, "eval")}
    print(options_page(entries, free_options()), end="")
