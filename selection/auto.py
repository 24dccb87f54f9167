"""`--layers auto:K` of train_gpus.py: the choice beside the student is used, or made before training. A choice that was
stopped resumes, and a resumed run keeps its layers.
"""

import dataclasses
import gc
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from arguments import TrainArguments
from distillation.models import check_models
from llamba import LlambaConfig
from model_utils import get_configs, locate_model
from processes.ranks import Ranks
from selection.checks import (
    check_choice,
    check_pair,
    cost_of,
    is_held_out,
    planned_tokens,
    read_material,
    settings_of,
    words_of_text,
)
from selection.choosing import evenly
from selection.folder import RESULT, read_choice, set_rows_aside
from selection.made_with import MODELS, differences, identity
from selection.options import FOLDER, ChooseArguments
from selection.running import make_choice

logger = logging.getLogger("train")


def check_auto(args: TrainArguments, of_checkpoint: list[int] | None) -> TrainArguments:
    """Returns the options with the layers of the checkpoint that a run resumes from, if any, in place of `auto:K`. Else
    they stay as they are, and are checked: raises ValueError of one line before anything is loaded.
    """
    if args.auto_layers is None:
        return args
    if of_checkpoint is not None:
        return dataclasses.replace(args, layers=of_checkpoint, auto_layers=None)
    paths = _paths(args)
    check_budget(args, get_configs(*paths))
    _finished(args, paths)
    return args


def chosen(args: TrainArguments, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Returns the `args` with the chosen layers in place of `auto:K`, and the `models` checked for them; nothing if no
    choice was asked for. All ranks call it. Raises ValueError.
    """
    if args.auto_layers is None:
        return {}
    found = ranks.share(_finished(args, _paths(args)) if ranks.is_main else None)[0]
    folder = folder_of_run(args)
    if found is None:
        logger.info("%s: no choice in %s yet; it is made before training", _flag(args), folder)
        found = _make(args, device, ranks)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    logger.info("%s: layers %s, of %s", _flag(args), found["layers"], folder / RESULT)
    args = dataclasses.replace(args, layers=found["layers"], auto_layers=None)
    return {"args": args, "models": check_models(args, None)}


def for_plan(args: TrainArguments, configs: tuple[PretrainedConfig, LlambaConfig]) -> tuple[TrainArguments, str]:
    """Returns the options that a plan counts with, and what it says of `auto:K`: the layers of a choice that is there,
    else as many at equal distances, which take as much memory.
    """
    if args.auto_layers is None:
        return args, ""
    check_budget(args, configs)
    folder = folder_of_run(args)
    choice = _finished(args, _paths(args)) if (folder / RESULT).exists() else None
    if choice is not None:
        layers = choice["layers"]
        words = f"layers {' '.join(map(str, layers))}, of {folder / RESULT}"
    else:
        n_layer = configs[1].n_layer
        layers = sorted(set(range(n_layer)) - evenly(n_layer, args.auto_layers))
        cost = cost_of(options_of_choice(args), configs, args.auto_layers, None, planned_tokens(args))
        words = f"they are chosen first, at most about {cost}; the plan has as many at equal distances"
    return dataclasses.replace(args, layers=layers, auto_layers=None), f"{_flag(args)}: {words}."


def check_budget(args: TrainArguments, configs: tuple[PretrainedConfig, LlambaConfig]) -> None:
    """Raises ValueError of one line if this teacher cannot give this student so many layers."""
    check_pair(configs, _flag(args))
    assert args.auto_layers is not None
    if not 1 <= args.auto_layers < configs[1].n_layer:
        raise ValueError(
            f"{_flag(args)}: expected auto:1 to auto:{configs[1].n_layer - 1}; the student has {configs[1].n_layer} "
            "layers"
        )


def folder_of_run(args: TrainArguments) -> Path:
    """Returns where the choice of a run is: beside its student, or, if that is a name on the hub, in --output_dir."""
    student = Path(args.student_model)
    return (student if student.is_dir() else Path(args.output_dir)) / FOLDER


def options_of_choice(args: TrainArguments) -> ChooseArguments:
    """Returns the options of the choice that a run makes: on its held-out text, if it has one."""
    text, subset, split = args.held_out_text()
    return ChooseArguments(
        preset=args.preset,
        seed=args.seed,
        local_files_only=args.local_files_only,
        teacher_model=args.teacher_model,
        student_model=args.student_model,
        dtype=args.dtype,
        document_separator=args.document_separator,
        budget=args.auto_layers,
        output=str(folder_of_run(args)),
        text=text,
        text_subset=subset,
        text_split=split,
        text_field=args.dataset_text_field,
        seq_length=min(args.seq_length, ChooseArguments.seq_length),
    )


def _make(args: TrainArguments, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Makes the choice on all ranks, on the devices of their students."""
    asked = options_of_choice(args)
    checked = dataclasses.replace(check_choice(asked, _flag(args)), device=device)
    material = read_material(asked, checked)
    planned = planned_tokens(args, ranks.world_size)
    cost = cost_of(asked, checked.configs, checked.n_kept, material, planned)
    logger.info("%s: at most about %s", _flag(args), cost)
    words = {
        "text": words_of_text(asked, material),
        "held_out": is_held_out(asked, checked, args),
        "cost": str(cost),
    }
    if ranks.is_main:
        set_rows_aside(checked.folder, settings_of(asked, checked, material))
    return make_choice(asked, checked, material, words, ranks)


def _finished(args: TrainArguments, paths: tuple[str, str]) -> dict[str, Any] | None:
    """Returns the choice of so many layers beside the student, None if none is finished. Raises ValueError if what is
    there is of other models.
    """
    folder = folder_of_run(args)
    try:
        choice = read_choice(folder)
        if choice is None:
            return None
        now = {name: identity(f"--{name}", path) for name, path in zip(MODELS, paths, strict=True)}
        if different := differences(choice["made_with"], now):
            raise ValueError(f"{folder / RESULT} is with {', '.join(different)}")
    except ValueError as error:
        again = f"python choose_layers.py --teacher_model {args.teacher_model} --student_model {args.student_model}"
        raise ValueError(
            f"{_flag(args)}: {error}; move {folder} away, and it is made again before training, or by "
            f"`{again} --budget {args.auto_layers}`"
        ) from error
    return choice if choice["request"]["n_kept"] == args.auto_layers else None


def _paths(args: TrainArguments) -> tuple[str, str]:
    """Returns where teacher and student are, or their names on the hub."""
    teacher = locate_model("--teacher_model", args.teacher_model, args.local_files_only)
    return teacher, locate_model("--student_model", args.student_model, args.local_files_only)


def _flag(args: TrainArguments) -> str:
    return f"--layers auto:{args.auto_layers}"
