"""What can be wrong with a conversion, found before a weight is read: options against the teacher's config, the folder
of the student, and the room on its disk.
"""

import logging
import shutil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from conversion.gguf import GGUFModel, is_gguf, partial_folder
from conversion.options import MakeArguments
from conversion.student_config import problems_of_teacher, student_config
from conversion.unfinished import FIGURES, problem_of_new, unfinished_folder
from inputs.context import shortest
from inputs.model_files import one_line, read_config
from inputs.option_values import PRESETS, preset_values
from llamba import LlambaConfig, LlambaForCausalLM
from llamba.families import TeacherConfig, other_form
from model_utils import DTYPES, check_replacements, locate_model
from paths import readable

logger = logging.getLogger("train")

GB = 1e9
TEACHER = "--teacher_model"


def check_conversion(args: MakeArguments) -> tuple[TeacherConfig, LlambaConfig]:
    """Returns the configs of the teacher and of the student that it becomes. Raises ValueError that lists what is wrong
    with the options; a plan (--dry_run) reads the config of a preset's teacher from the preset, without a network.
    """
    teacher = teacher_config(args)
    try:
        student = student_config(teacher, args.d_state, args.ssm_bias)
    except ValueError as error:
        raise ValueError(f"{TEACHER} {args.teacher_model}: no student can be made of it: {error}") from error
    problems = [*_problems_of_options(args, teacher, student)]
    if not args.dry_run:
        problems += _problems_of_output(args, student)
    if problems:
        raise ValueError("\n".join(problems))
    return teacher, student


def warn_of_few_tokens(args: MakeArguments, student: LlambaConfig) -> None:
    """Warns where a fit has more unknowns than tokens."""
    if args.init == "closed_form" and args.calibration_tokens < student.d_inner:
        logger.warning(
            "--calibration_tokens %d: are fewer than the %d inputs of out_proj that are fitted; use %d or more",
            args.calibration_tokens, student.d_inner, 2 * student.d_inner,
        )  # fmt: skip


def teacher_config(args: MakeArguments) -> TeacherConfig:
    """Returns the teacher's config. Raises ValueError if no student can be made of such a model."""
    name = args.teacher_model
    if is_gguf(name):
        with readable(f"{TEACHER} {name}", name):
            if not Path(name).is_file():
                raise ValueError(f"{TEACHER} {name}: there is no such file; give the path of a .gguf file")
        return GGUFModel.open(TEACHER, Path(name)).config
    copy = PRESETS / args.preset / "teacher"
    is_presets = name == preset_values(args.preset, MakeArguments, "common").get("teacher_model")
    if args.dry_run and is_presets and not Path(name).is_dir() and copy.is_dir():
        path = str(copy)
    else:
        path = locate_model(TEACHER, name, args.local_files_only, needs_weights=False)
    with one_line(f"{TEACHER} {name}: cannot read its config.json"):
        values, _ = PretrainedConfig.get_config_dict(path)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}; expected the fields of a config")
    if problems := problems_of_teacher(values, args.ssm_bias):
        raise ValueError("\n".join(f"{TEACHER} {name}: {problem}" for problem in problems))
    config = read_config(TEACHER, name, path)
    if (other := other_form(config)) is not None:
        raise ValueError(f"{TEACHER} {name}: its config.json says {other}; give another teacher")
    return config


def _problems_of_options(args: MakeArguments, teacher: TeacherConfig, student: LlambaConfig) -> list[str]:
    problems = []
    try:
        check_replacements(student, teacher, args.layers, args.kept_heads)
    except ValueError as error:
        problems.append(str(error))
    context = shortest({"the teacher": teacher})
    if context is not None and args.seq_length > context[1]:
        problems.append(
            f"--seq_length {args.seq_length}: the teacher can read {context[1]} tokens at once, by its config; lower "
            "--seq_length to that"
        )
    return problems


def _problems_of_output(args: MakeArguments, student: LlambaConfig) -> list[str]:
    assert args.output is not None
    output = Path(args.output)
    with readable(f"--output {output}", output):
        if (output / FIGURES).is_file():
            return []  # finished, or another one, which `check_output` says
        if problem := problem_of_new(output):
            return [problem]
        place = next(folder for folder in output.absolute().parents if folder.is_dir())
        begun = (unfinished_folder(output), partial_folder(converted_folder(args)))  # what is there is overwritten
        done = sum(file.stat().st_size for folder in begun for file in folder.glob("*.safetensors"))
        needed, free = disk_bytes(args, student) - done, shutil.disk_usage(place).free
    if free < needed:
        return [
            f"--output {output}: takes {needed / GB:.1f} GB, and {place} has {free / GB:.1f} GB free; make room, or "
            "choose a folder on another disk"
        ]
    return []


def n_parameters(student: LlambaConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in LlambaForCausalLM(student).parameters())


def disk_bytes(args: MakeArguments, student: LlambaConfig) -> int:
    """Returns the most that a conversion writes: the student, hidden states between two layers, beside those before,
    and the folder that a GGUF file is converted to.
    """
    total = n_parameters(student) * DTYPES[args.dtype].itemsize + 2 * states_bytes(args, student)
    if is_gguf(args.teacher_model) and not converted_folder(args).exists():
        total += GGUFModel.open(TEACHER, Path(args.teacher_model)).n_bytes
    return total


def converted_folder(args: MakeArguments) -> Path:
    """Returns where a teacher in a GGUF file is converted to."""
    return Path(f"{Path(args.output or '')}-teacher")  # of a path that ends with a slash, too


def states_bytes(args: MakeArguments, student: LlambaConfig) -> int:
    """Returns the bytes of the hidden states that travel from layer to layer, in float32: those of calibration in
    teacher and student, and those of the held-out text in the teacher and in each student that is measured.
    """
    n_streams = 5 if args.layers else 3
    return 4 * student.d_model * (2 * args.calibration_tokens + n_streams * args.held_out_tokens)
