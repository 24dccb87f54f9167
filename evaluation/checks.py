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
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from arguments import EvalArguments
from evaluation import mmlu, mmlu_files
from evaluation.held_out import check_not_trained_on_by, read_windows, separator_of_text
from evaluation.lengths import check_max_length, check_memory, check_retrieval
from evaluation.lm_eval_tasks import check_tasks
from evaluation.partial_results import check_partial, is_interrupted
from evaluation.report import output_files
from evaluation.sources import (
    ModelSource,
    find_checkpoint,
    find_hybrid,
    find_student,
    find_teacher,
    identity,
    limited_readers,
)
from inputs.context import context_length
from processes.devices import choose_device
from processes.ranks import Ranks
from text.sources import TextSource

logger = logging.getLogger("train")

MODEL_NAMES = ("student", "hybrid", "hybrid_ft", "teacher")  # from what training starts with to what it aims at


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
    teacher, tokenizer, max_length = attempt(find_teacher, args) or (None, None, 0)
    trained = attempt(find_checkpoint, args, tokenizer) if "hybrid_ft" in models else None
    student = attempt(find_student, args, tokenizer) if {"student", "hybrid"} & set(models) else None
    sources: dict[str, Any] = {"teacher": teacher, "student": student, "hybrid_ft": trained}
    if "hybrid" in models and teacher and student:
        sources["hybrid"] = attempt(find_hybrid, args, student, teacher, trained)
    questions = (attempt(_read_questions, args) or []) if args.mmlu else []
    windows = separator = None
    if teacher:
        attempt(check_max_length, args, max_length, limited_readers(models, sources))
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
    return settings | {name: identity(source) for name, source in sources.items()}


def check_unchanged(name: str, inputs: CheckedInputs) -> None:
    """Raises ValueError if a model's files are others than when the evaluation began."""
    if identity(inputs.sources[name]) != inputs.settings[name]:
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
