"""Score the teacher, the student, the untrained hybrid and a trained one on MMLU, side by side:

    python eval_mmlu_hybrid.py --which student hybrid_ft teacher --ckpt runs/llamba-8b/checkpoint-10000 \\
        --mmlu_dir data/mmlu --num_fewshot 5 --output runs/llamba-8b/eval.json

`hybrid` is the student with --layers replaced by the teacher's, before any training; `hybrid_ft` is --ckpt,
which knows its own layers. Models are loaded one after another, so the device needs memory for one. All see
the same prompts: made by the teacher's tokenizer, cut to --max_length, or else to the teacher's context.
"""

import dataclasses
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

import mmlu
from arguments import EvalArguments, parse_eval_args
from llamba import LlambaConfig
from model_files import read_config
from model_utils import (
    apply_replacements,
    check_replacements,
    get_student_model,
    get_teacher_model,
    get_tokenizer,
    locate_model,
)
from utils import checked_device, run_entry, setup_logging

MODELS = ("student", "hybrid", "hybrid_ft", "teacher")  # from what training starts with to what it aims at


@dataclasses.dataclass
class Plan:
    """What the checks have found: from here on, the options can cause no other error."""

    models: list[str]
    paths: dict[str, str]  # where --teacher_model, --student_model and --ckpt are on this machine, or the hub
    device: torch.device
    tokenizer: PreTrainedTokenizerBase
    questions: list[mmlu.Question]
    max_length: int


def main() -> None:
    args = parse_eval_args()
    setup_logging(None, is_main=True)
    plan = check(args)
    run(args, plan)


def run(args: EvalArguments, plan: Plan) -> None:
    results = {}
    for name in plan.models:
        started = time.perf_counter()
        model = load(name, args, plan)
        predictions = mmlu.score(model, plan.tokenizer, plan.questions, args.batch_size, plan.device, plan.max_length)
        results[name] = {
            **mmlu.aggregate(predictions),
            "config": describe(name, args, plan, model),
            "predictions": [dataclasses.asdict(prediction) for prediction in predictions],
        }
        seconds = time.perf_counter() - started
        print(f"{name}: acc {results[name]['acc']:.4f} of {len(predictions)} in {seconds:.1f} s", flush=True)
        del model  # before the next one comes
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{format_table(results)}")
    if args.output is not None:
        write_json(Path(args.output), arrange(results))


# Checks, before any weights are read


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
    questions = attempt(_read_questions, args)
    device = attempt(checked_device, "--device", args.device)
    attempt(_check_output, args)
    if problems:
        raise ValueError("\n  ".join(["these options cannot be used:", *problems]))
    assert teacher is not None and tokenizer is not None
    max_length = args.max_length or teacher.max_position_embeddings
    return Plan(models, paths, device, tokenizer, questions, max_length)


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
    if args.mmlu_dir is None:
        raise ValueError("--mmlu_dir: not given; expected a folder with MMLU's dev/ and test/ CSV files")
    subjects = mmlu.load_mmlu(args.mmlu_dir, args.subjects)
    return mmlu.build_questions(subjects, args.num_fewshot, args.limit)


def _check_output(args: EvalArguments) -> None:
    if args.output is None:
        return
    path = Path(args.output)
    if path.is_dir():
        raise ValueError(f"--output {path}: is a directory; expected the name of a JSON file")
    if path.exists() and not args.overwrite:
        raise ValueError(f"--output {path}: exists already; give another name, or --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"--output {path}: cannot write below {folder}; give a folder that is yours")


# Models


def load(name: str, args: EvalArguments, plan: Plan) -> PreTrainedModel:
    dtype = getattr(torch, args.dtype)
    if name == "teacher":
        return get_teacher_model(plan.paths["teacher"], dtype, plan.device)
    student = get_student_model(plan.paths["ckpt" if name == "hybrid_ft" else "student"], dtype, plan.device)
    if name == "hybrid":
        # The lender waits in main memory: the device holds the student alone.
        lender = get_teacher_model(plan.paths["teacher"], dtype, torch.device("cpu"), with_head=False)
        apply_replacements(student, lender, args.layers)
    return student.eval()


def describe(name: str, args: EvalArguments, plan: Plan, model: PreTrainedModel) -> dict[str, Any]:
    """What it takes to get these numbers again."""
    return {
        "which": name,
        "teacher_model": args.teacher_model,
        "student_model": args.student_model if name in ("student", "hybrid") else None,
        "ckpt": args.ckpt if name == "hybrid_ft" else None,
        "layers": model.config.attention_layers if isinstance(model.config, LlambaConfig) else None,
        "mmlu_dir": args.mmlu_dir,
        "num_fewshot": args.num_fewshot,
        "limit": args.limit,
        "max_length": plan.max_length,
        "batch_size": args.batch_size,
        "dtype": args.dtype,
        "device": str(plan.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


# Reports


def arrange(results: dict[str, dict]) -> dict[str, Any]:
    """One model's result as it is; of several, each accuracy, `n`, and all results under `models`."""
    if len(results) == 1:
        return next(iter(results.values()))
    n = next(iter(results.values()))["n"]
    return {**{name: result["acc"] for name, result in results.items()}, "n": n, "models": results}


def format_table(results: dict[str, dict]) -> str:
    """Accuracy by subject, one column per model."""
    first = next(iter(results.values()))
    width = max(len(name) for name in (*first["subjects"], "subject"))

    def line(label: str, n: int | str, cells: Iterable[str]) -> str:
        return f"{label:<{width}}{n:>8}" + "".join(f"{cell:>11}" for cell in cells)

    lines = [line("subject", "n", results)]
    for subject, counts in first["subjects"].items():
        cells = (f"{result['subjects'][subject]['acc']:.4f}" for result in results.values())
        lines.append(line(subject, counts["n"], cells))
    lines.append(line("all", first["n"], (f"{result['acc']:.4f}" for result in results.values())))
    errors = (result["stderr"] for result in results.values())
    lines.append(line("stderr", "", ("-" if error is None else f"{error:.4f}" for error in errors)))
    return "\n".join(lines)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """All of the file or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(run_entry(main))
