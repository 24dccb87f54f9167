"""Checks options, models, data and outputs of an evaluation before any weights are read, and reports all problems in
one error. `check_inputs` returns what it has read on the way as `CheckedInputs`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from arguments import EvalArguments
from distillation.pairing import check_same_teacher, warn_of_another_tokenizer
from evaluation import mmlu, mmlu_files
from evaluation.held_out import check_not_trained_on_by, read_windows, separator_of_text
from evaluation.lengths import check_max_length, check_memory, check_retrieval
from evaluation.lm_eval_tasks import check_tasks
from evaluation.partial_results import check_partial, is_interrupted
from evaluation.report import output_files
from inputs.context import context_length, stated_length
from inputs.model_files import read_config
from inputs.teacher_parts import Heads, named_parts, pairs_of, parse_heads
from llamba import whole_and_parts
from model_utils import check_replacements, get_tokenizer, locate_model, read_llamba_config
from paths import readable
from processes.devices import choose_device
from processes.ranks import Ranks
from text.encoding import check_tokenizer
from text.sources import TextSource

logger = logging.getLogger("train")

MODEL_NAMES = ("student", "hybrid", "hybrid_ft", "teacher")  # from what training starts with to what it aims at


class ModelSource(NamedTuple):
    """Holds where a model comes from."""

    path: str  # a directory, or a name on the hub
    config: PretrainedConfig
    layers: list[int] | None  # those that are the teacher's; None for the teacher itself
    heads: Heads  # those of the teacher's that other layers keep


@dataclass
class CheckedInputs:
    """Holds what an evaluation works on, read and checked; no weights."""

    sources: dict[str, ModelSource]  # by name: the models to measure, and the teacher
    models: list[str]  # names of those to measure
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    questions: list[mmlu.Question]  # none with --no_mmlu
    windows: Tensor | None  # (n, S + 1) of held-out text
    separator: str | None  # that ends each document in them
    max_length: int
    settings: dict[str, Any]  # what the results depend on


def check_inputs(args: EvalArguments) -> CheckedInputs:
    """Reads everything but weights. Raises one ValueError that lists all problems."""
    problems: list[str] = []

    def attempt(function: Callable, *inputs: Any) -> Any:
        try:
            return function(*inputs)
        except ValueError as error:
            problems.append(str(error))
            return None

    models = [name for name in MODEL_NAMES if name in args.which or "all" in args.which]
    teacher, tokenizer, max_length = attempt(_find_teacher, args) or (None, None, 0)
    trained = attempt(_find_checkpoint, args, tokenizer) if "hybrid_ft" in models else None
    student = attempt(_find_student, args, tokenizer) if {"student", "hybrid"} & set(models) else None
    sources: dict[str, Any] = {"teacher": teacher, "student": student, "hybrid_ft": trained}
    if "hybrid" in models and teacher and student:
        sources["hybrid"] = attempt(_find_hybrid, args, student, teacher, trained)
    questions = (attempt(_read_questions, args) or []) if args.mmlu else []
    windows = separator = None
    if teacher:
        attempt(check_max_length, args, max_length, _limited_readers(models, sources))
        readers = (tokenizer, max_length, teacher.config, trained)
        if args.held_out:
            windows, separator = attempt(_read_held_out, args, *readers) or (None, None)
        if args.retrieval:
            attempt(check_retrieval, args, tokenizer, max_length)
    if args.tasks:
        attempt(check_tasks, args.tasks, args.local_files_only)
    device = attempt(choose_device, args.device)
    attempt(_check_output, args)
    if not problems:
        sources = {name: sources[name] for name in dict.fromkeys(["teacher", *models])}
        settings = settings_of(args, sources, questions, (windows, separator), max_length)
        if args.output is not None:
            attempt(check_partial, Path(args.output), settings, models, args.resume, args.overwrite)
    _log_options_without_effect(args)
    if problems:
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))
    return CheckedInputs(sources, models, device, tokenizer, questions, windows, separator, max_length, settings)


def _log_options_without_effect(args: EvalArguments) -> None:
    for part, switch in {"held_out": "--held_out TEXT", "retrieval": "--retrieval", "tasks": "--tasks NAME"}.items():
        unused = sorted(name for name in args.given if name.startswith(f"{part}_"))
        if unused and not getattr(args, part) and part not in args.given:  # who gives --no_retrieval knows it
            logger.info("--%s: without effect, because %s is not given", " --".join(unused), switch)


def _find_teacher(args: EvalArguments) -> tuple[ModelSource, PreTrainedTokenizerBase, int]:
    """Returns the teacher, and the tokenizer and the maximum length of a prompt (tokens) that all models share."""
    path = locate_model("--teacher_model", args.teacher_model, args.local_files_only)
    config = read_config("--teacher_model", args.teacher_model, path)
    tokenizer = get_tokenizer("--teacher_model", path)
    check_tokenizer(tokenizer, "--teacher_model", config.vocab_size)
    max_length = args.max_length or stated_length(config)
    if max_length is None:
        raise ValueError(
            f"--max_length: not given, and the config of --teacher_model {args.teacher_model} does not say how long "
            "its context is; give it"
        )
    return ModelSource(path, config, None, {}), tokenizer, max_length


def _limited_readers(models: list[str], sources: dict[str, ModelSource | None]) -> dict[str, PretrainedConfig]:
    """Returns the configs of what may have a limited context, by what it is: the teacher and layers of a teacher."""
    readers = {}
    for name in models:
        source = sources.get(name)
        if source is not None and source.layers is None:
            readers["the teacher"] = source.config
        elif name == "hybrid" and (teacher := sources["teacher"]) is not None:
            readers["the hybrid's layers of the teacher"] = teacher.config
        elif source is not None and (source.layers or source.heads):
            readers[f"the layers that {name} has from a teacher"] = source.config.attention_config()
    return readers


def _find_student(args: EvalArguments, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    path = locate_model("--student_model", args.student_model, args.local_files_only)
    config = read_llamba_config("--student_model", args.student_model, path)
    if tokenizer is not None:
        check_tokenizer(tokenizer, "--student_model", config.vocab_size)
        warn_of_another_tokenizer(path, tokenizer)
    return ModelSource(path, config, config.attention_layers, parse_heads(pairs_of(config.attention_heads)))


def _find_checkpoint(args: EvalArguments, tokenizer: PreTrainedTokenizerBase | None) -> ModelSource:
    if args.ckpt is None:
        raise ValueError(
            "--which hybrid_ft: needs --ckpt, a checkpoint directory of a training run; give it, "
            "or leave hybrid_ft (and all) out of --which"
        )
    with readable(f"--ckpt {args.ckpt}", args.ckpt):
        if not Path(args.ckpt).is_dir():
            raise ValueError(f"--ckpt {args.ckpt}: not a directory; expected a checkpoint of a training run")
    # A link such as `latest` may point to another checkpoint by the time the weights are read.
    path = os.path.realpath(locate_model("--ckpt", args.ckpt, local_files_only=True))
    config = read_llamba_config("--ckpt", args.ckpt, path)
    own = config.attention_layers, config.attention_heads
    if args.parts_given and own != whole_and_parts(args.layers, args.kept_heads, config.n_teacher_heads):
        raise ValueError(
            f"{named_parts(args.layers, args.kept_heads)}: --ckpt {args.ckpt} was trained with {named_parts(*own)}; "
            "leave both out, or give the checkpoint that has yours"
        )
    if tokenizer is not None:
        check_tokenizer(tokenizer, "--ckpt", config.vocab_size)
    return ModelSource(path, config, config.attention_layers, parse_heads(pairs_of(config.attention_heads)))


def _find_hybrid(
    args: EvalArguments, student: ModelSource, teacher: ModelSource, trained: ModelSource | None
) -> ModelSource:
    """Returns the student as untrained hybrid, with what the trained one has, so that they differ by training alone."""
    if student.layers or student.heads:
        own = named_parts(student.layers or [], student.heads)
        raise ValueError(
            f"--which hybrid: --student_model {args.student_model} has {own} of a teacher already; give the student "
            "that it was made from, or score it as student or as --ckpt"
        )
    layers, heads = args.layers, args.kept_heads
    if trained is not None and trained.layers is not None:
        check_same_teacher("--which hybrid: --ckpt", trained.config, teacher.config)
        layers, heads = trained.layers, trained.heads
    check_replacements(student.config, teacher.config, layers, heads)
    layers, parts = whole_and_parts(layers, heads, student.config.ssm_cfg["n_v_heads"])  # as its config will have them
    return ModelSource(student.path, student.config, layers, parse_heads(pairs_of(parts)))


def _read_questions(args: EvalArguments) -> list[mmlu.Question]:
    subjects = mmlu_files.load_mmlu(args.mmlu_dir, args.subjects, args.local_files_only)
    return mmlu.build_questions(subjects, args.num_fewshot, args.limit)


def _read_held_out(
    args: EvalArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    teacher: PretrainedConfig,
    trained: ModelSource | None,
) -> tuple[Tensor, str]:
    """Returns the windows (n, S + 1), and the token that ends each document in them."""
    longest = min(max_length, context_length(teacher) or max_length)  # the teacher reads the windows in any case
    if args.held_out_seq_length > longest:
        raise ValueError(
            f"--held_out_seq_length {args.held_out_seq_length}: expected at most {longest}, the "
            "teacher's context or --max_length"
        )
    source = TextSource.for_eval_script(args)
    checkpoint = None if trained is None else Path(trained.path)
    if checkpoint is not None:
        check_not_trained_on_by(checkpoint, source, "--ckpt")
    separator = separator_of_text(args.document_separator, tokenizer, checkpoint)
    windows = read_windows(source, tokenizer, args.held_out_windows, args.held_out_seq_length, separator.token)
    check_memory(args, windows, teacher)
    return windows, separator.token


def _check_output(args: EvalArguments) -> None:
    if args.output is None:
        return
    if Path(args.output).suffix in (".md", ".png") or not Path(args.output).name:
        raise ValueError(
            f"--output {args.output}: expected the name of a JSON file; its report gets .md, its chart .png"
        )
    for path in output_files(Path(args.output)):
        try:
            may_replace = args.overwrite or (args.resume and is_interrupted(Path(args.output)))
            if path.is_dir():
                raise ValueError(f"--output {args.output}: {path} is a directory; expected the name of a JSON file")
            if path.exists() and not may_replace:
                raise ValueError(f"--output {args.output}: {path} exists already; give another name, or --overwrite")
            folder = next(parent for parent in path.absolute().parents if parent.exists())
        except OSError as error:
            raise ValueError(f"--output {args.output}: cannot be written ({error.strerror}); give another") from error
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"--output {args.output}: cannot write below {folder}; give a folder that is yours")


def settings_of(
    args: EvalArguments,
    sources: dict[str, ModelSource],
    questions: list[mmlu.Question],
    held_out: tuple[Tensor | None, str | None],
    max_length: int,
) -> dict[str, Any]:
    """Returns all that the results of a piece depend on: a resumed evaluation has to have the same settings."""
    names = ["dtype"]
    settings: dict[str, Any] = {"--max_length": max_length}
    if args.mmlu:
        names += ["limit", "num_fewshot", "subjects", "mmlu_dir"]
        settings["the questions of MMLU"] = mmlu.fingerprint(questions)
    windows, separator = held_out
    if windows is not None:
        names += [name for name in vars(args) if name.startswith("held_out")]
        settings["--document_separator"] = separator
        settings["the held-out text"] = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    if args.retrieval:
        names += ["seed", "retrieval_questions"]
    if args.tasks:
        names += ["limit", "tasks_num_fewshot"]
    settings |= {f"--{name}": getattr(args, name) for name in names}
    return settings | {name: _identity(source) for name, source in sources.items()}


def _identity(source: ModelSource) -> dict[str, Any]:
    """Returns a model's path and its files' sizes and times: a checkpoint written again counts as another model."""
    # Without heads as earlier versions have it, so that their results can be resumed.
    parts = {"layers": source.layers, **({"heads": pairs_of(source.heads)} if source.heads else {})}
    if not Path(source.path).is_dir():
        return {"path": source.path, **parts}
    stats = [(file.name, file.stat()) for file in sorted(Path(source.path).iterdir()) if file.is_file()]
    files = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return {"path": os.path.realpath(source.path), **parts, "files": files}


def check_unchanged(name: str, inputs: CheckedInputs) -> None:
    """Raises ValueError if a model's files are others than when the evaluation began."""
    if _identity(inputs.sources[name]) != inputs.settings[name]:
        raise ValueError(
            f"the {name}, {inputs.sources[name].path}, was deleted or written anew after this evaluation began; "
            "start it again with a model that stays"
        )


def check_agreement(inputs: CheckedInputs, ranks: Ranks) -> None:
    """Raises ValueError unless all ranks have found the same. Each reads for itself, and nodes may differ."""
    models = {name: [entry[:2] for entry in model.get("files", [])] for name, model in _models(inputs.settings)}
    texts = {name: value for name, value in inputs.settings.items() if not isinstance(value, dict)}
    if not ranks.all_have(json.dumps([models, texts]).encode()):
        raise ValueError("the ranks have not found the same models, questions and options; give all of them the same")


def _models(settings: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, value) for name, value in settings.items() if isinstance(value, dict)]
