"""Loads the models of an evaluation, and records where each one comes from."""

import platform
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel

from arguments import EvalArguments
from evaluation import mmlu, mmlu_files
from evaluation.checks import CheckedInputs, check_unchanged
from inputs.teacher_parts import pairs_of
from model_utils import DTYPES, apply_replacements, get_student_model, get_teacher_model


def load_model(name: str, args: EvalArguments, inputs: CheckedInputs) -> PreTrainedModel:
    """Loads one of `teacher`, `student`, `hybrid` and `hybrid_ft`, in eval mode. Raises ValueError if the files
    have changed since they were checked.
    """
    dtype, source = DTYPES[args.dtype], inputs.sources[name]
    for needed in ("teacher", name) if name == "hybrid" else (name,):
        check_unchanged(needed, inputs)
    if name == "teacher":
        return get_teacher_model(source.path, dtype, inputs.device)
    flag = "--ckpt" if name == "hybrid_ft" else "--student_model"
    student = get_student_model(source.path, dtype, inputs.device, flag)
    if name == "hybrid":
        assert source.layers is not None
        # The teacher is loaded into main memory, so that the device has to hold the student alone.
        teacher = get_teacher_model(inputs.sources["teacher"].path, dtype, torch.device("cpu"), with_head=False)
        apply_replacements(student, teacher, source.layers, source.heads)
    return student.eval()


def provenance(name: str, args: EvalArguments, inputs: CheckedInputs) -> dict[str, Any]:
    """Returns what it takes to reproduce a model's results: sources, options, versions of packages."""
    packages = ["torch", "transformers", "datasets", *(["lm_eval"] if args.tasks else [])]
    config = {
        "which": name,
        "teacher_model": args.teacher_model,
        "student_model": args.student_model if name in ("student", "hybrid") else None,
        "ckpt": inputs.sources[name].path if name == "hybrid_ft" else None,
        "layers": inputs.sources[name].layers,
        "heads": pairs_of(inputs.sources[name].heads),
        "max_length": inputs.max_length,
        "batch_size": args.batch_size or "auto",
        "dtype": args.dtype,
        "device": str(inputs.device),
        "versions": {"python": platform.python_version(), **{package: version(package) for package in packages}},
        "limit": args.limit,
    }
    if args.mmlu:
        config |= {
            "mmlu_dir": args.mmlu_dir or mmlu_files.HUB_NAME,
            "num_fewshot": args.num_fewshot,
            "prompt": mmlu.PROMPT,
            "questions_sha256": mmlu.fingerprint(inputs.questions),
        }
    for kind, is_asked in {"held_out": args.held_out, "retrieval": args.retrieval, "tasks": args.tasks}.items():
        if is_asked:
            config |= {option: value for option, value in vars(args).items() if option.startswith(kind)}
    if args.held_out:
        config["document_separator"] = inputs.separator
    return config | ({"seed": args.seed} if args.retrieval else {})
