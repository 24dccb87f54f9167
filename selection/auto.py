"""`--layers auto:K` and `--heads auto:K` of train_gpus.py: the choice beside the student is used, or made before
training. One that was stopped resumes, and a resumed run keeps its layers and heads.
"""

import contextlib
import dataclasses
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from arguments import TrainArguments
from distillation.models import check_models
from inputs.teacher_parts import named_parts
from llamba import LlambaConfig
from model_utils import get_configs, locate_model
from processes.ranks import Ranks
from selection.checks import check_choice, check_head_budget, check_pair, cost_of, planned_tokens
from selection.choosing import evenly
from selection.folder import MODELS, RESULT, differences, identity, read_choice, taken
from selection.heads import strongest_heads
from selection.options import FOLDER, ChooseArguments
from selection.reach import heads_per_group
from selection.running import make_choice
from text.sources import TextSource

logger = logging.getLogger("train")


def check_auto(args: TrainArguments, of_checkpoint: tuple[list[int], list[str]] | None) -> TrainArguments:
    """Returns the options with the layers and heads of the checkpoint that a run resumes from, if any, in place of
    `auto:K`. Else they stay as they are, and are checked: raises ValueError of one line before anything is loaded.
    """
    if not _is_asked(args):
        return args
    if of_checkpoint is not None:
        return _with_parts(args, *of_checkpoint)
    paths = _paths(args)
    check_budget(args, get_configs(*paths))
    _finished(args, paths)
    return args


def chosen(args: TrainArguments, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Returns the `args` with the chosen layers and heads in place of `auto:K`, and the `models` checked for them;
    nothing if no choice was asked for. All ranks call it. Raises ValueError.
    """
    if not _is_asked(args):
        return {}
    folder = folder_of_run(args)

    def there() -> dict[str, Any] | None:
        return ranks.share(_finished(args, _paths(args)) if ranks.is_main else None)[0]

    if (found := there()) is None:
        logger.info("%s: no choice in %s yet; it is made before training", _flag(args), folder)
        with _errors_of(args), taken(folder, waits=True) if ranks.is_main else contextlib.nullcontext():
            found = there() or _make(args, device, ranks)  # which another run may have made meanwhile
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    flag, args = _flag(args), _resolved(args, found)
    logger.info("%s: %s, of %s", flag, named_parts(args.layers, args.kept_heads), folder)
    return {"args": args, "models": check_models(args, None)}


def for_plan(args: TrainArguments, configs: tuple[PretrainedConfig, LlambaConfig]) -> tuple[TrainArguments, str]:
    """Returns the options that a plan counts with, and what it says of `auto:K`: the layers and heads of a choice that
    is there, else as many at equal distances, which take as much memory.
    """
    if not _is_asked(args):
        return args, ""
    check_budget(args, configs)
    folder = folder_of_run(args)
    choice = _finished(args, _paths(args)) if (folder / RESULT).exists() else None
    if choice is not None:
        known = _resolved(args, choice)
        return known, f"{_flag(args)}: {named_parts(known.layers, known.kept_heads)}, of {folder / RESULT}."
    n_layer = configs[1].n_layer
    layers = (
        args.layers if args.auto_layers is None else sorted(set(range(n_layer)) - evenly(n_layer, args.auto_layers))
    )
    heads = _heads_of_many_layers(configs, layers)[: args.auto_heads or 0]
    cost = cost_of(options_of_choice(args), configs, args.auto_layers or 0, None, planned_tokens(args))
    words = f"{_flag(args)}: they are chosen first, at most about {cost}; the plan has as many at equal distances."
    return _with_parts(args, layers, heads), words


def _heads_of_many_layers(configs: tuple[PretrainedConfig, LlambaConfig], whole: list[int]) -> list[str]:
    """Returns the heads of layers that are not whole: those of one key/value head of each layer, then of the next."""
    teacher, student = configs
    n_groups, others = teacher.num_key_value_heads, [layer for layer in range(student.n_layer) if layer not in whole]
    per_group = heads_per_group(teacher)
    groups = [(layer, group) for group in range(n_groups) for layer in others]
    return [f"{layer}:{group * per_group + i}" for layer, group in groups for i in range(per_group)]


def check_budget(args: TrainArguments, configs: tuple[PretrainedConfig, LlambaConfig]) -> None:
    """Raises ValueError of one line if this teacher cannot give this student so many layers or heads."""
    check_pair(configs, _flag(args))
    n_layer, n_whole = configs[1].n_layer, len(args.layers) if args.auto_layers is None else args.auto_layers
    if args.auto_layers is not None and not 1 <= args.auto_layers < n_layer:
        raise ValueError(
            f"{_flag(args)}: expected --layers auto:1 to auto:{n_layer - 1}; the student has {n_layer} layers"
        )
    if args.auto_heads is not None:
        check_head_budget(args.auto_heads, configs, n_whole, _flag(args))


def _is_asked(args: TrainArguments) -> bool:
    return args.auto_layers is not None or args.auto_heads is not None


def _resolved(args: TrainArguments, choice: dict[str, Any]) -> TrainArguments:
    """Returns the options with what was chosen in place of `auto:K`."""
    return _with_parts(args, choice["layers"], [] if args.auto_heads is None else choice["heads"]["names"])


def _with_parts(args: TrainArguments, layers: list[int], heads: list[str]) -> TrainArguments:
    """Returns the options with these in place of `auto:K`."""
    return dataclasses.replace(
        args,
        layers=args.layers if args.auto_layers is None else layers,
        heads=args.heads if args.auto_heads is None else heads,
        auto_layers=None,
        auto_heads=None,
    )


def folder_of_run(args: TrainArguments) -> Path:
    """Returns where the choice of a run is: beside its student, or in --output_dir, if the student is a name on the hub
    or has no choice and its folder cannot be written.
    """
    student = Path(args.student_model)
    is_beside = student.is_dir() and ((student / FOLDER / RESULT).exists() or os.access(student, os.W_OK))
    return (student if is_beside else Path(args.output_dir)) / FOLDER


def options_of_choice(args: TrainArguments) -> ChooseArguments:
    """Returns the options of the choice that a run makes. Its text is the run's held-out text, if it has one.

    Its probes are not drawn with the run's seed: runs of several seeds can use what was measured.
    """
    return ChooseArguments(
        preset=args.preset,
        local_files_only=args.local_files_only,
        teacher_model=args.teacher_model,
        student_model=args.student_model,
        dtype=args.dtype,
        document_separator=args.document_separator,
        budget=args.auto_layers,
        head_budget=args.auto_heads,
        output=str(folder_of_run(args)),
        seq_length=min(args.seq_length, ChooseArguments.seq_length),
    )


def _make(args: TrainArguments, device: torch.device, ranks: Ranks) -> dict[str, Any]:
    """Makes the choice on all ranks, on the devices of their students."""
    asked, text = options_of_choice(args), TextSource.for_evaluation_in_training(args)
    checked = dataclasses.replace(check_choice(asked, _flag(args), text), device=device)
    return make_choice(asked, checked, ranks, args)


@contextlib.contextmanager
def _errors_of(args: TrainArguments) -> Iterator[None]:
    """Has errors begin with `auto:K`: the flags of choose_layers.py are none of a run."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix("--output ").removeprefix(f"{_flag(args)}: ")
        raise ValueError(f"{_flag(args)}: {text}") from error


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
        raise ValueError(f"{_flag(args)}: {error}; move {folder} away, and it is made again before training") from error
    if args.auto_layers not in (None, choice["request"]["n_kept"]):
        return None
    if args.auto_heads is None:
        return choice
    heads = _heads(args, choice, get_configs(*paths)[0])
    return None if heads is None else choice | {"heads": heads}


def _heads(args: TrainArguments, choice: dict[str, Any], teacher: PretrainedConfig) -> dict[str, Any] | None:
    """Returns as many heads as are asked for, beside the same whole layers: those of the choice, or by what it has of
    ablations. None if it has neither.
    """
    assert args.auto_heads is not None
    found, whole = choice.get("heads"), sorted(args.layers) if args.auto_layers is None else choice["layers"]
    if found is not None and found["whole"] == whole and len(found["names"]) == args.auto_heads:
        return found
    if choice["ablation"] is None:
        return None
    return strongest_heads(choice["ablation"]["heads"], args.auto_heads, whole, heads_per_group(teacher))


def _paths(args: TrainArguments) -> tuple[str, str]:
    """Returns where teacher and student are, or their names on the hub."""
    teacher = locate_model("--teacher_model", args.teacher_model, args.local_files_only)
    return teacher, locate_model("--student_model", args.student_model, args.local_files_only)


def _flag(args: TrainArguments) -> str:
    asked = {"layers": args.auto_layers, "heads": args.auto_heads}
    return " ".join(f"--{name} auto:{number}" for name, number in asked.items() if number is not None)
