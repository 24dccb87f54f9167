"""Runs that take seconds: models of a few thousand weights on disk, the command line, and what a rank does beside."""

import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from checkpointing.saver import Saver
from tests.launch import ROOT
from tests.tiny import tiny_student, tiny_teacher

TEXT = ROOT / "presets" / "tiny" / "text" / "heldout.jsonl"
TOKENIZER = ROOT / "presets" / "tiny" / "teacher"  # at most 1024 entries


def make_models(folder: Path) -> Path:
    """Saves a teacher with 1030 entries and two students with 1024, `student` with dropout, whose results depend on the
    random state, and `plain` without; and a text of 60 rows.
    """
    tiny_teacher(vocab_size=1030).save_pretrained(folder / "teacher")
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder / "teacher")
    tiny_student(vocab_size=1024, resid_dropout=0.1).save_pretrained(folder / "student")
    tiny_student(vocab_size=1024).save_pretrained(folder / "plain")
    (folder / "short.jsonl").write_text("".join(TEXT.read_text().splitlines(keepends=True)[:60]))
    return folder


def options(models: Path, output_dir: Path, **changes) -> list[str]:
    """Returns the options of train_gpus.py for a run with the models of `make_models`. A change of True is a flag
    without a value; False or None leaves the option out.
    """
    values = {
        "teacher_model": models / "teacher",
        "student_model": models / "student",
        "dataset_name": TEXT,
        "dataset_cache_dir": models / "cache",
        "output_dir": output_dir,
        "layers": "1 3",
        "dtype": "float32",
        "seq_length": 32,
        "batch_size": 2,
        "max_steps": 24,
        "max_lr": 1e-3,
        "save_interval": 3,
        "log_interval": 1,
        "no_dataset_streaming": True,
        **changes,
    }
    argv = ["--local_files_only"]
    for name, value in values.items():
        if value is True:
            argv.append(f"--{name}")
        elif value is not None and value is not False:
            argv += [f"--{name}", *str(value).split()]
    return argv


def read_metrics(output_dir: Path) -> list[dict]:
    """Returns the rows of metrics.jsonl."""
    return [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]


def keep_final_weights(rank: int) -> None:
    """Has a rank save its final weights as `<output_dir>/rank-<rank>.pt`. For `arm` of a launch."""
    finish = Saver.finish

    def finish_and_keep(saver, *args):
        finish(saver, *args)
        torch.save(saver.student.state_dict(), saver.output_dir / f"rank-{rank}.pt")

    Saver.finish = finish_and_keep


def compile_with(backend: str, rank: int) -> None:
    """Has torch.compile use `backend`, and print so. For `arm`, as functools.partial(compile_with, backend)."""
    compile_by_default = torch.compile

    def compile_and_say(*args, **options):
        print(f"torch.compile with {backend}", flush=True)
        return compile_by_default(*args, **{**options, "backend": backend})

    torch.compile = compile_and_say
