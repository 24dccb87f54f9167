"""Every option of the command lines, once: its name, type, default, group and help, and the checks that need no
file and no model. `parse_train_args` and `parse_eval_args` turn a command line into typed, checked options; settings.py
tells where the values come from. Nothing heavy is imported, so that a mistake is reported at once.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inputs.command_line import auto_or_int, option
from inputs.options import option_values

# What a run that goes on from its checkpoint has to keep: with another value it would be another run.
KEPT_BY_A_RUN = (
    "seed",
    "layers",
    "dtype",
    "freeze_mlp",
    "freeze_replaced_layers",
    "master_weights",
    "dataset_name",
    "dataset_subset",
    "dataset_split",
    "dataset_revision",
    "dataset_text_field",
    "dataset_streaming",
    "seq_length",
)
KEPT_BY_A_STREAM = ("shuffle_buffer", "batch_size")  # besides these
KEPT_BY_A_CACHE = ("skip_bad_rows",)  # a stream that ended at a bad row may go on without it
# What a run may change without a word: where and how it is watched, not what it computes.
FREE_TO_CHANGE = frozenset(
    {
        *("preset", "config", "local_files_only", "student_model", "dataset_cache_dir"),
        *("resume", "resume_step", "time_limit", "teacher_prefetch"),
    }
)
SHARED, PLAN, MODELS, DATA, LOSS, TRAINING, EVALUATION_IN_TRAINING, OUTPUT, EVALUATION, MMLU, BEYOND = (
    "general",
    "plan",
    "models",
    "data",
    "loss",
    "training",
    "evaluation during training",
    "output and logs",
    "evaluation",
    "MMLU",
    "beyond MMLU",
)


@dataclass(kw_only=True)
class CommonArguments:
    """Options of training and of evaluation alike."""

    preset: str = option(SHARED, "folder under presets/ whose values stand in for options not given", "llamba-8b")
    config: str | None = option(
        SHARED, "YAML file of options, as option: value; those of the command line come before it", None
    )
    seed: int = option(SHARED, "seed of all that is drawn: data order, dropout, contexts of the retrieval probe", 0)
    local_files_only: bool = option(SHARED, "use only what is on this disk; touch no network", False)
    teacher_model: str = option(MODELS, "name or directory of the teacher, a Llama-family causal LM")
    student_model: str = option(MODELS, "name or directory of the student: a Llamba, or a checkpoint of a run")
    layers: list[int] = option(
        MODELS, "student layers to replace whole by the teacher's; a negative index means none", nargs="*"
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option(MODELS, "weights and compute")

    def __post_init__(self) -> None:
        if self.layers and max(self.layers) < 0:
            self.layers = []


@dataclass(kw_only=True)
class TrainArguments(CommonArguments):
    """Options of train_gpus.py."""

    teacher_device: str | None = option(
        MODELS, "device of the teacher, e.g. cuda:4 or cpu (default: the last visible GPU)", None
    )
    teacher_signal: Literal["hidden", "logits"] = option(
        MODELS,
        "what the teacher sends: its last hidden states (small), or its logits (large, the original way)",
        "hidden",
    )
    teacher_placement: Literal["dedicated", "colocated"] = option(
        MODELS,
        "one teacher per node on a device of its own, or one beside every student on the student's device",
        "dedicated",
    )
    teacher_prefetch: int | None = option(
        MODELS,
        "batches that a dedicated teacher works ahead of the students (default: 1; 0 where it shares a student's "
        "device)",
        None,
    )
    freeze_mlp: bool = option(MODELS, "do not train the MLPs, those of replaced layers included", False)
    freeze_replaced_layers: bool = option(MODELS, "do not train the layers that come from the teacher", False)
    gradient_checkpointing: bool = option(MODELS, "recompute activations in backward to save memory", False)
    checkpoint_blocks: int | None = option(
        MODELS, "with --gradient_checkpointing: recompute the first N blocks only (default: all)", None
    )
    compile: bool = option(
        MODELS, "compile the student's blocks and the loss with torch.compile; the first step takes minutes", False
    )

    dataset_name: str = option(DATA, "Hugging Face data set, or a local directory or file (jsonl, parquet, txt)")
    dataset_subset: str | None = option(DATA, "configuration of the data set", None)
    dataset_split: str = option(DATA, "split of the data set", "train")
    dataset_revision: str | None = option(DATA, "branch, tag or commit of the data set", None)
    dataset_text_field: str = option(DATA, "column that holds the text", "text")
    dataset_streaming: bool = option(
        DATA, "read as a stream; --no_dataset_streaming tokenises once and caches on disk", True
    )
    dataset_cache_dir: str | None = option(DATA, "where packed tokens are cached (default: datasets' own cache)", None)
    dataset_workers: int = option(DATA, "loader processes per rank for the cached path", 0)
    skip_bad_rows: bool = option(DATA, "leave out rows that cannot be read or are no text, and count them", False)
    shuffle_buffer: int = option(DATA, "rows of the shuffle buffer of a stream; 0 keeps the order", 10_000)
    seq_length: int = option(DATA, "tokens that the models see per window")
    batch_size: int = option(DATA, "windows per rank and micro step")

    ce_weight: float = option(LOSS, "weight of the cross entropy with the text", 1.0)
    kl_weight: float = option(LOSS, "weight of KL(teacher || student); 0 runs no teacher", 0.1)
    temperature: float = option(LOSS, "temperature of the KL", 1.0)
    loss_chunk_tokens: int | None = option(
        LOSS, "tokens whose logits exist at the same time (default: by the memory that is free)", None
    )

    max_steps: int = option(TRAINING, "optimizer steps at most", 100_000)
    epochs: int = option(TRAINING, "passes over the data at most", 1)
    grad_accumulation_steps: int = option(TRAINING, "micro steps per optimizer step", 1)
    max_lr: float = option(TRAINING, "learning rate of the stable phase", 1e-5)
    min_lr: float = option(TRAINING, "learning rate at the end of the decay", 1e-8)
    warmup_ratio: float = option(TRAINING, "part of the steps in which the learning rate rises", 0.01)
    decay_ratio: float = option(TRAINING, "part of the steps, at the end, in which it falls", 0.1)
    weight_decay: float = option(TRAINING, "AdamW's weight decay, on matrices only", 0.1)
    grad_clip: float = option(TRAINING, "largest gradient norm; 0 does not clip", 1.0)
    master_weights: bool = option(
        TRAINING, "AdamW steps on float32 copies of 16-bit weights; without them small updates are lost", True
    )
    max_bad_steps: int = option(
        TRAINING, "updates in a row skipped for a loss or gradient that is not finite, before the run stops", 5
    )
    resume: str | None = option(
        TRAINING, "checkpoint to go on from exactly, or auto: the newest good one in --output_dir, if any", None
    )
    resume_step: int = option(
        TRAINING, "micro step from which counters and schedule go on; weights are --student_model's", 0
    )
    time_limit: float | None = option(
        TRAINING, "minutes after which the run saves and stops, for batch queues (default: none)", None
    )

    eval_interval: int = option(
        EVALUATION_IN_TRAINING, "optimizer steps between evaluations on held-out text; 0 for none", 0
    )
    eval_dataset_name: str | None = option(
        EVALUATION_IN_TRAINING, "held-out text, named as --dataset_name is (default: the data set of training)", None
    )
    eval_dataset_subset: str | None = option(
        EVALUATION_IN_TRAINING, "its configuration (default: that of training, if it is the same data set)", None
    )
    eval_dataset_split: str | None = option(
        EVALUATION_IN_TRAINING, "its split (default: that of training, if it is the same data set; else train)", None
    )
    eval_windows: int = option(EVALUATION_IN_TRAINING, "windows of the held-out text, its first ones", 64)
    eval_mmlu_dir: str | None = option(
        EVALUATION_IN_TRAINING, "also score questions of MMLU from this folder, without examples before them", None
    )
    eval_mmlu_limit: int = option(EVALUATION_IN_TRAINING, "of these, questions per subject at most", 5)

    output_dir: str = option(OUTPUT, "where checkpoints and metrics.jsonl go")
    save_interval: int = option(OUTPUT, "micro steps between checkpoints; 0 saves the first and the last only", 1000)
    save_total_limit: int | None = option(OUTPUT, "newest checkpoints to keep; older ones are deleted", None)
    background_save: bool = option(
        OUTPUT, "write checkpoints while training goes on, from a copy in host memory of what changes", True
    )
    health_interval: int = option(
        OUTPUT, "optimizer steps between reports of the share of weights that moved; 0 for none", 100
    )
    layer_map_interval: int = option(
        OUTPUT, "optimizer steps between maps of how far each layer strays from the teacher's; 0 for none", 0
    )
    log_interval: int = option(OUTPUT, "optimizer steps between log lines", 10)
    log_file: str | None = option(OUTPUT, "also write the log here", None)
    tensorboard: bool = option(OUTPUT, "log to TensorBoard, into the folder tensorboard of --output_dir", False)
    wandb: bool = option(OUTPUT, "log to Weights & Biases", False)
    wandb_project: str = option(OUTPUT, "W&B project", "llamba-distill")
    wandb_run_name: str | None = option(OUTPUT, "W&B run name", None)
    wandb_entity: str | None = option(OUTPUT, "W&B entity", None)
    wandb_mode: Literal["online", "offline", "disabled"] | None = option(
        OUTPUT,
        "online, offline or disabled (default: offline under --local_files_only, else W&B's own)",
        None,
    )

    dry_run: bool = option(
        PLAN, "print what the run would take, and whether it fits; no weight is read, no GPU is needed", False
    )
    gpus: int | None = option(
        PLAN, "GPUs of a node, the teacher's included (default: those that are visible, else 5)", None
    )
    gpu_gb: float | None = option(PLAN, "memory of a GPU in 10^9 bytes (default: the visible ones', else 80)", None)
    tflops: float | None = option(
        PLAN,
        "10^12 operations per second of a GPU in --dtype, by its data sheet; also for the MFU in the log (default: by "
        "the name of the visible ones; a plan without GPUs takes an H100's, 989)",
        None,
    )
    nodes: int | None = option(PLAN, "nodes of this kind (default: torchrun's)", None)
    plan_json: str | None = option(PLAN, "also write the plan's figures to this file", None)

    def problems(self) -> list[str]:
        positive = (
            "seq_length",
            "batch_size",
            "grad_accumulation_steps",
            "max_steps",
            "epochs",
            "log_interval",
            "max_bad_steps",
            "eval_windows",
            "eval_mmlu_limit",
        )
        found = [_too_small(self, name, 1) for name in positive]
        not_negative = (
            "shuffle_buffer",
            "dataset_workers",
            "save_interval",
            "resume_step",
            "health_interval",
            "layer_map_interval",
            "eval_interval",
            "ce_weight",
            "kl_weight",
        )
        found += [_too_small(self, name, 0) for name in not_negative]
        found += [_too_small(self, name, 0) for name in ("max_lr", "min_lr", "weight_decay", "grad_clip")]
        found += _layer_problems(self.layers)
        optional = ("loss_chunk_tokens", "checkpoint_blocks", "save_total_limit")
        found += [_too_small(self, name, 1) for name in optional if getattr(self, name) is not None]
        found += self._plan_problems()
        if self.layer_map_interval > 0 and self.kl_weight == 0:
            found.append(
                f"--layer_map_interval {self.layer_map_interval} --kl_weight 0: a map compares with the teacher, and "
                "none runs; leave one of them out"
            )
        if self.time_limit is not None and not 0 < self.time_limit < math.inf:
            found.append(f"--time_limit {self.time_limit}: expected minutes, more than 0")
        if self.resume is not None and self.resume_step:
            found.append(
                f"--resume {self.resume} --resume_step {self.resume_step}: --resume takes its counters from the "
                "checkpoint; leave --resume_step out"
            )
        if self.teacher_prefetch is not None:
            found.append(_too_small(self, "teacher_prefetch", 0))
        if self.checkpoint_blocks is not None and not self.gradient_checkpointing:
            found.append(
                f"--checkpoint_blocks {self.checkpoint_blocks}: says how many blocks --gradient_checkpointing "
                "recomputes, which is off; give both"
            )
        if self.teacher_placement == "colocated" and self.teacher_device is not None:
            found.append(
                f"--teacher_device {self.teacher_device}: a colocated teacher is on each student's own device; "
                "leave it out, or use --teacher_placement dedicated"
            )
        if not 0 < self.temperature < math.inf:
            found.append(f"--temperature {self.temperature}: expected a number above 0; 1.0 is the usual choice")
        if self.ce_weight == self.kl_weight == 0:
            found.append("--ce_weight 0 --kl_weight 0: the loss is empty; give one of them a weight")
        if self.min_lr > self.max_lr:
            found.append(f"--min_lr {self.min_lr}: expected at most --max_lr {self.max_lr}; lower it")
        ratios = (self.warmup_ratio, self.decay_ratio)
        if not (all(ratio >= 0 for ratio in ratios) and sum(ratios) <= 1):
            found.append(
                f"--warmup_ratio {ratios[0]} --decay_ratio {ratios[1]}: expected parts of the run, "
                "each at least 0 and together at most 1"
            )
        for name in ("save_interval", "resume_step"):
            if getattr(self, name) % max(self.grad_accumulation_steps, 1):
                found.append(
                    f"--{name} {getattr(self, name)}: expected a multiple of --grad_accumulation_steps "
                    f"{self.grad_accumulation_steps}, so that checkpoints hold whole optimizer steps"
                )
        return [problem for problem in [*found, *self._evaluation_problems()] if problem]

    def _plan_problems(self) -> list[str]:
        found = [
            f"--{name} {getattr(self, name)}: expected a number above 0"
            for name in ("gpus", "gpu_gb", "tflops", "nodes")
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf
        ]
        if not self.dry_run:
            found += [
                f"--{name} {getattr(self, name)}: is for a plan; add --dry_run, or leave it out"
                for name in ("gpus", "gpu_gb", "nodes", "plan_json")
                if getattr(self, name) is not None
            ]
        return found

    def held_out_text(self) -> tuple[str, str | None, str]:
        """Name, subset and split of the text that evaluations during training are made on."""
        if self.eval_dataset_name is not None and not _is_same_name(self.eval_dataset_name, self.dataset_name):
            return self.eval_dataset_name, self.eval_dataset_subset, self.eval_dataset_split or "train"
        subset = self.dataset_subset if self.eval_dataset_subset is None else self.eval_dataset_subset
        return self.dataset_name, subset, self.eval_dataset_split or self.dataset_split

    def _evaluation_problems(self) -> list[str]:
        if self.eval_interval <= 0:
            names = ("eval_dataset_name", "eval_dataset_subset", "eval_dataset_split", "eval_mmlu_dir")
            return [
                f"--{name} {getattr(self, name)}: is for evaluations during training, and there are none; give "
                "--eval_interval"
                for name in names
                if getattr(self, name) is not None
            ]
        name, subset, split = self.held_out_text()
        is_trained_on = (name, subset) == (self.dataset_name, self.dataset_subset)
        if is_trained_on and _have_rows_in_common(split, self.dataset_split):
            return [
                f"--eval_interval {self.eval_interval}: {name!r}, split {split!r}, is trained on; give other text with "
                "--eval_dataset_name FILE, or keep a part of this one from training, as --dataset_split "
                '"train[:99%]" --eval_dataset_split "train[99%:]" does with --no_dataset_streaming'
            ]
        return []


@dataclass(kw_only=True)
class EvalArguments(CommonArguments):
    """Options of eval_mmlu_hybrid.py."""

    which: list[Literal["teacher", "student", "hybrid", "hybrid_ft", "all"]] = option(
        EVALUATION,
        "models to score: hybrid is the student with --layers replaced, untrained; hybrid_ft is --ckpt",
        ["teacher"],
        nargs="+",
    )
    ckpt: str | None = option(EVALUATION, "checkpoint directory of a training run", None)
    batch_size: int | None = option(
        EVALUATION, "sequences per forward pass, or auto: as many as fit (default: auto)", None, type=auto_or_int
    )
    max_length: int | None = option(EVALUATION, "tokens of a prompt at most; longer ones lose their start", None)
    output: str | None = option(
        EVALUATION, "JSON file for scores and predictions; a report (.md) and a chart (.png) go beside it", None
    )
    overwrite: bool = option(EVALUATION, "replace --output if it exists, and forget interrupted results", False)
    resume: bool = option(EVALUATION, "go on with what an interrupted evaluation left beside --output", False)
    device: str | None = option(EVALUATION, "device to run on (default: a GPU for each rank, else the CPU)", None)

    mmlu: bool = option(MMLU, "score MMLU; --no_mmlu leaves it out", True)
    mmlu_dir: str | None = option(
        MMLU, "folder of the original release (CSV) or of cais/mmlu (parquet) (default: cais/mmlu by name)", None
    )
    subjects: list[str] | None = option(MMLU, "subjects to score (default: all)", None, nargs="+")
    num_fewshot: int = option(MMLU, "examples before each question, 0 to 5", 5)
    limit: int | None = option(MMLU, "questions per subject, and per task of --tasks, at most", None)

    tasks: list[str] = option(BEYOND, "tasks of lm-evaluation-harness, by name, with commas or spaces", [], nargs="+")
    tasks_num_fewshot: int | None = option(
        BEYOND, "examples before each of their questions (default: the task's)", None
    )
    held_out: str | None = option(
        BEYOND, "text for perplexity, and for KL and agreement with the teacher: named as --dataset_name", None
    )
    held_out_subset: str | None = option(BEYOND, "configuration of that data set", None)
    held_out_split: str = option(BEYOND, "split of that data set", "train")
    held_out_text_field: str = option(BEYOND, "column that holds the text", "text")
    held_out_windows: int = option(BEYOND, "windows of it to read", 64)
    held_out_seq_length: int = option(BEYOND, "tokens per window", 1024)
    retrieval: bool = option(
        BEYOND, "ask for values in a context of key-value pairs, where recurrent models fail", False
    )
    retrieval_lengths: list[int] = option(BEYOND, "tokens of these contexts", [256, 1024, 4096], nargs="+")
    retrieval_pairs: list[int] = option(BEYOND, "pairs in them", [4, 16, 64], nargs="+")
    retrieval_questions: int = option(BEYOND, "questions for each length and number of pairs", 64)
    layers_given: bool = dataclasses.field(default=False)  # --layers stood on the command line, or in --config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tasks = list(dict.fromkeys(name for part in self.tasks for name in part.split(",") if name))
        self.retrieval_lengths = list(dict.fromkeys(self.retrieval_lengths))
        self.retrieval_pairs = list(dict.fromkeys(self.retrieval_pairs))

    def problems(self) -> list[str]:
        found = [
            _too_small(self, name, 1) for name in ("held_out_windows", "held_out_seq_length", "retrieval_questions")
        ]
        optional = ("batch_size", "limit", "max_length")
        found += [_too_small(self, name, 1) for name in optional if getattr(self, name) is not None]
        found += _layer_problems(self.layers)
        if not 0 <= self.num_fewshot <= 5:
            found.append(f"--num_fewshot {self.num_fewshot}: expected 0 to 5, as many as MMLU's dev split has")
        if self.tasks_num_fewshot is not None:
            found.append(_too_small(self, "tasks_num_fewshot", 0))
        if wrong := [length for length in self.retrieval_lengths if length < 2]:
            found.append(f"--retrieval_lengths {wrong[0]}: expected at least 2")
        if wrong := [n for n in self.retrieval_pairs if not 2 <= n <= 900]:
            found.append(f"--retrieval_pairs {wrong[0]}: expected 2 to 900, as many as there are three-digit codes")
        if not (self.mmlu or self.tasks or self.held_out or self.retrieval):
            found.append("--no_mmlu: nothing is left to measure; add --tasks, --held_out or --retrieval")
        if self.resume and self.output is None:
            found.append("--resume: goes on with what stands beside --output, which is not given; give it")
        if self.resume and self.overwrite:
            found.append("--resume --overwrite: the one keeps what the other throws away; give one of them")
        return [problem for problem in found if problem]


def group_of(name: str) -> str:
    """The group that an option of training is listed in."""
    return next(field.metadata["group"] for field in dataclasses.fields(TrainArguments) if field.name == name)


def parse_train_args(argv: list[str] | None = None) -> TrainArguments:
    """The options of a training run. Raises ValueError that lists every problem found."""
    values, _ = option_values(TrainArguments, "train", "Distil a Llama into a hybrid Llamba. Run under torchrun.", argv)
    args = TrainArguments(**values)
    _raise_for(args.problems())
    return args


def parse_eval_args(argv: list[str] | None = None) -> EvalArguments:
    """The options of an evaluation. Raises ValueError that lists every problem found."""
    values, given = option_values(EvalArguments, "eval", "Score teacher, student and hybrids on MMLU and beyond.", argv)
    args = EvalArguments(**values, layers_given="layers" in given)
    _raise_for(args.problems())
    return args


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))


def _is_same_name(name: str, other: str) -> bool:
    """Of data sets: two ways to write a path are one."""
    return Path(name).expanduser().absolute() == Path(other).expanduser().absolute()


def _have_rows_in_common(split: str, other: str) -> bool:
    """Whether two splits, such as "test" and "train[:99%]+test", share one that is whole in either of them, or the same
    part of it. Of different parts of a split it is not known.
    """
    pairs = [(one.strip(), two.strip()) for one in split.split("+") for two in other.split("+")]
    return any(
        ("all" in (one, two) or one.split("[")[0] == two.split("[")[0])
        and (one == two or "[" not in one or "[" not in two)
        for one, two in pairs
    )


def _too_small(args: Any, name: str, least: float) -> str | None:
    value = getattr(args, name)
    return None if least <= value < math.inf else f"--{name} {value}: expected at least {least}"


def _layer_problems(layers: list[int]) -> list[str]:
    if any(index < 0 for index in layers):
        return [f"--layers {' '.join(map(str, layers))}: a negative index means no layer and stands alone"]
    if len(set(layers)) != len(layers):
        return [f"--layers {' '.join(map(str, layers))}: expected each index once"]
    return []
