"""Every option of train_gpus.py and eval_mmlu_hybrid.py: default, help, group, bounds, and whether a resumed run must
keep it. `parse_train_args` and `parse_eval_args` return typed, checked options. Nothing heavy is imported, so that a
mistake is reported at once. list_options.py makes docs/options.md of them.
"""

from dataclasses import dataclass
from typing import Literal

from inputs.bounds import LONGEST_CONTEXT, MOST_LAYERS, MOST_SEED, STEPS
from inputs.groups import BEYOND, DATA, EVALUATION, GENERAL, IN_TRAINING, LOSS, MMLU, MODELS, OUTPUT, PLAN, TRAINING
from inputs.option_checks import eval_problems, is_same_name, train_problems
from inputs.option_values import option_values
from inputs.options import BY_PRESET, option, out_of_bounds, path_option
from inputs.teacher_parts import Heads, head_list, parse_heads, without_auto
from inputs.value_types import AutoLayers, auto_or_int, layer_or_auto


@dataclass(kw_only=True)
class CommonArguments:
    """Holds the options that training and evaluation share."""

    preset: str = option("llamba-8b", "folder under presets/ with the values of options not given", GENERAL, free=True)
    config: str | None = path_option(
        None, "YAML file, option: value; the command line overrides it", GENERAL, free=True
    )
    seed: int = option(
        0, "seed of all random choices: data order, dropout, probes", GENERAL, kept=True, least=0, most=MOST_SEED
    )
    local_files_only: bool = option(False, "use only files on this disk, and no network", GENERAL, free=True)
    teacher_model: str = path_option(
        BY_PRESET, "name or directory of the teacher; Llama, Mistral, Qwen2 or Qwen3 for --layers or alignment", MODELS
    )
    student_model: str = path_option(BY_PRESET, "name or directory of a Llamba, or a checkpoint", MODELS, free=True)
    layers: list[int] = option(
        BY_PRESET,
        "student layers that the teacher's replace, by index; -1 for none; auto:K, alone: K of them, by measurement",
        MODELS,
        nargs="*",
        kept=True,
        most=MOST_LAYERS,
        parse=layer_or_auto,
    )
    heads: list[str] = option(
        [], "heads of the teacher to keep, 13:18,15:11; or auto:K", MODELS, nargs="*", kept=True, parse=head_list
    )
    dtype: Literal["bfloat16", "float16", "float32"] = option(BY_PRESET, "weights and compute", MODELS, kept=True)
    document_separator: str = option(
        "auto",
        "token that ends each document; auto: eos, or, where that ends a turn of a chat, the one of pretraining",
        DATA,
        kept=True,
    )

    auto_layers: int | None = None  # not options: how many layers and heads `auto:K` leaves to be chosen
    auto_heads: int | None = None

    def __post_init__(self) -> None:
        if len(self.layers) == 1 and isinstance(self.layers[0], AutoLayers):
            self.layers, self.auto_layers = [], int(self.layers[0])
        if self.layers and max(self.layers) < 0:
            self.layers = []
        self.heads, self.auto_heads = without_auto(self.heads, self.auto_heads)

    @property
    def kept_heads(self) -> Heads:
        """Returns the heads of each layer that --heads names."""
        return parse_heads(self.heads)

    @property
    def takes_parts(self) -> bool:
        """Returns whether the student has layers or heads of the teacher."""
        return bool(self.layers or self.heads)


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
        None,
        "batches a dedicated teacher runs ahead (default: 1; 0 on a student's device)",
        MODELS,
        least=0,
        free=True,
        most=1000,
    )
    freeze_mlp: bool = option(False, "do not train the MLPs, those of replaced layers included", MODELS, kept=True)
    freeze_replaced_layers: bool = option(False, "do not train layers that come from the teacher", MODELS, kept=True)
    gradient_checkpointing: bool = option(False, "recompute activations in backward to save memory", MODELS)
    checkpoint_blocks: int | None = option(
        None,
        "with --gradient_checkpointing: recompute the first N blocks only (default: all)",
        MODELS,
        least=1,
        most=MOST_LAYERS,
    )
    compile: bool = option(False, "torch.compile the blocks and the loss; the first step takes minutes", MODELS)

    dataset_name: str = path_option(
        BY_PRESET, "Hugging Face data set, or a local directory or file (jsonl, csv, parquet, txt)", DATA, kept=True
    )
    dataset_subset: str | None = option(None, "configuration of the data set", DATA, kept=True)
    dataset_split: str = option("train", "split of the data set", DATA, kept=True)
    dataset_revision: str | None = option(None, "branch, tag or commit of the data set", DATA, kept=True)
    dataset_text_field: str = option("text", "column that holds the text", DATA, kept=True)
    dataset_streaming: bool = option(
        True, "read as a stream; --no_dataset_streaming tokenises once and caches on disk", DATA, kept=True
    )
    dataset_cache_dir: str | None = path_option(
        None, "folder of all cached text (default: datasets' own)", DATA, free=True
    )
    dataset_workers: int = option(0, "loader processes per rank for the cached path", DATA, least=0, most=1000)
    # A stream that stopped at a bad row may be resumed with --skip_bad_rows.
    skip_bad_rows: bool = option(False, "skip and count rows that cannot be read or are no text", DATA, kept="caches")
    shuffle_buffer: int = option(
        10_000, "rows of the shuffle buffer of a stream; 0 keeps the order", DATA, least=0, kept="streams", most=10**9
    )
    seq_length: int = option(
        BY_PRESET, "tokens that the models see per window", DATA, least=1, kept=True, most=LONGEST_CONTEXT
    )
    batch_size: int = option(BY_PRESET, "windows per rank and micro step", DATA, least=1, kept="streams", most=10_000)

    stage: Literal["distil", "align"] = option("distil", "train the student, or align its mixers", LOSS, kept=True)
    ce_weight: float = option(1.0, "weight of the cross entropy with the text", LOSS, least=0, most=10**6)
    kl_weight: float = option(0.1, "weight of KL(teacher || student); 0 runs no teacher", LOSS, least=0, most=10**6)
    temperature: float = option(1.0, "temperature of the KL", LOSS, least=0.001, most=1000)
    loss_chunk_tokens: int | None = option(
        None,
        "tokens whose logits exist at the same time (default: by the memory that is free)",
        LOSS,
        least=1,
        most=10**9,
    )

    max_steps: int = option(100_000, "optimizer steps at most", TRAINING, least=1, most=STEPS)
    epochs: int = option(1, "passes over the data at most", TRAINING, least=1, most=10**9)
    grad_accumulation_steps: int = option(
        1, "micro steps (a batch on each rank) per optimizer step", TRAINING, least=1, most=10**6
    )
    grad_accumulation_dtype: Literal["float32", "weights"] = option(
        "float32", "sum of micro steps' gradients: float32, or as the weights, which saves 4 bytes of each", TRAINING
    )
    gradient_exchange: Literal["allreduce", "owners"] = option(
        "allreduce", "ranks average all gradients (DDP, ZeRO), or send them to the owners of the weights", TRAINING
    )
    gradient_bits: Literal[16, 8, 4] = option(16, "of a gradient on its way to an owner; 8 and 4 round", TRAINING)
    max_lr: float = option(1e-5, "learning rate of the stable phase", TRAINING, least=0, most=1000)
    min_lr: float = option(1e-8, "learning rate at the end of the decay", TRAINING, least=0, most=1000)
    copied_lr_factor: float = option(
        1.0,
        "learning rate of what is outside the mixers, as a part of theirs; 0.1 where it was copied from the teacher",
        TRAINING,
        least=0,
        most=1000,
    )
    warmup_ratio: float = option(
        0.01, "part of the optimizer steps in which the learning rate rises", TRAINING, least=0, most=1
    )
    warmup_steps: int | None = option(
        None, "optimizer steps in which it rises (default: by --warmup_ratio)", TRAINING, least=0, most=STEPS
    )
    decay_ratio: float = option(
        0.1, "part of the optimizer steps, at the end, in which it falls", TRAINING, least=0, most=1
    )
    weight_decay: float = option(0.1, "AdamW's weight decay, on matrices only", TRAINING, least=0, most=1000)
    grad_clip: float = option(1.0, "largest gradient norm; 0 does not clip", TRAINING, least=0, most=10**9)
    master_weights: bool = option(
        True, "AdamW steps on float32 copies of 16-bit weights; else small updates are lost", TRAINING, kept=True
    )
    max_bad_steps: int = option(
        5,
        "skipped optimizer steps in a row (loss or gradient not finite) that stop the run",
        TRAINING,
        least=1,
        most=STEPS,
    )
    resume: str | None = path_option(
        None, "checkpoint to resume from, or auto: the newest good one in --output_dir, if any", TRAINING, free=True
    )
    resume_step: int = option(
        0,
        "micro step to start counters and schedule at; weights are --student_model's",
        TRAINING,
        least=0,
        free=True,
        most=STEPS,
    )
    time_limit: float | None = option(
        None, "minutes until the run saves and stops", TRAINING, above=0, most=10**7, free=True
    )

    eval_interval: int = option(
        0, "optimizer steps between evaluations on held-out text; 0: off", IN_TRAINING, least=0, most=STEPS
    )
    eval_dataset_name: str | None = path_option(
        None, "held-out text, as --dataset_name (default: the same)", IN_TRAINING
    )
    eval_dataset_subset: str | None = option(
        None, "its configuration (default: that of training, if it is the same data set)", IN_TRAINING
    )
    eval_dataset_split: str | None = option(
        None, "its split (default: that of training, if it is the same data set; else train)", IN_TRAINING
    )
    eval_windows: int = option(64, "windows of the held-out text, its first ones", IN_TRAINING, least=1, most=10**7)
    eval_mmlu_dir: str | None = path_option(None, "folder of MMLU, to score its questions too, zero-shot", IN_TRAINING)
    eval_mmlu_limit: int = option(5, "of these, questions per subject at most", IN_TRAINING, least=1, most=10**6)

    output_dir: str = path_option(BY_PRESET, "where checkpoints and metrics.jsonl are written", OUTPUT)
    save_interval: int = option(
        1000, "micro steps between checkpoints; 0 saves the first and the last only", OUTPUT, least=0, most=STEPS
    )
    save_total_limit: int | None = option(
        None, "newest checkpoints to keep; older ones are deleted", OUTPUT, least=1, most=10**6
    )
    background_save: bool = option(True, "write checkpoints while training, from a copy in host memory", OUTPUT)
    health_interval: int = option(
        100, "optimizer steps between counts of weights that moved; 0: off", OUTPUT, least=0, most=STEPS
    )
    layer_map_interval: int = option(
        0,
        "optimizer steps between maps of how far each layer is from the teacher's; 0: off",
        OUTPUT,
        least=0,
        most=STEPS,
    )
    log_interval: int = option(10, "optimizer steps between log lines", OUTPUT, least=1, most=STEPS)
    log_file: str | None = path_option(None, "also write the log to this file", OUTPUT)
    tensorboard: bool = option(False, "log to TensorBoard, into the folder tensorboard of --output_dir", OUTPUT)
    wandb: bool = option(False, "log to Weights & Biases", OUTPUT)
    wandb_project: str = option("llamba-distill", "W&B project", OUTPUT)
    wandb_run_name: str | None = option(None, "W&B run name", OUTPUT)
    wandb_entity: str | None = option(None, "W&B entity", OUTPUT)
    wandb_mode: Literal["online", "offline", "disabled"] | None = option(
        None, "W&B mode (default: offline under --local_files_only, else W&B's own)", OUTPUT
    )

    dry_run: bool = option(False, "print what the run would take and whether it fits; no GPU needed", PLAN)
    gpus: int | None = option(
        None, "GPUs per node, with the teacher's (default: visible ones, else 5)", PLAN, least=1, most=1000
    )
    gpu_gb: float | None = option(
        None, "memory per GPU in 10^9 bytes (default: visible ones', else 80)", PLAN, least=0.001, most=100_000
    )
    tflops: float | None = option(
        None,
        "10^12 operations/s of a GPU in --dtype, for plan and MFU (default: by its name; 989 without GPUs)",
        PLAN,
        least=0.001,
        most=10**6,
    )
    link_gb_per_s: float | None = option(
        None,
        "10^9 bytes/s that a rank receives from others (default: estimated by NCCL's settings; doctor.py measures it)",
        PLAN,
        above=0,
        most=100_000,
    )
    nodes: int | None = option(None, "nodes of this kind (default: torchrun's)", PLAN, least=1, most=100_000)
    plan_json: str | None = path_option(None, "also write the plan's figures to this file", PLAN)

    @property
    def placement(self) -> str:
        """Returns where the teacher is: in an alignment beside each student, whose tensors it shares."""
        return "colocated" if self.stage == "align" else self.teacher_placement

    @property
    def has_teacher(self) -> bool:
        """Returns whether a teacher runs."""
        return self.stage == "align" or self.kl_weight > 0

    def problems(self) -> list[str]:
        """Returns a line for each option, or pair of options, that cannot be used."""
        return [*out_of_bounds(self), *train_problems(self)]

    def held_out_text(self) -> tuple[str, str | None, str]:
        """Returns name, subset and split of the text that evaluations during training read."""
        if self.eval_dataset_name is not None and not is_same_name(self.eval_dataset_name, self.dataset_name):
            return self.eval_dataset_name, self.eval_dataset_subset, self.eval_dataset_split or "train"
        subset = self.dataset_subset if self.eval_dataset_subset is None else self.eval_dataset_subset
        return self.dataset_name, subset, self.eval_dataset_split or self.dataset_split


@dataclass(kw_only=True)
class EvalArguments(CommonArguments):
    """Holds the options of eval_mmlu_hybrid.py."""

    which: list[Literal["teacher", "student", "hybrid", "hybrid_ft", "all"]] = option(
        [],
        "models to score (default: hybrid_ft with --ckpt, else teacher); hybrid: the student with --layers replaced, "
        "untrained; hybrid_ft: --ckpt; all: all four",
        EVALUATION,
    )
    ckpt: str | None = path_option(None, "checkpoint of a training run, to score as hybrid_ft", EVALUATION)
    batch_size: int | None = option(
        None,
        "sequences per forward pass, or auto: as many as fit (default)",
        EVALUATION,
        least=1,
        most=10**6,
        parse=auto_or_int,
    )
    max_length: int | None = option(
        None,
        "tokens of a prompt at most; longer ones lose their start (default: the teacher's context)",
        EVALUATION,
        least=1,
        most=LONGEST_CONTEXT,
    )
    output: str | None = path_option(
        None, "JSON file for scores and predictions; report (.md) and chart (.png) go beside it", EVALUATION
    )
    overwrite: bool = option(False, "replace --output if it exists, and drop interrupted results", EVALUATION)
    resume: bool = option(False, "resume an interrupted evaluation from its results beside --output", EVALUATION)
    device: str | None = option(None, "device to run on (default: a GPU for each rank, else the CPU)", EVALUATION)

    mmlu: bool = option(True, "score MMLU; --no_mmlu leaves it out", MMLU)
    mmlu_dir: str | None = path_option(
        None, "folder of the original release (CSV) or of cais/mmlu (parquet) (default: cais/mmlu by name)", MMLU
    )
    subjects: list[str] | None = option(None, "subjects to score (default: all)", MMLU)
    num_fewshot: int = option(
        5, "examples per question, 0 to 5", MMLU, least=0, most=5, expected="0 to 5, as many as MMLU's dev split has"
    )
    limit: int | None = option(
        None, "questions per subject, and per task of --tasks, at most", MMLU, least=1, most=10**6
    )

    tasks: list[str] = option([], "tasks of lm-evaluation-harness, by name, with commas or spaces", BEYOND)
    tasks_num_fewshot: int | None = option(
        None, "examples before each question (default: the task's)", BEYOND, least=0, most=1000
    )
    held_out: str | None = path_option(
        None, "text for perplexity, and for KL and agreement with the teacher: named as --dataset_name", BEYOND
    )
    held_out_subset: str | None = option(None, "configuration of that data set", BEYOND)
    held_out_split: str = option("train", "split of that data set", BEYOND)
    held_out_text_field: str = option("text", "column that holds the text", BEYOND)
    held_out_windows: int = option(64, "windows of it to read", BEYOND, least=1, most=10**7)
    held_out_seq_length: int = option(1024, "tokens per window", BEYOND, least=1, most=LONGEST_CONTEXT)
    retrieval: bool = option(False, "recall values and copy words from a context: hard for recurrent models", BEYOND)
    retrieval_lengths: list[int] = option(
        [256, 1024, 4096], "tokens of these contexts", BEYOND, least=2, most=LONGEST_CONTEXT
    )
    retrieval_pairs: list[int] = option(
        [4, 16, 64],
        "pairs in them",
        BEYOND,
        least=2,
        most=900,
        expected="2 to 900, as many as there are three-digit codes",
    )
    retrieval_questions: int = option(
        64, "questions for each length and number of pairs", BEYOND, least=1, most=100_000
    )
    given: frozenset[str] = frozenset()  # not an option: names of those that the command line or --config gives

    def __post_init__(self) -> None:
        super().__post_init__()
        self.which = self.which or ["teacher" if self.ckpt is None else "hybrid_ft"]
        self.tasks = list(dict.fromkeys(name for part in self.tasks for name in part.split(",") if name))
        self.retrieval_lengths = list(dict.fromkeys(self.retrieval_lengths))
        self.retrieval_pairs = list(dict.fromkeys(self.retrieval_pairs))

    @property
    def parts_given(self) -> bool:
        """Returns whether the command line or --config gives --layers or --heads."""
        return not self.given.isdisjoint(("layers", "heads"))

    def problems(self) -> list[str]:
        """Returns a line for each option, or pair of options, that cannot be used."""
        return [*out_of_bounds(self), *eval_problems(self)]


def parse_train_args(argv: list[str] | None = None) -> TrainArguments:
    """Returns the options of a training run. Raises ValueError that lists every problem found."""
    values, _ = option_values(TrainArguments, "train", "Distil a Llama into a hybrid Llamba. Run under torchrun.", argv)
    args = TrainArguments(**values)
    _raise_for(args.problems())
    return args


def parse_eval_args(argv: list[str] | None = None) -> EvalArguments:
    """Returns the options of an evaluation. Raises ValueError that lists every problem found."""
    values, given = option_values(EvalArguments, "eval", "Score teacher, student and hybrids on MMLU and beyond.", argv)
    args = EvalArguments(**values, given=frozenset(given))
    _raise_for(args.problems())
    return args


def _raise_for(problems: list[str]) -> None:
    if problems:
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))
