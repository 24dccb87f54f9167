"""What an evaluation checks before it reads any weights: options, models, data and outputs, all problems in one error.
What is left of them is the `Plan`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

import mmlu
from arguments import EvalArguments
from held_out import TextSource, read_windows
from llamba import LlambaConfig
from lm_eval_tasks import check_tasks
from model_files import read_config
from model_utils import check_replacements, get_tokenizer, locate_model
from partial_results import check_partial
from ranks import choose_device

MODELS = ("student", "hybrid", "hybrid_ft", "teacher")  # from what training starts with to what it aims at
HELD_OUT_FLAGS = {
    "--dataset_name": "--held_out",
    "--dataset_subset": "--held_out_subset",
    "--dataset_split": "--held_out_split",
    "--dataset_text_field": "--held_out_text_field",
}


@dataclass
class Plan:
    """What the checks have found: from here on, the options can cause no other error."""

    models: list[str]
    paths: dict[str, str]  # where --teacher_model, --student_model and --ckpt are on this machine, or the hub
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    questions: list[mmlu.Question]  # none with --no_mmlu
    windows: Tensor | None  # (n, S + 1) of held-out text
    max_length: int
    settings: dict[str, Any]  # what the results depend on


def check(args: EvalArguments) -> Plan:
    """Reads everything but weights. Raises one ValueError that lists all problems."""
    problems: list[str] = []

    def attempt(function: Callable, *inputs: Any) -> Any:
        try:
            return function(*inputs)
        except ValueError as error:
            problems.append(str(error))
            return None

    models = [name for name in MODELS if name in args.which or "all" in args.which]
    # The teacher is there for its tokenizer and its context length even where it is not scored.
    teacher, tokenizer, teacher_path = attempt(_find_teacher, args) or (None, None, "")
    paths = {"teacher": teacher_path}
    if "student" in models or "hybrid" in models:
        paths["student"] = attempt(_find_student, args, teacher if "hybrid" in models else None)
    if "hybrid_ft" in models:
        paths["ckpt"] = attempt(_find_checkpoint, args)
    questions = (attempt(_read_questions, args) or []) if args.mmlu else []
    windows = attempt(_read_held_out, args, tokenizer) if args.held_out and tokenizer else None
    if args.tasks:
        attempt(check_tasks, args.tasks)
    device = attempt(choose_device, args.device)
    attempt(_check_output, args)
    if not problems:
        assert teacher is not None
        max_length = args.max_length or teacher.max_position_embeddings
        settings = settings_of(args, models, paths, questions, max_length)
        if args.output is not None:
            attempt(check_partial, Path(args.output), settings, args.resume, args.overwrite)
    if problems:
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))
    return Plan(models, paths, device, tokenizer, questions, windows, max_length, settings)


def _find_teacher(args: EvalArguments) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, str]:
    path = locate_model("--teacher_model", args.teacher_model, args.local_files_only)
    config = read_config("--teacher_model", args.teacher_model, path)
    return config, get_tokenizer("--teacher_model", path), path


def _find_student(args: EvalArguments, lender: PretrainedConfig | None) -> str:
    """Its path; if there is a lender of layers, after a look that --layers of it fit."""
    path = locate_model("--student_model", args.student_model, args.local_files_only)
    student = _read_llamba_config("--student_model", args.student_model, path)
    if lender is not None and student.attention_layers:
        raise ValueError(
            f"--which hybrid: --student_model {args.student_model} has layers {student.attention_layers} of a "
            "teacher already; give the student that it was made from, or score it as student or as --ckpt"
        )
    if lender is not None:
        check_replacements(student, lender, args.layers)
    return path


def _find_checkpoint(args: EvalArguments) -> str:
    if args.ckpt is None:
        raise ValueError(
            "--which hybrid_ft: needs --ckpt, a checkpoint directory of a training run; give it, "
            "or leave hybrid_ft (and all) out of --which"
        )
    if not Path(args.ckpt).is_dir():
        raise ValueError(f"--ckpt {args.ckpt}: not a directory; expected a checkpoint of a training run")
    path = locate_model("--ckpt", args.ckpt, local_files_only=True)
    layers = _read_llamba_config("--ckpt", args.ckpt, path).attention_layers
    if args.layers_given and sorted(args.layers) != layers:
        raise ValueError(
            f"--layers {' '.join(map(str, args.layers)) or '-1'}: --ckpt {args.ckpt} was trained with layers "
            f"{layers}; leave --layers out, or give the checkpoint that has yours"
        )
    return path


def _read_llamba_config(flag: str, name: str, path: str) -> LlambaConfig:
    config = read_config(flag, name, path)
    if not isinstance(config, LlambaConfig):
        raise ValueError(
            f"{flag} {name}: its config.json says model_type {config.model_type!r}; expected 'llamba', "
            "a Llamba or a checkpoint of a training run"
        )
    return config


def _read_questions(args: EvalArguments) -> list[mmlu.Question]:
    subjects = mmlu.load_mmlu(args.mmlu_dir, args.subjects, args.local_files_only)
    return mmlu.build_questions(subjects, args.num_fewshot, args.limit)


def _read_held_out(args: EvalArguments, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    assert args.held_out is not None
    source = TextSource(
        name=args.held_out,
        subset=args.held_out_subset,
        split=args.held_out_split,
        text_field=args.held_out_text_field,
        local_files_only=args.local_files_only,
        flags=HELD_OUT_FLAGS,
    )
    return read_windows(source, tokenizer, args.held_out_windows, args.held_out_seq_length)


def _check_output(args: EvalArguments) -> None:
    for path in output_files(args):
        if path.is_dir():
            raise ValueError(f"--output {args.output}: {path} is a directory; expected the name of a JSON file")
        if path.exists() and not args.overwrite:
            raise ValueError(f"--output {args.output}: {path} exists already; give another name, or --overwrite")
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(f"--output {args.output}: cannot write below {folder}; give a folder that is yours")


def output_files(args: EvalArguments) -> list[Path]:
    """Results, report and chart; none without --output."""
    if args.output is None:
        return []
    path = Path(args.output)
    return [path, path.with_suffix(".md"), path.with_suffix(".png")]


def settings_of(
    args: EvalArguments, models: list[str], paths: dict[str, str], questions: list[mmlu.Question], max_length: int
) -> dict[str, Any]:
    """What another evaluation would need to have in common with this one for its pieces to stand in for this one's."""
    names = ("dtype", "seed", "limit", "tasks_num_fewshot", "retrieval_questions")
    held_out = ("held_out", "held_out_subset", "held_out_split", "held_out_text_field")
    sizes = ("held_out_windows", "held_out_seq_length")
    settings = {f"--{name}": getattr(args, name) for name in (*names, *(held_out + sizes if args.held_out else ()))}
    settings |= {"--max_length": max_length, "questions": mmlu.fingerprint(questions)}
    places = {"hybrid_ft": "ckpt", "hybrid": "student"}
    for name in dict.fromkeys(["teacher", *models]):
        settings[name] = _identity(paths[places.get(name, name)])
    if "hybrid" in models:
        settings["--layers"] = args.layers
    return settings


def _identity(path: str) -> dict[str, Any]:
    """Where a model is, and the sizes and times of its files: a checkpoint that was written anew is another model."""
    if not Path(path).is_dir():
        return {"path": path}
    files = sorted(file for file in Path(path).iterdir() if file.is_file())
    return {
        "path": os.path.realpath(path),
        "files": [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files],
    }
